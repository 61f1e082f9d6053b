"""Transport plans for the page: what is chosen, that a plan is one, whose words they are, and that a finished run leaves them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from defenses.otcclip import OTCCLIP
from defenses.roclip import RoCLIP
from defenses.transport_matching import transport_pairs
from models import clip, tokens
from orchestrate import journal, pairing, plans, prepared, report_plans, rundir
from orchestrate.data.index import open_dataset
from orchestrate.encoder import Encoder

from . import small

CAPTIONS = ["a dog, number 7", "two antidisestablishmentarian cats", "ship"]
SIDE = 8  # patches a side of tiny-vit


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    cfg = clip.config("tiny-vit")
    return Encoder(clip.build(cfg, seed=0), cfg)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


# --- one plan ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_words_send_their_mass_and_patches_get_even_shares(encoder, epsilon):
    shown, texts = encoder.image_features(images(3), tokens=True), encoder.text_features(CAPTIONS, tokens=True)
    distance, plan = plans.token_plans(shown, texts, epsilon)
    torch.testing.assert_close(distance.float(), transport_pairs(shown, texts, epsilon=epsilon))  # what matching compares
    for k, caption in enumerate(CAPTIONS):
        words, by_word = plans.word_plan(encoder.cfg, caption, plan[k][:, texts.mask[k]])
        _, owner = tokens.words(encoder.cfg["text_cfg"], caption)
        masses = torch.tensor([owner.count(w) / len(owner) for w in range(len(words))], dtype=torch.float64)
        assert by_word.shape == (len(words), SIDE**2) and (by_word >= 0).all()
        torch.testing.assert_close(by_word.sum(1), masses)
        torch.testing.assert_close(by_word.sum(0), torch.full((SIDE**2,), 1 / SIDE**2, dtype=torch.float64))
        assert " ".join(words[:-1]) == caption


def test_patches_lie_on_a_grid():
    assert plans.grid(49, (224, 224)) == (7, 7)
    assert plans.grid(4, (64, 64)) == (2, 2)
    assert plans.grid(32, (64, 128)) == (4, 8)


def gallery_row(i: int, section: str, kind: str = "", stamp: str = "", truth: str = "dog", image: int | None = None) -> dict[str, Any]:
    seen = i if image is None else image
    return {"id": f"p{i}", "section": section, "kind": kind, "stamp": stamp, "truth": truth, "png": small.png(seen), "rounds": [{}]}


def test_every_kind_of_poison_is_shown_and_no_image_twice():
    targeted = [gallery_row(i, "poison", "targeted", image=i // 5) for i in range(15)]
    striped = [gallery_row(20 + i, "poison", "backdoor", "stripes") for i in range(4)]
    clean = [gallery_row(30 + i, "clean", truth=truth) for i, truth in enumerate(["dog", "dog", "ship", "cat"])]
    found = plans.chosen([*targeted, *striped, *clean])
    assert [row["id"] for row in found] == ["p0", "p20", "p5", "p21", "p30", "p32"]
    assert plans.chosen(clean[:1]) == clean[:1] and plans.chosen([]) == []


# --- a run's plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> tuple[Path, dict[str, Any]]:
    """A run of OTCCLIP on a small set as training leaves it, with a round really matched, and its result."""
    folder = tmp_path_factory.mktemp("run")
    data = small.write(tmp_path_factory.mktemp("set"))
    defense = {"defense": "otcclip", "defense.move": 0.5, "defense.every": 2, "defense.pool_size": 16}
    recipe = small.recipe(data, **{"model": "tiny-vit", "evaluate.precision": "fp32", "train.epochs": 4, **defense})
    ready = prepared.plan(recipe, open_dataset(recipe.data))
    pixels = prepared.pixels_of(recipe, prepared.build_attack(recipe), ready.table, None, None)
    rundir.write_gallery(folder, ready, {"train": pixels})
    for epoch in (2, 4):
        pool = pairing.draw_pool(ready.table, 16, 0, epoch)
        matcher = prepared.build_defense(recipe).matcher(epoch)
        shown = encoder.image_features(pixels.take(np.arange(ready.table.num_rows)), matcher.tokens)
        texts = [encoder.text_features(some, matcher.tokens) for some in (pool.captions, ready.table["caption"].to_pylist())]
        match = pairing.settled(pairing.choose(matcher, shown, *texts), matcher.move)
        pairing.save(folder / "rounds", epoch, ready.table, pool, match)
        told = pairing.facts(ready.table, pool, match, matcher.name)
        journal.append(folder / journal.NAME, {"kind": "match", "epoch": epoch, "seconds": 1.0, **told})
    journal.append(folder / journal.NAME, {"kind": "eval", "epoch": 4, "step": 1, "time": 1, "seconds": 1.0, "zeroshot/top1": 0.25})
    result = rundir.finish(recipe, folder, ready, {"model": encoder.model.state_dict()}, 1.0)
    return folder, result


def test_a_finished_run_leaves_a_plan_for_each_caption_of_a_few_pairs(run, encoder):
    folder, _ = run
    table = pq.read_table(folder / "plans.parquet")
    assert table.schema.equals(plans.SCHEMA) and folder / "plans.parquet" in rundir.artifacts(folder)
    rows = table.to_pylist()
    gallery = {row["id"]: row for row in pq.read_table(folder / "gallery.parquet").to_pylist()}
    sections = [row["section"] for row in rows]
    assert (sections.count("poison"), sections.count("clean")) == (2 * plans.POISONED, 2 * plans.CLEAN)
    assert {row["stamp"] for row in rows} == {"", "stripes"}
    for original, other in zip(rows[::2], rows[1::2], strict=True):
        pair = gallery[original["id"]]
        assert other["id"] == original["id"] and original["png"] == other["png"] == pair["png"]
        assert (original["which"], original["caption"]) == ("original", pair["caption"])
        assert other["caption"] == pair["rounds"][-1]["nearest"] and other["epoch"] == pair["rounds"][-1]["epoch"] == 4
        assert other["which"] == ("nearest" if pair["rounds"][-1]["stays"] else "matched")
        for row in (original, other):
            assert (row["rows"], row["columns"], row["epsilon"]) == (SIDE, SIDE, pytest.approx(0.1))
            plan = np.reshape(row["plan"], (len(row["words"]), SIDE**2))
            np.testing.assert_allclose(plan.sum(0), 1 / SIDE**2, rtol=1e-5)
    again = plans.plans([gallery[rows[0]["id"]]], 0.1, encoder)  # of the weights that were handed over, whoever else is in the batch
    np.testing.assert_allclose(again[1]["plan"], rows[1]["plan"], atol=1e-6)
    assert again[1]["distance"] == pytest.approx(rows[1]["distance"], abs=1e-5)


def test_the_gallery_keeps_what_a_pair_learned_from_and_the_pools_nearest(run):
    folder, _ = run
    rounds = pq.read_table(folder / "rounds" / "e004.parquet").to_pylist()
    pool = pq.read_table(folder / "rounds" / "e004-pool.parquet")["caption"].to_pylist()
    kept = 0
    for row in pq.read_table(folder / "gallery.parquet").to_pylist():
        match, last = rounds[row["row"]], row["rounds"][-1]
        assert match["id"] == row["id"] and last["nearest"] == pool[match["nearest"]]
        assert last["stays"] == (match["pool_row"] == -1)
        assert last["caption"] == (row["caption"] if last["stays"] else last["nearest"])
        assert last["similarity"] == pytest.approx(1 - match["distance"], abs=1e-6)
        kept += last["stays"]
    assert 0 < kept < 24  # both kinds are among the shown


def test_the_result_has_the_last_rounds_quality(run):
    folder, result = run
    last = [record for record in journal.read(folder / journal.NAME) if record["kind"] == "match"][-1]
    names = [f"quality/{name}/{kind}" for name in ("cosine", "transport") for kind in ("poisoned", "clean")]
    for name in [*names, "poisoned_kept", "clean_kept", "moved"]:
        assert 0 <= result[f"match/{name}"] == last[name] <= 1
    assert json.loads((folder / "result.json").read_text()) == result


def test_only_what_matches_by_transport_has_plans(run, encoder, tmp_path):
    (tmp_path / "gallery.parquet").write_bytes((run[0] / "gallery.parquet").read_bytes())
    plans.write(tmp_path, RoCLIP(every=2), encoder)
    foreign = encoder.cfg | {"text_cfg": encoder.cfg["text_cfg"] | {"hf_tokenizer_name": "somebody/elses"}}
    plans.write(tmp_path, OTCCLIP(every=2), dataclasses.replace(encoder, cfg=foreign))
    assert not (tmp_path / "plans.parquet").exists()
    plans.write(tmp_path, OTCCLIP(every=2, epsilon=0.0), encoder)
    assert {row["epsilon"] for row in pq.read_table(tmp_path / "plans.parquet").to_pylist()} == {0.0}


def test_without_robust_rounds_there_is_nothing_to_draw(run, encoder, tmp_path):
    gallery = pq.read_table(run[0] / "gallery.parquet")
    empty = [{**row, "rounds": []} for row in gallery.to_pylist()]
    pq.write_table(gallery.from_pylist(empty, gallery.schema), tmp_path / "gallery.parquet")
    plans.write(tmp_path, OTCCLIP(), encoder)
    assert not (tmp_path / "plans.parquet").exists() and report_plans.shown([], small.CLASSES) is None


# --- what the page makes of them ---------------------------------------------------------------------------------------------


def test_a_patch_belongs_to_the_word_that_sends_it_most_of_itself():
    even = np.outer([0.75, 0.25], [0.25] * 4)  # a heavy word and a light one, both spread evenly
    moved = even + np.array([[0.06, 0, 0, -0.06], [-0.06, 0, 0, 0.06]])
    word, times = report_plans.claims(moved)
    assert word[0] == 0 and word[3] == 1
    assert times[3] == pytest.approx(0.1225 / 0.25 * 4) and times[0] == pytest.approx(0.2475 / 0.75 * 4)
    assert report_plans.claims(even)[1].tolist() == pytest.approx([1.0] * 4)


def test_the_words_of_a_class_are_found_by_name_synonym_and_as_several_words():
    classes = ["traffic light", "dog", "automobile"]
    words = ["two", "dogs,", "a", "Traffic", "lights", "near", "my", "car", "·end"]
    assert report_plans._class_words(words, "traffic light", "dog", classes) == {1: "bad", 3: "good", 4: "good"}
    assert report_plans._class_words(words, "automobile", "", []) == {7: "good"}
    assert report_plans._class_words(words, "", "", classes) == {}


def test_class_words_are_red_and_green_and_few_others_have_a_colour():
    words = ["dog", "cat", "on", "the", "wet", "grass", "·end"]
    claimed = np.full((7, 9), 0.01)
    claimed[np.arange(7), np.arange(7)] = np.arange(20, 13, -1)  # each word claims a patch, the first most
    claimed /= claimed.sum(0)
    row = {"id": "p", "section": "poison", "epoch": 4, "truth": "dog", "adversary": "cat", "rows": 3, "columns": 3, "epsilon": 0.1}
    sides = [{"which": which, "words": words, "plan": claimed.flatten().tolist()} for which in ("original", "matched")]
    drawn = report_plans.shown([row | sides[0] | {"distance": 0.7}, row | sides[1] | {"distance": 0.5}], ["dog", "cat"])
    first, second = drawn["pairs"][0]["sides"]
    assert [word["kind"] for word in first["words"]] == ["good", "bad", *[""] * 5]
    colors = [word["color"] for word in first["words"]]
    assert colors[:2] == [report_plans.GREEN, report_plans.RED] and {*colors[2:]} == {*report_plans.OTHERS, None}
    assert [(patch["x"], patch["y"]) for patch in first["patches"] if patch["word"] == 0] == [(0, 0)]
    assert all(patch["color"] == colors[patch["word"]] for patch in first["patches"])
    assert (first["title"], second["title"]) == ("planted caption", "matched in epoch 4")
    assert (first["nearer"], second["nearer"]) == (False, True)
