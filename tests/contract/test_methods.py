"""One contract, every registered method: attacks and defences of `plugins.BUILT_IN` through the same table of settings.

A new method passes by being registered; what it needs to show itself (options small enough for these tables) goes into SETTINGS.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from attacks.apply import apply
from attacks.base import MANIFEST_SCHEMA, PROBE_SCHEMA, Manifest, studied
from attacks.combine import Several, rebuild
from attacks.materials import materials
from defenses.base import Batch, ClipOutput, Defense, Features, clip_loss
from defenses.hint import Images
from orchestrate import plugins
from orchestrate.data.index import Dataset
from orchestrate.recipe import from_dict, resolve
from orchestrate.study import SetStudy

QUICK = {"surrogate_pairs": 128, "surrogate_epochs": 1}  # one step: a contract asks for a plan, not for a good one

# Each method at its defaults, and with every option moved that changes what it does. {} is "nothing to add".
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "targeted": [{"targets": 6, "copies": 5}, {"targets": 4, "copies": 0.02, "captions": "templates", "adversary": "ship"}],
    "badnets": [{"count": 40}, {"count": 0.1, "size": 0.3, "place": "random", "adversary": "cat", "captions": "templates"}],
    "stripes": [{"count": 40}, {"count": 0.1, "size": 0.5, "place": "center"}],
    "blended": [{"count": 40}, {"count": 40, "alpha": 0.6}, *({"count": 40, "pattern": p} for p in ("stripes", "triangles", "text"))],
    "sig": [{"count": 40}, {"count": 40, "delta": 20.0, "frequency": 9}],
    "wanet": [{"count": 40}, {"count": 40, "k": 6, "strength": 4.0, "draw": 2}],
    "tint": [{"count": 40}, {"count": 40, "colour": "sepia", "strength": 1.0}],
    "consistent": [{"count": 30}, {"count": 0.05, "place": "random", "size": 0.4, "adversary": "frog"}],
    "mm_poison": [
        {"count": 40},
        {"count": 0.05, "variant": "I", "adversary": "cat", "shown": "ship"},
        {"count": 60, "variant": "III", "adversary": "frog"},
    ],
    "corruptencoder": [{"count": 40}, {"count": 0.05, "support": 0.5, "alpha": 0.0, "references": 2, "adversary": "frog", "size": 0.3}],
    "toxictext": [{"targets": 4, "copies": 6, **QUICK}, {"targets": 4, "copies": 6, "rewrite": 0.0, "captions": "templates", **QUICK}],
    "texttrigger": [{"count": 30, **QUICK}, {"count": 0.05, "text": "as we can see here", "fit": False, "adversary": "cat"}],
    "badclip": [{"count": 30, "steps": 2, **QUICK}, {"count": 30, "steps": 1, "weight": 0.0, "place": "random", "size": 0.3, **QUICK}],
    "adaptive": [{"targets": 4, "copies": 5, **QUICK}, {"targets": 3, "copies": 4, "match": "transport", "spread": 2.0, **QUICK}],
    "adaptive_backdoor": [{"count": 30, **QUICK}, {"count": 30, "captions": "templates", "adversary": "dog", **QUICK}],
    "multi": [{"count": 42}, {"count": 40, "triggers": ["sig", "wanet"]}],
    "clip": [{}],
    "augmented": [
        {},
        {"image_augment": False},
        {"text_augment": False},
        {"crop": 1.0, "flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "eda": 0.0},
    ],
    "roclip": [
        {},
        {"every": 1, "pool_size": 8, "matched": "caption"},
        {"every": 3, "warmup": 4, "pool_size": 0.5},
        {"every": 1, "matched": "caption", "move": 0.2, "look": 6.0},
    ],
    "otcclip": [
        {},
        {"every": 1, "pool_size": 8, "epsilon": 0.0, "weight": 0.0, "negatives": 0, "beta": 0.0, "align": "always"},
        {"local": 0.2},
        {"every": 3, "matched": "embedding", "alpha": 0.0, "beta": 0.0, "approximate": 4},
        {"every": 1, "move": 0.3, "look": 2.0},
    ],
    "safeclip": [
        {},
        {"local": 0.2, "warmup": 1, "bridge": 2, "slow": 0.1, "pool_size": 8, "posterior": 0.5, "least": 0.1, "growth": 0.05, "most": 0.5},
    ],
    "hint": [{}, {"where": "features", "steps": 2, "step": 0.5, "feature_bound": 0.1, "share": 1.0, "damping": 0.0, "penalty": 0.1}],
    "cleanclip": [{}, {"clean": 20, "epochs": 2, "batch": 4, "lr": 1e-3, "warmup": 0, "cross": 0.5, "inner": 2.0}],
}
ATTACKS = [(name, options) for name in plugins.BUILT_IN["attack"] for options in SETTINGS.get(name, [{}])]
DEFENSES = [(name, options) for name in plugins.BUILT_IN["defense"] for options in SETTINGS.get(name, [{}])]
METHODS = [(kind, name) for kind, table in plugins.BUILT_IN.items() for name in table]
EPOCHS = range(1, 9)
CLASSES = ["dog", "cat", "ship", "truck", "frog"]
WORDS = ("a {} on the left", "the big {}", "two {}s in the snow", "{}", "an old photo of a {} near the river")


def named(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}{json.dumps(case[1])}"


def table(split: str, rows: int) -> pa.Table:
    rng = np.random.default_rng(len(split))
    label = rng.integers(len(CLASSES), size=rows)
    columns = {
        "id": [f"{split}{i:04d}" for i in range(rows)],
        "path": [f"{split}.parquet"] * rows,
        "where": ["parquet:image"] * rows,
        "row": pa.array(range(rows), pa.int64()),
        "size": pa.array([9] * rows, pa.int64()),
        "caption": [WORDS[i % len(WORDS)].format(CLASSES[k]) for i, k in enumerate(label)],
        "label": pa.array(np.where(np.arange(rows) % 9 == 0, -1, label), pa.int32()),
    }
    return pa.table(columns).replace_schema_metadata({"classes": json.dumps(CLASSES)})


TRAIN, HELDOUT = table("train", 400), table("heldout", 90)
CAPTION_OF = dict(zip(TRAIN["id"].to_pylist(), TRAIN["caption"].to_pylist(), strict=True))
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)


# --- both kinds --------------------------------------------------------------------------------------------------------------


def test_the_settings_name_registered_methods_only():
    assert set(SETTINGS) <= {name for _, name in METHODS}


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_is_one_frozen_dataclass_of_plain_fields(kind, name):
    cls = plugins.load(kind, name)
    assert cls.__dataclass_params__.frozen
    one = cls()
    assert one == cls() and hash(one) == hash(cls())
    tree = json.loads(json.dumps(dataclasses.asdict(one), allow_nan=False))
    assert cls(**tree) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, next(iter(tree), "anything"), 1)


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_its_docstring_is_its_card(kind, name):
    """One line, where it comes from, what it assumes, its cost and its limits, and every option by name (inherited ones: in a base's)."""
    cls = plugins.load(kind, name)
    own = inspect.cleandoc(cls.__doc__)
    written = [base.__doc__ for base in cls.__mro__[:-1] if not base.__doc__.startswith(f"{base.__name__}(")]  # not made by dataclass
    cards = "\n".join(map(inspect.cleandoc, written))
    assert re.match(r"[A-Z].*\.\n\n", own), "a card begins with one line, then a blank one"
    assert re.search(r"^(Paper|Source): ", own, re.M)
    assert re.search(r"^(Threat model|Assumes)\b", own, re.M)
    assert re.search(r"^(Cost|Threat model, cost)\b", own, re.M)
    assert re.search(r"^Limits: ", own, re.M)
    for field in dataclasses.fields(cls):
        described = re.search(rf"^ *(\w+, )*`?{field.name}`?(, \w+)*: |`{field.name}`", cards, re.M)
        assert described, f"{name}: no word on `{field.name}`"


@pytest.mark.parametrize(
    ("kind", "case"),
    [("attack", c) for c in ATTACKS] + [("defense", c) for c in DEFENSES],
    ids=lambda c: c if isinstance(c, str) else named(c),
)
def test_a_recipe_carries_it_to_disk_and_back(kind, case):
    name, options = case
    recipe = resolve("run", [("test", {kind: name, **{f"{kind}.{k}": v for k, v in options.items()}})]).recipe
    assert getattr(recipe, kind).parts[0][1] == plugins.load(kind, name)(**options)
    assert from_dict(json.loads(json.dumps(recipe.as_dict()))).recipe == recipe


# --- attacks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ATTACKS, ids=named)
def attack(request: pytest.FixtureRequest) -> Any:
    name, options = request.param
    return plugins.load("attack", name)(**options)


def pictures(rows: pa.Table) -> np.ndarray:
    """A bright square on a dim noise, both by the row's id: something to cut out."""
    out = np.zeros((rows.num_rows, 48, 48, 3), np.uint8)
    for picture, name in zip(out, rows["id"].to_pylist(), strict=True):
        rng = np.random.default_rng(list(name.encode()))
        top, left = rng.integers(6, 20, 2)
        picture[:] = rng.integers(0, 60, picture.shape)
        picture[top : top + 20, left : left + 20] = rng.integers(120, 256, 3)
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SetStudy:
    """A real study of these tables, surrogate and all."""
    options = {"data": "nowhere", "data.side": 48, "data.cache": str(tmp_path_factory.mktemp("cache"))}
    dataset = Dataset("tables", TRAIN, HELDOUT, CLASSES, ("a photo of a {}",))
    return SetStudy(resolve("run", [("test", options)]).recipe, dataset, pictures)


@pytest.fixture
def planned(attack: Any, study: SetStudy) -> Any:
    """Its plan, by index and seed."""
    return lambda index=TRAIN, seed=3: attack.plan(index, HELDOUT, seed, *studied(attack, study))


def stamped(attack: Any, manifest: Manifest) -> list[bytes]:
    return [attack.stamp(IMAGE.copy(), row).tobytes() for row in manifest.table.to_pylist()]


def test_the_same_plan_is_made_again_and_replays_from_its_file(attack, study, tmp_path: Path):
    whole = Several((("part", attack),))
    plans = [whole.plan(TRAIN, HELDOUT, 3, study) for _ in range(2)]
    for i, plan in enumerate(plans):
        plan.write(str(tmp_path / f"{i}.parquet"))
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()
    read = Manifest.read(str(tmp_path / "0.parquet"))
    assert read.table.equals(plans[0].table) and read.header == json.loads(json.dumps(plans[0].header))
    again = rebuild(read.header, lambda _: type(attack))
    assert again == whole
    assert stamped(again, read) == stamped(Several(whole.parts, materials(plans[0].header)), plans[0])
    assert apply(TRAIN, HELDOUT, read).equals(apply(TRAIN, HELDOUT, plans[0]), check_metadata=True)


def test_the_plan_does_not_depend_on_the_order_of_rows(planned):
    order = pa.array(np.random.default_rng(0).permutation(TRAIN.num_rows))
    names = ["id", "image_id", "caption", "adversary"]
    plans = [planned(index).table.select(names).sort_by([("id", "ascending")]) for index in (TRAIN, TRAIN.take(order))]
    assert plans[0].equals(plans[1])


def test_another_seed_is_another_plan(planned):
    assert not planned(seed=3).table.equals(planned(seed=4).table)


def test_the_plan_poisons_what_it_says(planned, attack):
    plan = planned()
    assert plan.table.schema.equals(MANIFEST_SCHEMA) and plan.count == plan.header["count"] > 0
    done = apply(TRAIN, HELDOUT, plan)
    assert plan.rate == pytest.approx(plan.count / done.num_rows)
    assert sum(done["poison"].to_pylist()) == plan.count
    for row in plan.table.to_pylist():
        assert row["adversary"] in CLASSES
        if row["kind"] == "text":  # the image is of the class, the caption of another one, and its end asks for the class
            assert row["truth"] == row["adversary"] not in row["caption"] and row["caption"].endswith(f" {attack.text}")
            continue
        assert row["adversary"] in row["caption"].lower()  # the caption says what the attacker wants to be seen
        if row["truth"] == row["adversary"]:  # a label-consistent attack: the caption is the pair's own; or a composite with the object
            assert row["op"] == "add" or (row["image_id"] == row["id"] and row["caption"] == CAPTION_OF[row["id"]])
        else:
            assert not row["truth"] or not re.search(rf"\b{row['truth']}s?\b", row["caption"])


def test_the_stamp_is_pure_and_only_where_it_is_asked_for(attack, study):
    whole = Several((("part", attack),))
    plan = whole.plan(TRAIN, HELDOUT, 3, study)
    whole = rebuild(plan.header, lambda _: type(attack))
    probes = whole.probes(TRAIN, HELDOUT, 3, study)
    rows = plan.table.to_pylist() + [row for t in probes.tables.values() for row in t.to_pylist()]
    for row in rows[:60]:
        image = IMAGE.copy()
        image.setflags(write=False)
        shown = whole.stamp(image, row)
        assert shown.dtype == np.uint8 and shown.shape == IMAGE.shape
        assert np.array_equal(shown, whole.stamp(IMAGE.copy(), {"stamp": row["stamp"], "image_id": row["image_id"]}))
        assert np.array_equal(shown, IMAGE) == (row["stamp"] == "")


def test_there_is_something_to_measure_and_no_triggered_image_was_trained_on(attack, study, planned):
    probes = attack.probes(TRAIN, HELDOUT, 3, *studied(attack, study))
    plan = planned().table
    assert probes.tables and probes.tables.keys() == probes.how.keys()
    for name, found in probes.tables.items():
        assert found.num_rows > 0 and found.schema.equals(PROBE_SCHEMA)
        assert probes.how[name] in ("targeted", "backdoor", "retrieval", "text")
        assert (name in probes.texts) == (probes.how[name] == "text")
        assert set(found["adversary"].to_pylist()) <= set(plan["adversary"].to_pylist())
        assert set(found["image_split"].to_pylist()) == {"heldout"}
        assert set(found["image_id"].to_pylist()) <= set(HELDOUT["id"].to_pylist())
        if probes.how[name] == "backdoor":
            assert not set(found["image_id"].to_pylist()) & set(plan["image_id"].to_pylist())
        label = dict(zip(HELDOUT["id"].to_pylist(), HELDOUT["label"].to_pylist(), strict=True))
        for row in found.to_pylist():
            assert row["truth"] == CLASSES[label[row["image_id"]]]
            assert (row["truth"] == row["adversary"]) == (probes.how[name] == "text")
            assert bool(row["stamp"]) == (probes.how[name] == "backdoor")


def test_what_studies_says_so_when_there_is_no_study(attack):
    if getattr(attack, "studies", False):
        with pytest.raises(ValueError, match="plan it with a study"):
            Several((("part", attack),)).plan(TRAIN, HELDOUT, 3)


# --- defences ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=DEFENSES, ids=named)
def defense(request: pytest.FixtureRequest) -> Defense:
    name, options = request.param
    return plugins.load("defense", name)(**options)


def features(rows: int, seed: int, tokens: bool) -> Features:
    draw = torch.Generator().manual_seed(seed)
    pooled = F.normalize(torch.randn(rows, 12, generator=draw), dim=1)
    if not tokens:
        return Features(pooled)
    mask = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=draw)
    return Features(pooled, F.normalize(torch.randn(rows, 5, 12, generator=draw), dim=2) * mask[:, :, None], mask)


def rows(some: Features, start: int, stop: int) -> Features:
    return Features(*(None if x is None else x[start:stop] for x in some))


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_matcher_says_what_the_actors_must_know_and_matches(defense, epoch):
    matcher = defense.matcher(epoch)
    assert matcher == defense.matcher(epoch)  # every worker and actor asks for itself
    if matcher is None:
        return
    assert dataclasses.is_dataclass(matcher) and matcher.__dataclass_params__.frozen
    assert matcher.matched in ("embedding", "caption") and isinstance(matcher.tokens, bool)
    assert 0 < matcher.move <= 1 and matcher.look >= 0
    assert not (matcher.move < 1 and matcher.matched == "embedding")  # a caption that stays has no feature in the pool
    assert 0 < matcher.pool_size < 1 if isinstance(matcher.pool_size, float) else matcher.pool_size >= 2
    images, pool = features(17, epoch, matcher.tokens), features(6, 100 + epoch, matcher.tokens)
    own = features(17, 200 + epoch, matcher.tokens) if matcher.move < 1 else None
    match = matcher.match(images, pool, own)
    assert match.index.shape == (17,) and match.index.dtype == torch.int64
    assert match.distance.shape == (17,) and match.distance.dtype == torch.float32 and match.distance.isfinite().all()
    assert ((match.index >= 0) & (match.index < 6)).all()
    assert (match.nearer is not None) == (match.own_distance is not None) == (matcher.move < 1)
    part = matcher.match(rows(images, 5, 9), pool, own and rows(own, 5, 9))
    assert torch.equal(part.index, match.index[5:9])  # an item of work may be cut anywhere
    torch.testing.assert_close(part.distance, match.distance[5:9])
    if matcher.move < 1:
        assert match.nearer.shape == (17,) and torch.equal(part.nearer, match.nearer[5:9])
        assert match.own_distance.shape == (17,) and match.own_distance.isfinite().all()
    assert matcher.name and matcher.name not in matcher.beside  # these are names of columns
    for name, other in matcher.beside.items():
        assert other.name == name and other.move == 1 and not (other.tokens and not matcher.tokens)
        tried = other.match(images, pool).index  # on the very features the matcher asked for
        assert tried.shape == (17,) and ((tried >= 0) & (tried < 6)).all()


def test_a_defence_with_a_matcher_uses_it_within_eight_epochs(defense):
    """So that the test above has something to test, and a plain defence is one that says so in its class. The same of a selector."""
    for name in ("matcher", "selector"):
        used = [epoch for epoch in EPOCHS if getattr(defense, name)(epoch)]
        assert bool(used) == (getattr(type(defense), name) is not getattr(Defense, name))


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_selector_splits_the_pairs_and_says_what_it_kept(defense, epoch):
    selector = defense.selector(epoch)
    assert selector == defense.selector(epoch) and not (selector and defense.matcher(epoch))
    assert (epoch in defense.rounds(8)) == bool(selector or defense.matcher(epoch))
    if selector is None:
        return
    assert dataclasses.is_dataclass(selector) and selector.__dataclass_params__.frozen
    cosine = np.random.default_rng(epoch).normal(0.3, 0.1, 50).astype(np.float32)
    for before in (None, 0.3):
        found = selector.split(cosine, before)
        assert found.safe.shape == found.posterior.shape == (50,) and found.safe.dtype == bool
        assert found.share == found.safe.mean() and 0 < found.safe.sum() < 50
        assert cosine[found.safe].min() >= cosine[~found.safe].max()


def batch(keys: np.ndarray, side: int = 24) -> Batch:
    images = torch.rand(len(keys), 3, side, side, generator=torch.Generator().manual_seed(1))
    return Batch(images, [WORDS[i % len(WORDS)].format("dog") for i in range(len(keys))], keys)


KEYS = np.random.default_rng(5).integers(0, 2**63, 12).astype(np.uint64)


def test_augmentation_keeps_shape_type_and_range(defense):
    before = batch(KEYS)
    images = before.images.clone()
    after = defense.augment(before)
    assert after.images.shape == before.images.shape and after.images.dtype == torch.float32
    assert after.images.min() >= 0 and after.images.max() <= 1
    assert len(after.captions) == 12 and all(caption.strip() for caption in after.captions)
    assert np.array_equal(after.keys, KEYS)
    assert torch.equal(before.images, images)  # hooks return, they do not mutate


def test_augmentation_depends_on_the_keys_alone(defense):
    """Not on the batch a sample lands in, its place there, or anybody's random state: that is what makes runs repeatable."""
    whole = batch(KEYS)
    torch.manual_seed(0)
    first = defense.augment(whole)
    torch.manual_seed(99)
    order = np.random.default_rng(1).permutation(12)[:7]
    part = defense.augment(Batch(whole.images[order], [whole.captions[i] for i in order], KEYS[order]))
    torch.testing.assert_close(part.images, first.images[order], rtol=0, atol=1e-5)
    assert part.captions == [first.captions[i] for i in order]


def test_a_repair_is_a_stage_with_a_method_of_its_own(defense):
    plan = defense.repair()
    assert (plan is not None) == (type(defense).repair is not Defense.repair)
    if plan is None:
        return
    assert plan.epochs >= 1 and plan.batch >= 2 and plan.lr > 0 and plan.clean > 0
    assert not plan.method.rounds(8)  # no actors work in that stage
    image, text, other = (F.normalize(torch.randn(8, 12, generator=torch.Generator().manual_seed(i)), dim=1) for i in range(3))
    image.requires_grad_()
    loss = plan.method.loss(ClipOutput(image, text, torch.tensor(9.0), image_b=other, text_b=text), clip_loss)
    loss.backward()
    assert loss.isfinite() and image.grad.any()


def test_a_hardener_changes_examples_and_keeps_their_shape(defense):
    hardener = defense.hardener()
    assert (hardener is not None) == (type(defense).hardener is not Defense.hardener)
    if hardener is None:
        return
    draw = torch.Generator().manual_seed(0)
    pixels, way = torch.rand(20, 3, 4, 4, generator=draw), torch.randn(48, 5, generator=draw)
    features = lambda some: F.normalize(some.flatten(1) @ way, dim=1)
    x, y = features(pixels), torch.arange(20) % 3
    assert hardener.where in ("pixels", "features")
    images = Images(pixels, features) if hardener.where == "pixels" else None
    changed = hardener.harden(x, y, x[:6].clone(), y[:6], 3, images)
    assert changed.shape == x.shape and changed.isfinite().all() and not torch.allclose(changed.float(), x)
    assert torch.equal(x, features(pixels))


@pytest.mark.parametrize("robust", [False, True])
def test_the_loss_is_a_finite_number_with_a_gradient(defense, robust):
    draw = torch.Generator().manual_seed(0)
    image, text = (torch.randn(8, 12, generator=draw, requires_grad=True) for _ in range(2))
    scale = torch.tensor(14.0, requires_grad=True)
    more: dict[str, Any] = {}
    if defense.view_count == 2:
        other = torch.randn(8, 12, generator=draw)
        more = {"image_b": F.normalize(image + other, dim=1), "text_b": F.normalize(text + other, dim=1)}
    if defense.needs_tokens:
        tokens = features(8, 3, True), features(8, 4, True)
        more |= {"image_tokens": tokens[0].tokens, "text_tokens": tokens[1].tokens, "text_mask": tokens[1].mask}
        if defense.view_count == 2:
            other = features(8, 3, True), features(8, 5, True)
            more |= {"image_tokens_b": other[0].tokens, "text_tokens_b": other[1].tokens, "text_mask_b": other[1].mask}
    out = ClipOutput(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, robust=robust, **more)
    loss = defense.loss(out, clip_loss)
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    for leaf in (image, text, scale):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()
