"""Every figure by hand or by brute force on known vectors, then one small real model through the whole."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.base import PROBE_SCHEMA, Probes
from defenses.augment import blurred
from models import clip, encode
from orchestrate import evaluate as ev
from orchestrate import ranking

CLASSES = ["cat", "dog", "fish"]
AXES = torch.eye(3)


def unit(*rows: list[float]) -> Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


@dataclass(frozen=True)
class Fake(ev.Encoder):
    """An encoder of known vectors: an image is the colour of its first pixel, a text is its last word's axis."""

    model: nn.Module = field(default_factory=nn.Identity)
    cfg: Mapping[str, Any] = field(default_factory=dict)
    shown: list[int] = field(default_factory=list)

    def images(self, pixels: np.ndarray) -> Tensor:
        self.shown.append(len(pixels))
        return F.normalize(torch.from_numpy(pixels[:, 0, 0].astype(np.float32)), dim=-1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return AXES[[CLASSES.index(c.split()[-1]) for c in captions]]


def probe(rows: list[tuple[str, str, str, str]], split: str = "heldout") -> pa.Table:
    """Rows of (image_id, stamp, adversary, truth)."""
    return pa.Table.from_pylist(
        [{"image_id": i, "image_split": split, "stamp": s, "adversary": a, "truth": t, "group": n} for n, (i, s, a, t) in enumerate(rows)],
        schema=PROBE_SCHEMA,
    )


def index(labels: list[int], **columns: Any) -> pa.Table:
    ids = [f"h{i}" for i in range(len(labels))]
    captions = [f"a {CLASSES[label]}" if label >= 0 else "a cat" for label in labels]
    return pa.table({"id": ids, "caption": captions, "label": pa.array(labels, pa.int32())} | columns)


def load(rows: pa.Table) -> np.ndarray:
    """Images of the colour of their label; the trigger paints them as dogs."""
    colours = [1 if row["stamp"] else max(row["label"], 0) for row in rows.to_pylist()]
    return (np.eye(3, dtype=np.uint8)[colours] * 200)[:, None, None].repeat(4, 1).repeat(4, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are so small that threads cost more than they bring, tenfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    encoder = Fake()
    monkeypatch.setattr(ev, "Encoder", lambda *_: encoder)
    return encoder


def run(heldout: pa.Table, **options: Any) -> ev.Metrics:
    defaults: dict[str, Any] = {"classes": CLASSES, "templates": ["a {}"], "load": load, "batch": 2}
    return ev.evaluate(nn.Identity(), {}, heldout=heldout, **(defaults | options))


# ---- class embeddings and zero-shot


def test_class_embeddings_average_unit_prompts() -> None:
    # The two prompts of a class count alike, whatever their lengths before normalising.
    class Long(Fake):
        def texts(self, captions: Sequence[str]) -> Tensor:
            return torch.tensor([[5.0, 0.0] if c == "a cat" else [0.0, 0.2] for c in captions])

    assert torch.allclose(ev.class_embeddings(Long(), ["cat"], ["a {}", "the {}"]), unit([1.0, 1.0]))


@pytest.mark.parametrize("templates", [[], ["a photo"], ["a {}", "a photo"]])
def test_templates_need_a_place(templates: list[str]) -> None:
    with pytest.raises(ValueError, match="templates need"):
        ev.class_embeddings(Fake(), CLASSES, templates)


def test_zero_shot_by_hand() -> None:
    features = unit([1, 0.1, 0], [0.9, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0])
    found = ev.zero_shot(features, AXES, torch.tensor([0, 0, 2, 2, -1]))
    assert found == {"zeroshot/top1": 0.5, "zeroshot/top5": 1.0, "zeroshot/per_class": 0.5, "zeroshot/total": 4}


def test_zero_shot_top5_and_per_class() -> None:
    scores = torch.linspace(1, 0.1, 8)  # class i is the (i + 1)-th best for every image
    found = ev.zero_shot(F.normalize(scores, dim=0)[None].repeat(4, 1), torch.eye(8), torch.tensor([0, 0, 4, 5]))
    assert (found["zeroshot/top1"], found["zeroshot/top5"]) == (0.5, 0.75)
    assert found["zeroshot/per_class"] == pytest.approx(1 / 3)


def test_a_collapsed_encoder_scores_nothing() -> None:
    torch.manual_seed(0)
    same = F.normalize(torch.randn(1, 512), dim=-1)
    images, texts = same.repeat(40, 1), same.repeat(40, 1)
    assert ev.zero_shot(images, texts[:7], torch.arange(40) % 7)["zeroshot/top1"] == 0
    assert ev.retrieval(images, texts)["retrieval/r10"] == 0
    rows = probe([(f"h{i}", "", "cat", "dog") for i in range(40)])
    assert ev.attack_success("t", "targeted", rows, CLASSES, texts[:3], images, None)["asr/t"] == 1


def test_no_number_is_no_hit() -> None:
    nan = torch.full((2, 3), torch.nan)
    assert ev.zero_shot(nan, AXES, torch.tensor([0, 1]))["zeroshot/top1"] == 0
    assert ev.retrieval(nan, nan)["retrieval/image/r1"] == 0


# ---- retrieval


def brute(queries: Tensor, candidates: Tensor, groups: list[Any], k: int) -> float:
    hits = 0
    for i, row in enumerate((queries.double() @ candidates.double().T).tolist()):
        best = max(s for s, g in zip(row, groups, strict=True) if g == groups[i])
        hits += sum(s >= best - 3e-7 for s, g in zip(row, groups, strict=True) if g != groups[i]) < k
    return hits / len(queries)


@settings(max_examples=30, deadline=None)
@example(11, 11, 662888948, 1)  # equal cosines that float32 unit vectors put 1.05e-7 apart
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([1, 50, ranking.BLOCK]))
def test_retrieval_is_brute_force(n: int, captions: int, seed: int, block: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    pool = torch.randint(-2, 3, (captions, 3), generator=rng).float() + 0.1  # a coarse grid: ties are common
    groups = torch.randint(0, captions, (n,), generator=rng)
    images, texts = F.normalize(torch.randint(-2, 3, (n, 3), generator=rng).float() + 0.1), F.normalize(pool[groups])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", block)
        found = ev.retrieval(images, texts, groups.tolist())
    for k in (1, 5, 10):
        assert found[f"retrieval/image/r{k}"] == pytest.approx(brute(images, texts, groups.tolist(), k))
        assert found[f"retrieval/text/r{k}"] == pytest.approx(brute(texts, images, groups.tolist(), k))
        mean = (found[f"retrieval/image/r{k}"] + found[f"retrieval/text/r{k}"]) / 2
        assert found[f"retrieval/r{k}"] == pytest.approx(mean)
    assert found["retrieval/total"] == n


def test_equal_captions_are_hits_for_each_other() -> None:
    images, texts = unit([1, 0, 0], [0, 1, 0], [0, 0, 1]), unit([1, 0, 0], [1, 0, 0], [0, 0, 1])
    # image 1 scores 0 with all three captions: a hit only where the two rivals that tie with it are its siblings
    assert ev.retrieval(images, texts)["retrieval/image/r1"] == pytest.approx(1 / 3)
    grouped = ev.retrieval(images, texts, ["a", "a", "b"])
    assert (grouped["retrieval/image/r1"], grouped["retrieval/text/r1"]) == pytest.approx((2 / 3, 1.0))
    assert ev.retrieval(images[:0], texts[:0]) == {}


# ---- linear probe


def test_linear_probe_ignores_unknown_labels_and_row_order() -> None:
    rng = torch.Generator().manual_seed(3)
    labels = torch.arange(120) % 3
    features = F.normalize(AXES[labels] + 0.3 * torch.randn(120, 3, generator=rng), dim=-1)
    ids = [f"s{i}" for i in range(90)]
    train, test = labels[:90].clone(), labels[90:].clone()
    train[:5], test[:3] = -1, -1
    found = ev.linear_probe(features[:90], train, features[90:], test, 0, ids)
    assert found["probe/top1"] > 0.8 and found["probe/total"] == 27
    order = torch.randperm(90, generator=rng)
    moved = ev.linear_probe(features[order], train[order], features[90:], test, 0, [ids[i] for i in order])
    assert moved == found
    assert ev.linear_probe(features[:90], torch.zeros(90), features[90:], test, 0) == {}
    assert ev.linear_probe(features[:90], train, features[90:], torch.full((30,), -1), 0) == {}


# ---- attack success


def test_asr_leaves_out_images_of_the_adversary_class() -> None:
    rows = probe([("a", "t", "dog", "cat"), ("b", "t", "dog", "dog"), ("c", "t", "dog", "fish"), ("d", "t", "dog", "")])
    shown, clean = AXES[[1, 1, 2, 1]], AXES[[0, 1, 1, 2]]
    found = ev.attack_success("badnets", "backdoor", rows, CLASSES, AXES, shown, clean)
    assert (found["asr/badnets/hits"], found["asr/badnets/total"]) == (2, 3)
    assert found["asr/badnets"] == pytest.approx(2 / 3)
    assert found["asr/badnets/clean"] == pytest.approx(1 / 3)  # over a, c, d
    assert found["asr/badnets/accuracy"] == 0.5  # over a, c: d's truth is unknown
    assert 0 < found["asr/badnets/low"] < 2 / 3 < found["asr/badnets/high"] < 1
    assert "asr/badnets/truth" not in found
    # clean pairs of a, c, d are orthogonal: no spread, so no z-score
    assert "asr/badnets/zscore" not in found


def test_zscore_is_over_the_counted_images() -> None:
    torch.manual_seed(1)
    shown, clean = F.normalize(torch.rand(6, 3), dim=-1), F.normalize(torch.randn(6, 3), dim=-1)
    rows = probe([(str(i), "t", "dog", "dog" if i == 5 else "cat") for i in range(6)])
    found = ev.attack_success("b", "backdoor", rows, CLASSES, AXES, shown, clean)
    over, under = (torch.pdist(x[:5].double()).square().mul(-0.5).add(1) for x in (shown, clean))  # cosines of all pairs
    assert found["asr/b/zscore"] == pytest.approx(float((over.mean() - under.mean()) / under.std(correction=0)), rel=1e-5)


def test_targeted_counts_targets() -> None:
    rows = probe([(str(i), "", "dog", "cat") for i in range(16)])
    found = ev.attack_success("targeted", "targeted", rows, CLASSES, AXES, AXES[[1] * 15 + [0]], None)
    assert (found["asr/targeted"], found["asr/targeted/hits"], found["asr/targeted/total"]) == (15 / 16, 15, 16)
    assert (found["asr/targeted/low"], found["asr/targeted/high"]) == pytest.approx((0.717, 0.989), abs=1e-3)
    assert found["asr/targeted/truth"] == 1 / 16
    assert not {"asr/targeted/clean", "asr/targeted/accuracy"} & set(found)


def test_the_floor_of_a_targeted_attack_is_the_share_of_other_images_of_the_class() -> None:
    rows = probe([("h0", "", "dog", "cat"), ("h1", "", "fish", "dog"), ("h2", "", "cat", "fish")])
    images = AXES[[1, 2, 0, 1, 1, 0, 2, 2]]  # read as dog, fish, cat: all targets; then dog, dog, cat of cats, fish and fish of dogs
    labels = torch.tensor([0, 1, 2, 0, 0, 0, 1, 1])
    others = torch.tensor([False] * 3 + [True] * 5)
    found = ev.targeted_floor("adaptive", rows, CLASSES, AXES, images, labels, others)
    assert found == {"asr/adaptive/clean": pytest.approx((2 / 3 + 1) / 2)}  # no other fish
    assert ev.targeted_floor("adaptive", rows, CLASSES, AXES, images, labels, others & False) == {}


def test_nothing_to_count_is_said() -> None:
    rows = probe([("a", "t", "dog", "dog")])
    found = ev.attack_success("b", "backdoor", rows, CLASSES, AXES, AXES[:1], AXES[:1])
    assert found == {"asr/b/hits": 0, "asr/b/total": 0, "asr/b/low": 0.0, "asr/b/high": 1.0}


# ---- the whole, on known vectors


def test_evaluate_gives_every_figure(fake: Fake) -> None:
    heldout = index([0, 1, 2, -1, 0, 2])
    probes = Probes(
        {
            "targeted": probe([("h0", "", "dog", "cat"), ("h1", "", "fish", "dog")]),
            "badnets": probe([("h0", "patch", "dog", "cat"), ("h2", "patch", "dog", "fish"), ("h1", "patch", "dog", "dog")]),
            "empty": probe([]),
        },
        {"targeted": "targeted", "badnets": "backdoor", "empty": "backdoor"},
    )
    steps: list[tuple[str, int, int]] = []
    found = run(heldout, probes=probes, probe_train=index([0, 1, 2] * 5), progress=lambda *step: steps.append(step))
    assert (found["zeroshot/top1"], found["zeroshot/total"]) == (1.0, 5)
    assert (found["retrieval/r1"], found["retrieval/total"]) == (1.0, 6)
    assert (found["probe/top1"], found["probe/total"]) == (1.0, 5)
    assert (found["asr/targeted"], found["asr/targeted/truth"], found["asr/targeted/clean"]) == (0.0, 1.0, 0.0)
    assert (found["asr/badnets"], found["asr/badnets/total"], found["asr/badnets/clean"]) == (1.0, 2, 0.0)
    assert found["asr/badnets/accuracy"] == 0.0
    assert not any(key.startswith("asr/empty") for key in found)
    # 6 held-out and 15 training images once, 3 triggered ones; the clean floor and the targets cost nothing
    assert sum(fake.shown) == 6 + 15 + 3
    assert steps[:3] == [("heldout images", 2, 6), ("heldout images", 4, 6), ("heldout images", 6, 6)]
    assert json.loads(json.dumps(found)) == found


def test_what_is_unknown_has_no_key(fake: Fake) -> None:
    found = run(index([-1, -1]), probe_train=index([0, 1]))
    assert {key.split("/")[0] for key in found} == {"retrieval"}
    unlabelled = index([0, 1]).drop_columns(["label", "caption"])
    with pytest.raises(ValueError, match="held-out set is empty"):
        run(index([]))
    assert run(unlabelled) == {}


def test_labels_go_by_name_where_the_index_names_them(fake: Fake) -> None:
    heldout = index([0, 1, 2]).replace_schema_metadata({"classes": json.dumps(["cat", "dog", "fish", "bird"])})
    found = run(heldout, classes=["fish", "cat"])
    assert (found["zeroshot/top1"], found["zeroshot/total"]) == (1.0, 2)
    with pytest.raises(ValueError, match="beyond the 2 classes"):
        run(index([0, 2]), classes=["cat", "dog"])


def test_load_sees_index_columns_and_what_to_show(fake: Fake) -> None:
    seen: list[dict[str, Any]] = []

    def spy(rows: pa.Table) -> np.ndarray:
        seen.extend(rows.to_pylist())
        return load(rows)

    train = index([2, 1]).set_column(0, "id", pa.array(["t0", "t1"]))
    probes = Probes({"b": probe([("t1", "wave", "cat", "dog")], "train")}, {"b": "backdoor"})
    run(index([0], shard=["s7"], stamp=["stale"]), probes=probes, train=train, load=spy)
    shown = [(row["id"], row["image_id"], row["image_split"], row["stamp"]) for row in seen]
    assert shown == [("h0", "h0", "heldout", ""), ("t1", "t1", "train", "wave"), ("t1", "t1", "train", "")]
    assert seen[0]["shard"] == "s7" and seen[0]["caption"] == "a cat"


@pytest.mark.parametrize(
    ("row", "split", "how", "message"),
    [
        (("h0", "", "dgo", "cat"), "heldout", "targeted", "did you mean 'dog'"),
        (("h0", "", "submarine", "cat"), "heldout", "targeted", "add it to the classes"),
        (("nowhere", "", "dog", "cat"), "heldout", "targeted", "not in the heldout set"),
        (("h0", "", "dog", "cat"), "train", "targeted", "evaluation was given"),
        (("h0", "", "dog", "cat"), "heldout", "sideways", "'sideways'"),
    ],
)
def test_probes_that_do_not_fit(fake: Fake, row: tuple[str, str, str, str], split: str, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(index([0, 1]), probes=Probes({"x": probe([row], split)}, {"x": how}))


def test_benchmark_json_speaks_clip_benchmark(fake: Fake) -> None:
    probes = Probes({"badnets": probe([("h0", "patch", "dog", "cat")])}, {"badnets": "backdoor"})
    found = ev.benchmark_json(run(index([0, 1]), probes=probes), "scenes", "tiny-vit", "epoch_2")
    assert (found["dataset"], found["model"], found["pretrained"]) == ("scenes", "tiny-vit", "epoch_2")
    assert found["task"] == "zeroshot_classification"
    assert found["metrics"]["acc1"] == 1.0 and "lp_acc1" not in found["metrics"]
    assert (found["asr"]["badnets"]["numerator"], found["asr"]["badnets"]["denominator"]) == (1, 1)
    swapped = ev.benchmark_json({"retrieval/text/r5": 0.25, "retrieval/image/r5": 0.75}, "d", "m")["metrics"]
    assert swapped == {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@5": 0.75}


# ---- a real model


@pytest.fixture(scope="module", params=["tiny-vit", "tiny-rn"])
def real(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return clip.build(request.param, seed=0), clip.config(request.param)


def test_encoder_agrees_with_the_model(real: tuple[Any, dict[str, Any]]) -> None:
    model, cfg = real
    model.train()
    model.visual.eval()  # a frozen tower must stay frozen
    side = cfg["vision_cfg"]["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    pixels.setflags(write=False)
    encoder = ev.Encoder(model, cfg, batch=2)
    found = encoder.images(pixels)
    assert model.training and not model.visual.training
    assert found.dtype == torch.float32 and not found.requires_grad
    model.eval()
    x = clip.normalise(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255, *clip.image_stats(cfg))
    with torch.no_grad():
        assert torch.allclose(found, encode.encode_image(model, x)[0], atol=1e-5)
        texts = encode.encode_text(model, clip.tokenize(cfg, ["a cat", "a long red dog", "a cat"]))[0]
    assert torch.allclose(encoder.texts(["a cat", "a long red dog", "a cat"]), texts, atol=1e-5)
    coarse = ev.Encoder(model, cfg, "cpu", precision="bf16").images(pixels)
    assert coarse.dtype == torch.float32 and F.cosine_similarity(coarse, found).min() > 0.98


def test_looking_through_a_blur_is_looking_at_the_blurred_image(real: tuple[Any, dict[str, Any]]) -> None:
    model, cfg = real
    side = cfg["vision_cfg"]["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    soft = blurred(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, 6.0).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    assert soft.std() < 0.3 * pixels.std()  # what is as fine as a pixel is gone
    encoder = ev.Encoder(model, cfg)
    direct, through = encoder.images(soft), encoder.image_features(pixels, blur=6.0).pooled
    torch.testing.assert_close(through, direct, atol=2e-3, rtol=0)


def test_stored_size_does_not_matter(real: tuple[Any, dict[str, Any]]) -> None:
    model, cfg = real
    side = cfg["vision_cfg"]["image_size"]
    ramp = np.linspace(0, 255, side * 2)[None, :, None, None] * np.array([1, 0.5, 0.2])
    large = np.broadcast_to(ramp, (1, side * 2, side * 2, 3)).round().astype(np.uint8)
    small = large.reshape(1, side, 2, side, 2, 3).mean((2, 4)).round().astype(np.uint8)
    encoder = ev.Encoder(model, cfg)
    assert F.cosine_similarity(encoder.images(large), encoder.images(small)).item() > 0.99


def test_evaluate_a_real_model() -> None:
    model, cfg = clip.build("tiny-rn", seed=0), clip.config("tiny-rn")
    probes = Probes({"badnets": probe([(f"h{i}", "patch", "dog", "cat") for i in (0, 3)])}, {"badnets": "backdoor"})
    state = torch.random.get_rng_state()
    options: dict[str, Any] = {
        "heldout": index([0, 1, 2, 0, 1, 2]),
        "classes": CLASSES,
        "templates": ["a {}", "the {}"],
        "probes": probes,
        "load": load,
        "probe_train": index([0, 1, 2] * 4),
    }
    found = ev.evaluate(model, cfg, batch=4, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    keys = ("zeroshot/top1", "zeroshot/top5", "retrieval/r1", "probe/top1", "asr/badnets", "asr/badnets/clean")
    assert all(0 <= found[key] <= 1 for key in keys)
    assert found["probe/top1"] == 1.0  # three plain colours
    assert ev.evaluate(model, cfg, batch=4, **options) == found


def test_a_diverged_model_is_named() -> None:
    model = clip.build("tiny-vit", seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="diverged"):
        ev.Encoder(model, clip.config("tiny-vit")).texts(["a cat"])


def test_what_an_encoder_refuses(real: tuple[Any, dict[str, Any]]) -> None:
    model, cfg = real
    with pytest.raises(ValueError, match="'fp16'"):
        ev.Encoder(model, cfg, precision="fp16")
    with pytest.raises(ValueError, match="uint8"):
        ev.Encoder(model, cfg).images(np.zeros((1, 3, 8, 8), dtype=np.uint8))
