"""The scenes set: pure, true to its captions, balanced where it says so, and never half made."""

import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrate.data.scene_art import BACKGROUNDS, PALETTE
from orchestrate.data.scenes import (
    CLASSES,
    COLOR_SHOWN,
    HELDOUT_FIRST,
    LARGE_ABOVE,
    MAX_WORDS,
    SMALL_BELOW,
    Scene,
    generate,
    scene,
    scene_index,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(7, i) for i in range(600)]


def _named_color(made: Scene) -> str | None:
    """The colour word that the caption puts before the main object's noun, if any."""
    match = re.search(rf"\b({'|'.join(PALETTE)}) {made.main.name}\b", made.caption)
    return match[1] if match else None


def test_same_seed_and_number_give_the_same_scene() -> None:
    first, again = scene(3, 41), scene(3, 41)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.label, first.main, first.others) == (
        again.caption,
        again.label,
        again.main,
        again.others,
    )
    assert scene(4, 41).image.tobytes() != first.image.tobytes()


def test_shapes_and_types(scenes: list[Scene]) -> None:
    for made in scenes[:50]:
        assert (made.image.shape, made.image.dtype) == ((64, 64, 3), np.dtype(np.uint8))
        assert (made.mask.shape, made.mask.dtype) == ((64, 64), np.dtype(np.bool_))
    assert scene(0, 0, side=96).image.shape == (96, 96, 3)


def test_every_caption_names_its_class_as_a_whole_word(scenes: list[Scene]) -> None:
    for made in scenes:
        assert re.search(rf"\b{CLASSES[made.label]}\b", made.caption), made.caption
        assert 4 <= len(made.caption.split()) <= MAX_WORDS, made.caption
        assert not re.search(r"\s,|,,|\s\s|,$|\ba [aeiou]|\ban [^aeiou]", made.caption), made.caption


def test_color_words_are_found_in_the_main_object(scenes: list[Scene]) -> None:
    names, palette = list(PALETTE), np.array(list(PALETTE.values()), dtype=np.float64)  # (C, 3)
    checked = 0
    for made in scenes:
        color = _named_color(made)
        if color is None:
            continue
        assert color == made.main.color, made.caption
        pixels = made.image[made.mask].astype(np.float64)  # (K, 3)
        distance = np.linalg.norm(pixels[:, None] - palette[None], axis=-1)  # (K, C)
        share = np.mean((distance.argmin(axis=1) == names.index(color)) & (distance.min(axis=1) < 60))
        assert share > 0.25, (made.caption, share)
        checked += 1
    assert checked > 0.8 * COLOR_SHOWN * len(scenes)


def test_size_and_place_words_agree_with_the_mask(scenes: list[Scene]) -> None:
    for made in scenes:
        rows, columns = np.nonzero(made.mask)
        x, y = (columns.min() + columns.max()) / 126, (rows.min() + rows.max()) / 126
        extent = max(np.ptp(rows), np.ptp(columns)) / 63
        assert "small" not in made.caption or extent < SMALL_BELOW + 0.05
        assert "large" not in made.caption or extent > LARGE_ABOVE - 0.07
        assert not re.search(r"\b(upper|at the top|top (left|right))\b", made.caption) or y < 0.48
        assert not re.search(r"\b(lower|at the bottom|bottom (left|right))\b", made.caption) or y > 0.52
        assert not re.search(r"\b(on the|upper|lower|top|bottom) left\b", made.caption) or x < 0.48
        assert not re.search(r"\b(on the|upper|lower|top|bottom) right\b", made.caption) or x > 0.52


def test_neighbours_named_are_in_the_scene_and_stand_as_said(scenes: list[Scene]) -> None:
    for made in scenes:
        present = {made.main.name, *(other.name for other in made.others)}
        assert {name for name in CLASSES if re.search(rf"\b{name}\b", made.caption)} <= present, made.caption
        match = re.search(rf"\b(above|below|left of|right of) an? (?:\w+ )?({'|'.join(CLASSES)})\b", made.caption)
        if match is None:
            continue
        (other,) = (other for other in made.others if other.name == match[2])
        axis, sign = {"above": (1, -1), "below": (1, 1), "left of": (0, -1), "right of": (0, 1)}[match[1]]
        assert sign * (made.main.centre[axis] - other.centre[axis]) > 0, made.caption


def test_main_object_is_one_clear_region(scenes: list[Scene]) -> None:
    covered = np.array([made.mask.mean() for made in scenes])
    assert covered.min() > 0.03
    assert covered.max() < 0.40
    for made in scenes:
        assert all(other.extent < 0.7 * made.main.extent and other.name != made.main.name for other in made.others)


def test_classes_colors_and_backgrounds_all_occur(scenes: list[Scene]) -> None:
    labels = Counter(made.label for made in scenes)
    assert len(labels) == len(CLASSES) >= 10
    assert min(labels.values()) > len(scenes) / len(CLASSES) / 2
    assert {made.main.color for made in scenes} == set(PALETTE)
    assert {made.background for made in scenes} == set(BACKGROUNDS)
    assert {len(made.others) for made in scenes} == {0, 1, 2}


def test_most_captions_are_unique(scenes: list[Scene]) -> None:
    captions = {made.caption for made in scenes}
    assert len(captions) > 0.9 * len(scenes)


def test_generate_writes_a_set_whose_rows_can_be_made_again(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = generate(tmp_path / "scenes", 60, 2 * len(CLASSES), seed=5, progress=lambda *at: seen.append(at))
    assert json.loads((folder / "classnames.json").read_text()) == list(CLASSES)
    assert seen[-1] == (60 + 2 * len(CLASSES),) * 2
    train, test = (pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "test"))
    assert set(Counter(row["label"] for row in test).values()) == {2}
    for row in (train[0], train[-1], test[3]):
        made = scene(5, scene_index(row["id"]))
        assert (row["caption"], row["label"], row["class"]) == (made.caption, made.label, CLASSES[made.label])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), made.image)
    assert train[12]["id"] == "scene-train-000012"
    assert list(tmp_path.iterdir()) == [folder]


def test_more_scenes_than_could_be_made_are_refused_at_once(tmp_path: Path) -> None:
    for counts in ((10**12, 14), (14, 10**12)):
        with pytest.raises(ValueError, match=r"1,000,000,000,000 .* is too large: at most 10,000,000 each are made. Lower data.size"):
            generate(tmp_path / "scenes", *counts)
    assert not list(tmp_path.iterdir())


def test_heldout_shares_no_picture_and_no_number_with_train(tmp_path: Path) -> None:
    folder = generate(tmp_path / "scenes", 50, 50)
    train, test = (pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "test"))
    assert not {row["image"] for row in train} & {row["image"] for row in test}
    assert max(scene_index(row["id"]) for row in train) < HELDOUT_FIRST <= min(scene_index(row["id"]) for row in test)


def test_worker_processes_write_the_same_bytes(tmp_path: Path) -> None:
    folders = [generate(tmp_path / str(workers), 1_010, 14, workers=workers) for workers in (1, 2)]
    one, two = (hashlib.sha256((folder / "train.parquet").read_bytes()).hexdigest() for folder in folders)
    assert one == two
    groups = pq.ParquetFile(folders[0] / "train.parquet").metadata
    assert [groups.row_group(k).num_rows for k in range(groups.num_row_groups)] == [1_000, 10]


def test_a_complete_set_is_left_alone_and_a_half_made_one_made_again(tmp_path: Path) -> None:
    folder = generate(tmp_path / "scenes", 20, 14)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    generate(folder, 20, 14)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    (folder / "test.parquet").unlink()
    (folder / "train.parquet").write_bytes(before["train.parquet"][:500])
    generate(folder, 20, 14)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "train.parquet").write_bytes(before["train.parquet"][:500])  # all files there, one cut short
    generate(folder, 20, 14)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    folder = generate(tmp_path / "scenes", 20, 14)
    with pytest.raises(ValueError, match="another scenes set"):
        generate(folder, 21, 14)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        generate(tmp_path / "mine", 20, 14)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_bad_arguments_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        generate(tmp_path / "scenes", 0, 14)
    with pytest.raises(ValueError, match="scene-train-000123"):
        scene_index("cat-7")
    with pytest.raises(ValueError, match="side >= 32"):
        scene(0, 0, side=8)
