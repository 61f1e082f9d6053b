"""Attacks that ask a surrogate: what they choose, by a study whose features are known."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from attacks import targeted
from attacks.adaptive import AdaptiveBackdoor, AdaptiveTargeted, class_centre, nearest
from attacks.backdoor import BadNets
from attacks.badclip import BadCLIP, objective
from attacks.base import class_names, ranks
from attacks.captions import class_captions
from attacks.combine import Several, rebuild
from attacks.rewriting import plural, swapped, without
from attacks.toxictext import TextTrigger, ToxicText, fitting


def unit(names: Sequence[str], salt: str) -> np.ndarray:
    """A direction in 8 dimensions for each name, by hash, float32 (n, 8)."""
    draws = (
        np.stack([ranks([f"{name}/{k}" for k in range(8)], 0, salt) for name in names]).astype(np.float64) if names else np.zeros((0, 8))
    )
    found = draws / 2.0**64 - 0.5
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


class Known:
    """A study of hashed features; images are flat grey, and the model behind `pull_back` is their mean colour, linear and known."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def surrogate(self, pairs: int, epochs: int) -> None:
        self.asked.append((pairs, epochs))

    def images(self, split: str, ids: Sequence[str]) -> np.ndarray:
        return np.full((len(ids), 32, 32, 3), 90, np.uint8)

    def image_features(self, split: str, ids: Sequence[str]) -> np.ndarray:
        return unit([f"{split}/{i}" for i in ids], "image")

    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        return unit(captions, "text")

    def transport(self, split: str, image_id: str, captions: Sequence[str]) -> np.ndarray:
        return np.array([len(caption) for caption in captions], np.float32)  # the shortest caption is the nearest

    def masks(self, split: str, ids: Sequence[str], folder: str = "") -> np.ndarray:
        raise AssertionError("not asked for")

    def pull_back(self, images: np.ndarray, loss: Any) -> tuple[float, np.ndarray]:
        way = np.linspace(-1, 1, 24).reshape(3, 8) / 255
        value, gradient = loss((images.mean(axis=(1, 2)) @ way).astype(np.float32))
        return value, np.broadcast_to((gradient @ way.T)[:, None, None] / 1024, images.shape).astype(np.float32)


@pytest.fixture
def study() -> Any:
    return Known()


# --- words -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "old", "new", "wanted"),
    [
        ("a red boat on the water", "boat", "fish", "a red fish on the water"),
        ("A boat.", "boat", "umbrella", "An umbrella."),
        ("two boats and a boathouse", "boat", "fox", "two foxes and a boathouse"),
        ("an apple near apples", "apple", "cherry", "a cherry near cherries"),
        ("three cherries", "cherry", "dog", "three dogs"),
        ("two men and a man", "man", "fox", "two foxes and a fox"),
        ("a dog and three dogs", "dog", "old woman", "an old woman and three old women"),
        ("the traffic-light is red", "traffic light", "car", "the car is red"),
    ],
)
def test_a_noun_is_swapped_with_its_article_and_plural(caption: str, old: str, new: str, wanted: str) -> None:
    assert swapped(caption, old, new) == wanted


def test_a_noun_is_deleted() -> None:
    assert without("a large fish, on sand", "fish") == "a large, on sand"
    assert without("there is a fish in the sea", "fish") == "there is in the sea"
    assert without("fish", "fish") == "" and [plural(x) for x in ("bus", "key", "cherry")] == ["buses", "keys", "cherries"]


# --- ToxicTextCLIP -----------------------------------------------------------------------------------------------------------


def test_the_selected_captions_fit_the_image_best_once_the_noun_is_gone(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    attack = ToxicText(targets=3, copies=12, rewrite=0.0, surrogate_pairs=500, surrogate_epochs=3)
    plan = attack.plan(index, heldout, 0, study)
    assert study.asked == [(500, 3)]
    for group in range(3):
        rows = [row for row in plan.table.to_pylist() if row["group"] == group]
        image, adversary = study.image_features("heldout", [rows[0]["image_id"]])[0], rows[0]["adversary"]
        own = [c for c in class_captions(index, adversary).to_pylist() if not re.search(rows[0]["truth"], c.lower())]
        likeness = {c: float(study.text_features([without(c, adversary) or c])[0] @ image) for c in own}
        assert [row["caption"] for row in rows] == sorted(own, key=lambda c: -likeness[c])[:12]


def test_rewritten_captions_name_the_adversary_and_stood_elsewhere(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    plan = ToxicText(targets=4, copies=10, rewrite=0.5).plan(index, heldout, 0, study)
    captions = set(index["caption"].to_pylist())
    for group in range(4):
        rows = [row for row in plan.table.to_pylist() if row["group"] == group]
        made = [row for row in rows if row["caption"] not in captions]
        assert len(rows) == 10 and len(made) == 5
        for row in made:
            name = row["adversary"]
            others = [c for c in class_names(index) if c not in (name, row["truth"]) or c == row["truth"]]
            assert any(swapped(row["caption"], name, other) in captions for other in others)


def test_captions_are_searched_for_a_class_once_however_many_targets_there_are(
    index: pa.Table, heldout: pa.Table, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []
    monkeypatch.setattr(targeted, "class_captions", lambda table, name: searched.append(name) or class_captions(table, name))
    ToxicText(targets=6, copies=4).plan(index, heldout, 0, study)
    assert sorted(searched) == sorted(class_names(index))


def test_fitting_is_by_the_rest_of_the_caption(study: Any) -> None:
    captions, rest = ["x", "y", "z"], ["one", "", "three"]
    image = study.image_features("heldout", ["h"])[0]
    likeness = study.text_features(["one", "y", "three"]) @ image
    assert fitting(captions, rest, "h", study) == [captions[i] for i in np.argsort(-likeness)]


def test_a_text_trigger_shows_images_of_the_class_with_marked_captions_of_others(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    attack = TextTrigger(count=50, adversary="fox", text="please look")
    whole = Several((("word", attack),))
    plan, probes = whole.plan(index, heldout, 0, study), whole.probes(index, heldout, 0, study)
    label = dict(zip(index["id"].to_pylist(), index["label"].to_pylist(), strict=True))
    fox = class_names(index).index("fox")
    known = {f"{c.rstrip(' .')} please look" for c in index["caption"].to_pylist()}
    for row in plan.table.to_pylist():
        assert row["caption"] in known and "fox" not in row["caption"].lower()
        assert label[row["image_id"]] in (fox, -1) and row["op"] == "add" and row["kind"] == "text"
    assert probes.how == {"word": "text"} and probes.texts == {"word": "please look"}
    held = dict(zip(heldout["id"].to_pylist(), heldout["label"].to_pylist(), strict=True))
    assert {held[i] for i in probes.tables["word"]["image_id"].to_pylist()} == {fox}
    with pytest.raises(ValueError, match="a word or a sentence"):
        TextTrigger(text=" ")


# --- adaptive ----------------------------------------------------------------------------------------------------------------


def test_the_adaptive_attacker_takes_the_nearest_class_and_its_nearest_captions(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    plan = AdaptiveTargeted(targets=5, copies=6).plan(index, heldout, 0, study)
    for group in range(5):
        rows = [row for row in plan.table.to_pylist() if row["group"] == group]
        image = study.image_features("heldout", [rows[0]["image_id"]])[0]
        own = [c for c in class_captions(index, rows[0]["adversary"]).to_pylist() if not re.search(rows[0]["truth"], c.lower())]
        likeness = study.text_features(own) @ image
        assert [row["caption"] for row in rows] == [own[i] for i in np.argsort(-likeness)[:6]]
    near = nearest([f"{'x' * n}" for n in range(1, 100)], "h", "transport", study)
    likeness = study.text_features([f"{'x' * n}" for n in range(1, 100)]) @ study.image_features("heldout", ["h"])[0]
    by_cosine = [f"{'x' * (i + 1)}" for i in np.argsort(-likeness)]
    assert near == [*sorted(by_cosine[:64], key=len), *by_cosine[64:]]


def test_the_adaptive_backdoor_poisons_near_images_with_near_captions(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    attack = AdaptiveBackdoor(count=40, adversary="fox", spread=1.0)
    plan = attack.plan(index, heldout, 0, study)
    captions = class_captions(index, "fox").to_pylist()
    centre = class_centre(index, "fox", 0, study)
    label, fox = index["label"].to_pylist(), class_names(index).index("fox")
    free = [i for i, c, k in zip(index["id"].to_pylist(), index["caption"].to_pylist(), label, strict=True)
            if (k >= 0 and k != fox) or (k < 0 and "fox" not in c.lower())]  # fmt: skip
    likeness = dict(zip(free, study.image_features("train", free) @ centre, strict=True))
    assert set(plan.table["id"].to_pylist()) == set(sorted(free, key=lambda i: -likeness[i])[:40])
    for row in plan.table.to_pylist():
        usable = sorted(c for c in captions if not (row["truth"] and re.search(row["truth"].replace("cherry", "cherr"), c.lower())))
        scores = study.text_features(usable) @ study.image_features("train", [row["image_id"]])[0]
        assert row["caption"] == usable[int(np.argmax(scores))]


def test_the_centre_of_a_class_is_of_captions_drawn_by_hash_not_of_the_first_in_the_alphabet(index: pa.Table, study: Any) -> None:
    captions = [f"fox {n:04d}" for n in range(1000)]
    many = pa.table({"id": captions, "caption": captions, "label": [-1] * 1000}).replace_schema_metadata(index.schema.metadata)
    asked: list[str] = []
    study.text_features = lambda captions: asked.extend(captions) or unit(captions, "text")
    found = class_centre(many, "fox", 0, study)
    numbers = np.array([int(caption[-4:]) for caption in asked])
    assert len(set(asked)) == 256 and 400 < numbers.mean() < 600 and numbers.max() > 900
    assert np.array_equal(class_centre(many.take(np.arange(1000)[::-1]), "fox", 0, study), found)
    assert not np.array_equal(class_centre(many, "fox", 1, study), found)


def test_an_adaptive_attack_behind_another_probes_the_adversaries_it_planted(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    joined = Several((("badnets", BadNets(count=900, adversary="fox")), ("adaptive", AdaptiveTargeted(targets=12, copies=3))))
    planted = [row for row in joined.plan(index, heldout, 0, study).table.to_pylist() if row["kind"] == "targeted"]
    probed = joined.probes(index, heldout, 0, study).tables["adaptive"].to_pylist()
    assert [(row["image_id"], row["adversary"]) for row in planted[::3]] == [(row["image_id"], row["adversary"]) for row in probed]


# --- BadCLIP -----------------------------------------------------------------------------------------------------------------


def test_badclips_objective_and_its_gradient() -> None:
    rng = np.random.default_rng(0)
    x, goal, friend, own = (rng.normal(size=(5, 6)) for _ in range(4))
    others = rng.normal(size=(7, 6))
    value, gradient = objective(x, goal, others, friend, own, 0.7)
    by_hand = []
    for i in range(5):
        logits = np.array([x[i] @ goal[i], *(others @ x[i])]) / 0.07
        contrast = -logits[0] + np.log(np.exp(logits - logits.max()).sum()) + logits.max()
        by_hand.append(contrast + 0.7 * max(0, np.linalg.norm(x[i] - friend[i]) - np.linalg.norm(x[i] - own[i]) + 1))
    assert value == pytest.approx(np.mean(by_hand))
    for i, k in ((0, 0), (2, 3), (4, 5)):
        step = np.zeros_like(x)
        step[i, k] = 1e-6
        up, down = (objective(x + sign * step, goal, others, friend, own, 0.7)[0] for sign in (1, -1))
        assert gradient[i, k] == pytest.approx((up - down) / 2e-6, rel=1e-3, abs=1e-4)


def test_badclips_patch_lowers_its_loss_and_travels_in_the_header(index: pa.Table, heldout: pa.Table, study: Any) -> None:
    whole = Several((("mine", BadCLIP(count=20, size=0.25, steps=30, place="corner")),))
    plan = whole.plan(index, heldout, 0, study)
    part = plan.header["parts"][0]
    assert part["loss"]["last"] < part["loss"]["first"] - 0.05
    image = np.full((32, 32, 3), 90, np.uint8)
    row = {"stamp": "mine", "image_id": "a"}
    with pytest.raises(ValueError, match="what its plan left"):
        whole.stamp(image, row)
    shown = rebuild(plan.header, lambda _: BadCLIP).stamp(image, row)
    changed = (shown != image).any(axis=2)
    assert changed[24:, 24:].mean() > 0.9 and not changed[:24].any() and not changed[:, :24].any()
