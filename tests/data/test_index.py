"""Selection, captions, labels and splits: by hash, whatever the order; and what the report says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.base import class_names
from orchestrate.data.captions import NOUN_SHARE, made_captions
from orchestrate.data.index import fingerprint, open_dataset
from orchestrate.data.nouns import mentions, noun_labels, plural

from .data_formats import Settings, pairs, parquet, png

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write(folder: Path, columns: dict[str, list], name: str = "a.parquet") -> Settings:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [png(0)] * count, **columns}), folder / name)
    return Settings(str(folder))


def test_selection_is_by_id_whatever_the_order_and_the_shards(tmp_path: Path):
    ids = [f"s{i}" for i in range(200)]
    whole = write(tmp_path / "whole", {"id": ids, "caption": [f"caption of {i}" for i in ids]})
    for at in range(4):
        part = ids[::-1][at::4]
        write(tmp_path / "parts", {"id": part, "caption": [f"caption of {i}" for i in part]}, f"{at}.parquet")
    wish = {"size": 50, "heldout": 0.1}
    one = open_dataset(replace(whole, **wish))
    other = open_dataset(Settings(str(tmp_path / "parts"), **wish))
    for side in ("train", "heldout"):
        rows = [getattr(data, side).select(["id", "caption"]).sort_by("id") for data in (one, other)]
        assert rows[0].equals(rows[1])
    assert one.train.num_rows == 50 and one.heldout.num_rows == 20
    assert not set(one.train["id"].to_pylist()) & set(one.heldout["id"].to_pylist())
    more = open_dataset(replace(whole, size=0.5, heldout=0.1))
    assert more.train.num_rows == 90 and set(one.train["id"].to_pylist()) < set(more.train["id"].to_pylist())
    assert open_dataset(replace(whole, size=1.0)).train.num_rows == 200
    assert set(open_dataset(replace(whole, **wish, seed=1)).train["id"].to_pylist()) != set(one.train["id"].to_pylist())


def test_sizes_that_cannot_be_are_refused(tmp_path: Path):
    config = write(tmp_path, {"caption": ["a dog"] * 10})
    with pytest.raises(ValueError, match=r"data.size=11, but only 10"):
        open_dataset(replace(config, size=11))
    with pytest.raises(ValueError, match=r"take more than half.*data.heldout=0.2"):
        open_dataset(replace(config, heldout=1000))
    wrong = {"size": -1, "heldout": 2.5, "captions": "some", "templates": ("a",), "max_bad": 2.0, "classes": ("a", "a")}
    for key, value in wrong.items():
        with pytest.raises(ValueError, match=rf"data\.{key}"):
            open_dataset(replace(config, **{key: value}))


def test_captions_without_letters_are_quarantined(tmp_path: Path):
    captions = ["ein Hund", "собака", "كلب", "犬", "é", "", "   ", "123", "…!?", "🐕🐕", "\u200b", None]
    config = write(tmp_path, {"caption": captions})
    with pytest.raises(ValueError, match=r"7 of 12 rows cannot(.|\n)*row 5 .*: empty caption(.|\n)*data.max_bad=0.58"):
        open_dataset(config)
    data = open_dataset(replace(config, max_bad=0.6))
    assert data.train["caption"].to_pylist() == captions[:5]
    assert data.quarantine["row"].to_pylist() == [5, 6, 7, 8, 9, 10, 11]
    reasons = [*["empty caption"] * 2, *["caption without any letter"] * 4, "empty caption"]
    assert data.quarantine["reason"].to_pylist() == reasons
    assert "7 of 12 rows quarantined." in data.report


def test_labelled_sets_get_captions_that_are_declared(tmp_path: Path):
    config = write(tmp_path, {"id": [f"{i}" for i in range(100)], "label": [i % 10 for i in range(100)]})
    with pytest.raises(ValueError, match="nor class labels"):
        open_dataset(config)
    (tmp_path / "classnames.json").write_text(json.dumps(CIFAR))
    data = open_dataset(config)
    assert class_names(data.train) == class_names(data.heldout) == data.classes == CIFAR
    assert any("Captions are MADE" in sentence for sentence in data.report)
    for path in ("*.parquet", "[a-z].parquet"):  # a glob names no class file: it lies beside what the glob names
        assert open_dataset(replace(config, path=str(tmp_path / path))).classes == CIFAR
    with pytest.raises(ValueError, match="has no captions"):
        open_dataset(replace(config, captions="given"))
    some = open_dataset(replace(config, classes=("dog", "cat")))
    assert some.classes == ["dog", "cat"] and some.train["label"].to_pylist()[:7] == [-1, -1, -1, 1, -1, 0, -1]
    assert some.train["caption"] == data.train["caption"]
    with pytest.raises(ValueError, match="wolf is no class of this set"):
        open_dataset(replace(config, classes=("wolf",)))
    (tmp_path / "classnames.json").write_text(json.dumps(CIFAR[:9]))
    with pytest.raises(ValueError, match=r"row 9: label 9, but the class file names 9 classes"):
        open_dataset(config)


def test_class_names_from_words_pairs_and_hugging_face(tmp_path: Path):
    words = open_dataset(write(tmp_path / "words", {"class": ["dog", "cat", "dog"]}))
    assert words.classes == ["cat", "dog"] and words.train["label"].to_pylist() == [1, 0, 1]
    both = open_dataset(write(tmp_path / "both", {"label": [1, 0, 1], "class": ["cat", "dog", "cat"]}))
    assert both.classes == ["dog", "cat"] and both.train["label"].to_pylist() == [1, 0, 1]
    with pytest.raises(ValueError, match="called both"):
        open_dataset(write(tmp_path / "clash", {"label": [1, 1], "class": ["cat", "dog"]}))
    (tmp_path / "hub").mkdir()
    meta = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [png(0)], "label": [1]}).replace_schema_metadata({"huggingface": json.dumps(meta)})
    pq.write_table(table, tmp_path / "hub" / "a.parquet")
    assert open_dataset(Settings(str(tmp_path / "hub"))).classes == ["ant", "bee"]


def test_a_row_with_a_blank_class_has_no_class(tmp_path: Path):
    """It is quarantined where captions are made, and unlabelled where they are given."""
    lines = [f"{i}.png,{name},a pet\n" for i, name in enumerate(("dog", "", "cat", "  "))]
    (tmp_path / "a.csv").write_text("filepath,class,title\n" + "".join(lines))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    made = open_dataset(Settings(str(tmp_path), captions="made", max_bad=0.5))
    assert made.classes == ["cat", "dog"] and made.train["label"].to_pylist() == [1, 0]
    assert made.quarantine.select(["row", "reason"]).to_pylist() == [
        {"row": row, "reason": "no label to make a caption from"} for row in (1, 3)
    ]
    given = open_dataset(Settings(str(tmp_path)))
    assert given.classes == ["cat", "dog"] and given.train["label"].to_pylist() == [1, -1, 0, -1]
    assert open_dataset(write(tmp_path / "label", {"label": ["dog", " ", "cat"], "caption": ["a"] * 3})).classes == ["cat", "dog"]
    numbered = write(tmp_path / "numbered", {"label": [0, 1]})
    with pytest.raises(ValueError, match=r"Class number 1 has no name in data.classes"):
        open_dataset(replace(numbered, classes=("dog", " ")))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.randoms())
def test_made_captions_depend_on_the_sample_alone(labels, random):
    ids = [f"s{i}" for i in range(len(labels))]
    captions = dict(zip(ids, made_captions(ids, labels, CIFAR, 0), strict=True))
    order = list(range(len(labels)))
    random.shuffle(order)
    again = made_captions([ids[i] for i in order], [labels[i] for i in order], CIFAR, 0)
    assert again == [captions[ids[i]] for i in order]


def test_made_captions_vary_and_name_their_class_and_no_other():
    ids = [f"s{i}" for i in range(5000)]
    captions = made_captions(ids, [5] * 5000, CIFAR, 0)
    assert len(set(captions)) > 4000
    named = mentions(captions, CIFAR)
    assert set().union(*named) == {5}
    assert abs(sum(map(bool, named)) / 5000 - NOUN_SHARE) < 0.03
    assert made_captions(ids, [5] * 5000, CIFAR, 1) != captions
    trees = made_captions(ids, [0] * 5000, ["maple_tree", "tree", "field"], 0)
    assert not any("trees" in text or "open field" in text for text in trees)


def test_nouns_are_whole_words_in_singular_and_plural():
    texts = ["two Dogs, running", "a hot dog", "doghouse", "the dog's ball", "hotdogs", "women"]
    named = mentions(texts, ["dog", "hot dog", "ball", "woman", "man"])
    assert named == [{0}, {1}, set(), {0, 2}, set(), {3}]
    forms = {"bus": "buses", "baby": "babies", "boy": "boys", "fish": "fish", "traffic light": "traffic lights"}
    assert {noun: plural(noun) for noun in forms} == forms


def test_captioned_sets_get_noun_classes(tmp_path: Path):
    texts = [["a dog runs", "an animal"], ["a cat sits", "two cats"], ["a dog and a cat", "pets"], ["a sunset", "sky"]]
    texts *= 30
    config = write(tmp_path, {"caption": [t[0] for t in texts], "captions": texts})
    data = open_dataset(config)
    assert data.classes == ["dog", "cat"]
    assert data.train["label"].to_pylist()[:4] == [0, 1, -1, -1]
    assert any("dog 30 + 0" in sentence and "MADE" in sentence for sentence in data.report)
    assert open_dataset(replace(config, classes=("pet", "sunset"))).train["label"].to_pylist()[:4] == [-1, -1, 0, 1]


def test_every_caption_of_a_training_image_can_be_a_pair(tmp_path: Path):
    texts = [["a dog runs", "an animal", "a dog runs", "…"], ["a cat sits", "two cats", "pets"], ["a sunset", "sky"]] * 20
    config = write(tmp_path, {"id": [f"i{k}" for k in range(60)], "caption": [t[0] for t in texts], "captions": texts})
    first = open_dataset(replace(config, classes=("dog", "cat"), heldout=6))
    every = open_dataset(replace(config, classes=("dog", "cat"), heldout=6, captions="every"))
    assert every.heldout.equals(first.heldout)
    pairs = every.train.to_pylist()
    assert {p["id"]: p["caption"] for p in pairs}.items() >= {p["id"]: p["caption"] for p in first.train.to_pylist()}.items()
    wanted = {"a dog runs": 2, "a cat sits": 3, "a sunset": 2}  # different captions with letters
    assert len(pairs) == sum(wanted[caption] for caption in first.train["caption"].to_pylist())
    images = {p["id"].partition("#")[0]: p["row"] for p in pairs}
    assert all(images[p["id"].partition("#")[0]] == p["row"] for p in pairs) and len(images) == first.train.num_rows
    assert sum("one a caption" in sentence for sentence in every.report) == 1
    kept = open_dataset(replace(config, classes=("dog", "cat"), heldout=6, captions="every", size=50))
    assert kept.train.num_rows == 50


@given(st.permutations(["a dog", "a cat", "a dog with a cat", "a man", "two men", "nothing"] * 25))
@settings(max_examples=10, deadline=None)
def test_noun_classes_do_not_depend_on_order(texts):
    classes, labels, counts = noun_labels([[text] for text in texts])
    assert classes == ["man", "dog", "cat"] and counts == {"man": 50, "dog": 25, "cat": 25}
    by_text = dict(zip(texts, labels.tolist(), strict=True))
    assert by_text == {"a dog": 1, "a cat": 2, "a dog with a cat": -1, "a man": 0, "two men": 0, "nothing": -1}


def test_the_fingerprint_follows_the_content_not_the_folder(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        parquet(tmp_path / name, pairs())
    one, two = (open_dataset(Settings(str(tmp_path / name))) for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two) and len(fingerprint(one)) == 16
    assert fingerprint(open_dataset(Settings(str(tmp_path / "one"), size=5))) != fingerprint(one)
    assert fingerprint(replace(one, classes=["dog"])) != fingerprint(one)


def test_the_built_in_scenes(tmp_path: Path):
    config = Settings("scenes", size=12, heldout=14, cache=str(tmp_path), side=32)
    data = open_dataset(config)
    assert data.name == "scenes" and data.train.num_rows == 12 and data.heldout.num_rows == 14
    assert sorted(data.heldout["label"].to_pylist()) == list(range(len(data.classes)))
    assert fingerprint(open_dataset(config)) == fingerprint(data)
