"""The training step: two workers with half a batch each take the step that one process takes with the whole; schedule, clamp, resuming."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional as F

from defenses.augmented import Augmented
from defenses.base import ClipOutput, Defense, LossFn, clip_loss
from defenses.otcclip import OTCCLIP
from defenses.roclip import RoCLIP
from defenses.safeclip import SafeCLIP
from models import clip, encode
from orchestrate import step
from orchestrate.recipe import Model, Train
from orchestrate.step import Examples, Learner

BATCH, STEPS, SIDE, WIDTH = 8, 2, 32, 128
WORDS = ("dog", "cat", "a small ship", "an old truck in the deep snow", "bird", "two frogs on a green leaf", "deer", "a horse, running")
# eps: below it Adam's step is smooth in the gradient; at 1e-8 a gradient that is zero but for rounding decides the sign of a whole step.
SMOOTH = Train(batch=BATCH, lr=1e-2, warmup=1, precision="fp32", eps=1e-3)


NO_DEFENSE = Defense()


@dataclass(frozen=True)
class TokenLoss(Defense):
    """A loss that reads everything a worker gathers: tokens of differing length, their masks, the robust flag, the scale."""

    needs_tokens = True

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        weights = out.text_mask.float() / out.text_mask.sum(1, keepdim=True)
        words = torch.einsum("nl,nld->nd", weights, out.text_tokens)
        places = out.image_tokens.mean(1)
        pull = (places @ words.T).logsumexp(1).mean() - (places * words).sum(1).mean()
        return base(out) + (2.0 if out.robust else 0.5) * pull + 0.01 * out.scale


@dataclass(frozen=True)
class ViewLoss(Augmented):
    """A loss that compares the tokens of two views."""

    needs_tokens = True

    @property
    def view_count(self) -> int:
        return 2

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        places = (out.image_tokens.mean(1) * out.image_tokens_b.mean(1)).sum(1)
        words = [(t * m[:, :, None]).sum(1) / m.sum(1, keepdim=True) for t, m in _sides(out)]
        return base(out) - places.mean() - (words[0] * words[1]).sum(1).mean()


def _sides(out: ClipOutput) -> list[tuple[Tensor, Tensor]]:
    return [(out.text_tokens, out.text_mask), (out.text_tokens_b, out.text_mask_b)]


@dataclass(frozen=True)
class Case:
    model: str
    defense: Defense = NO_DEFENSE
    train: Train = SMOOTH
    matched: bool = False  # the second step learns from given features
    robust: bool = False
    size: int = SIDE  # of the pictures
    selected: bool = False  # the last step knows which pairs are safe, and every step the latest pairs


CASES = {
    "convolutions with batch norm, augmented views of larger pictures": Case("tiny-rn", Augmented(), size=48),
    "a robust step on stored features": Case("tiny-rn", RoCLIP(), matched=True, robust=True),
    "a robust loss on tokens": Case("tiny-rn", TokenLoss(), robust=True),
    "two views": Case("tiny-rn", ViewLoss(eda=0.3)),
    "two views in micro-batches": Case("tiny-vit", ViewLoss(eda=0.3), dataclasses.replace(SMOOTH, accumulate=2)),
    "a transformer, with a bound on the gradient": Case("tiny-vit", train=dataclasses.replace(SMOOTH, clip_norm=0.05)),
    "a robust step on stored features in micro-batches": Case(
        "tiny-vit", RoCLIP(image_augment=False), dataclasses.replace(SMOOTH, accumulate=2), matched=True, robust=True
    ),
    "two views, neighbours among the latest pairs, and half of the pairs safe": Case("tiny-vit", SafeCLIP(warmup=1), selected=True),
    "the same in micro-batches": Case("tiny-vit", SafeCLIP(warmup=1), dataclasses.replace(SMOOTH, accumulate=2), selected=True),
    "a loss of re-paired pairs alone": Case(
        "tiny-vit", OTCCLIP(image_augment=False, text_augment=False, align="moved", beta=0, negatives=2), SMOOTH, selected=True, robust=True
    ),
    "a loss on tokens in micro-batches": Case("tiny-vit", TokenLoss(), dataclasses.replace(SMOOTH, accumulate=4)),
}


def examples(number: int, size: int = SIDE, matched: bool = False, selected: bool = False) -> Examples:
    """Batch `number`, whole."""
    rng = np.random.default_rng(number)
    features = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    return Examples(
        rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8),
        [WORDS[(i + number) % len(WORDS)] for i in range(BATCH)],
        rng.integers(0, 2**63, BATCH).astype(np.uint64),
        features / np.linalg.norm(features, axis=1, keepdims=True) if matched else None,
        np.arange(BATCH) % 2 == 0 if selected else None,
        np.arange(BATCH) % 3 == 0 if selected else None,
    )


def share(whole: Examples, rank: int, world: int, parts: int) -> Examples:
    """Two workers' shares differ in size, as where a batch does not divide; but three examples make no four micro-batches."""
    cut = [0, BATCH // 2 + (parts < 4), BATCH] if world == 2 else [0, BATCH]
    part = slice(cut[rank], cut[rank + 1])
    matched, safe, moved = (None if x is None else x[part] for x in (whole.matched, whole.safe, whole.moved))
    return Examples(whole.images[part], whole.captions[part], whole.keys[part], matched, safe, moved)


def learner(case: Case, seed: int = 0) -> Learner:
    return Learner(
        Model(case.model, image_size=SIDE),
        case.train,
        case.defense,
        seed=seed,
        total_steps=10,
        unused=case.matched,
        queue=5 if case.selected else 0,
    )


def smooth(one: Learner) -> Learner:
    """The learner without kinks: at a ReLU's corner rounding decides whether a unit counts at all, which no tolerance covers."""
    for module in list(one.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.SiLU())
    return one


def trained(case: Case, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Losses, the last step's gradients and the state after STEPS steps; the last one is the robust one."""
    one, losses = smooth(learner(case)), []
    for number in range(STEPS):
        last = number == STEPS - 1
        batch = examples(number, case.size, case.matched and last, case.selected and last)
        losses.append(one.step(share(batch, rank, world, case.train.accumulate), robust=case.robust and last, epoch=3 if last else 1))
    assert len(one.queue[0]) == (5 if case.selected else 0)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in one.model.named_parameters()}
    return {"losses": torch.stack(losses), "gradients": gradients, "state": dict(one.model.state_dict())}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({name: trained(case, rank, 2) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def differing(found: dict[str, Any], wanted: dict[str, Any], share: float) -> list[str]:
    """Tensors that differ by more than a share of their length (or of a thousandth of the whole's): more than rounding does."""
    assert found.keys() == wanted.keys()
    lengths = {key: float(x.double().norm()) for key, x in wanted.items() if x is not None}
    whole = 1e-3 * math.hypot(*lengths.values())
    bad = [key for key, x in wanted.items() if x is None and found[key] is not None and found[key].any()]
    return bad + [k for k in lengths if not (found[k].double() - wanted[k].double()).norm() <= share * max(lengths[k], whole)]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_take_the_step_of_one(halves, name):
    whole = trained(CASES[name])
    one, other = (half[name] for half in halves)
    assert all(torch.equal(one["state"][key], other["state"][key]) for key in whole["state"])  # workers never drift apart
    for half in (one, other):
        torch.testing.assert_close(half["losses"], whole["losses"], rtol=1e-5, atol=1e-5)
    assert differing(one["gradients"], whole["gradients"], 1e-3) == []
    floats = {key: value for key, value in whole["state"].items() if value.is_floating_point()}
    assert differing({key: one["state"][key] for key in floats}, floats, 1e-3) == []
    assert all(torch.equal(one["state"][key], value) for key, value in whole["state"].items() if key not in floats)


@pytest.mark.parametrize("name", CASES)
def test_the_steps_compared_above_move_what_they_should(name):
    """Guards the comparison: nothing in it is equal only because nothing happened."""
    case = CASES[name]
    whole, start = trained(case), learner(case).model.state_dict()
    text = [key for key in whole["gradients"] if key.startswith(("transformer", "token_embedding", "text_projection", "ln_final"))]
    for key, gradient in whole["gradients"].items():
        if case.matched and (key in text or key == "positional_embedding"):
            assert gradient is None, key  # stored features give the text tower nothing to learn
        else:
            assert gradient is not None and gradient.isfinite().all(), key
    assert whole["gradients"]["logit_scale"].abs() > 1e-4
    assert len(text) > 10 and all(not torch.equal(whole["state"][key], start[key]) for key in text)
    if "rn" in case.model:
        assert any(key.endswith("running_mean") and not torch.equal(value, start[key]) for key, value in whole["state"].items())


def test_an_undecided_gradient_does_not_decay_the_text_tower():
    """In a step on stored features the text tower is left exactly as it was: no gradient, no momentum, no weight decay."""
    one = learner(Case("tiny-vit"))
    before = {k: v.clone() for k, v in one.model.state_dict().items()}
    one.step(examples(0, matched=True), robust=True)
    after = one.model.state_dict()
    assert torch.equal(after["token_embedding.weight"], before["token_embedding.weight"])
    assert not torch.equal(after["visual.proj"], before["visual.proj"])


# --- one process -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "matched"), [(2, False), (8, False), (4, True)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(parts, matched):
    plain, split = (trained(Case("tiny-vit", train=dataclasses.replace(SMOOTH, accumulate=n), matched=matched)) for n in (1, parts))
    torch.testing.assert_close(split["losses"], plain["losses"], rtol=1e-5, atol=1e-5)
    assert differing(split["gradients"], plain["gradients"], 1e-3) == []


def test_the_loss_is_clips_on_the_augmented_batch():
    one, batch = learner(Case("tiny-vit")), examples(3)
    with torch.no_grad():
        pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2).float() / 255
        image, *_ = encode.encode_image(one.model, clip.normalise(pixels, *clip.image_stats(one.cfg)))
        text, *_ = encode.encode_text(one.model, clip.tokenize(one.cfg, batch.captions))
        logits = one.model.logit_scale.exp() * image @ text.T
        wanted = (F.cross_entropy(logits, torch.arange(BATCH)) + F.cross_entropy(logits.T, torch.arange(BATCH))) / 2
    torch.testing.assert_close(one.step(batch), wanted, rtol=1e-5, atol=1e-6)


def test_given_features_take_the_place_of_the_captions():
    batch = examples(3, matched=True)
    losses = [learner(Case("tiny-vit")).step(dataclasses.replace(batch, captions=captions)) for captions in (batch.captions, ["x"] * BATCH)]
    assert torch.equal(*losses)
    plain = learner(Case("tiny-vit")).step(dataclasses.replace(batch, matched=None))
    assert not torch.isclose(losses[0], plain)


def test_the_defence_is_told_which_steps_are_robust():
    losses = [learner(Case("tiny-vit", TokenLoss())).step(examples(0), robust=robust) for robust in (False, True)]
    assert not torch.isclose(*losses)


def test_training_learns_its_pairs():
    one = learner(Case("tiny-rn", train=dataclasses.replace(SMOOTH, lr=2e-3, eps=1e-8)))
    losses = [float(one.step(examples(0))) for _ in range(10)]
    assert losses[-1] < losses[0] / 2


def test_half_precision_is_near_full_precision():
    losses = [learner(Case("tiny-rn", train=dataclasses.replace(SMOOTH, precision=p))).step(examples(0)) for p in ("fp32", "bf16")]
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)


def test_the_same_seed_is_the_same_model_and_another_another():
    states = [learner(Case("tiny-rn"), seed).model.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["visual.conv1.weight"], states[2]["visual.conv1.weight"])


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (4, 10), (10, 10), (50, 10), (1, 1)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(warmup, total):
    one = learner(Case("tiny-vit", train=dataclasses.replace(SMOOTH, lr=0.5, warmup=warmup)))
    one.total_steps = total
    rates = [one.lr_at(i) for i in range(total + 1)]
    peak = min(warmup, total)
    assert rates[:peak] == pytest.approx([0.5 * (i + 1) / peak for i in range(peak)])
    assert max(rates) == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert peak == total or rates[-1] == pytest.approx(0, abs=1e-12)
    if peak < total:
        middle = rates[peak] * 0.5 * (1 + math.cos(math.pi * (total - 1 - peak) / (total - peak)))
        assert rates[-2] == pytest.approx(middle)


def test_a_step_uses_its_own_learning_rate():
    one = learner(Case("tiny-vit", train=dataclasses.replace(SMOOTH, warmup=4)))
    for number in range(3):
        one.step(examples(number))
        assert {group["lr"] for group in one.optimizer.param_groups} == {one.lr_at(number)}
    assert one.steps == 3


@pytest.mark.parametrize(("before", "after"), [(9.0, math.log(100)), (-1.0, 0.0)])
def test_the_logit_scale_is_kept_between_1_and_100(before, after):
    one = learner(Case("tiny-vit"))
    with torch.no_grad():
        one.model.logit_scale.fill_(before)
    one.step(examples(0))
    assert one.model.logit_scale.item() == pytest.approx(after)


def test_the_bound_keeps_the_gradients_direction():
    free, bound = (trained(Case("tiny-vit", train=dataclasses.replace(SMOOTH, clip_norm=c)))["gradients"] for c in (0.0, 1e9))
    assert all(torch.equal(free[key], bound[key]) for key in free)
    small = trained(Case("tiny-vit", train=dataclasses.replace(SMOOTH, clip_norm=0.05)))["gradients"]
    assert torch.stack([g.norm() for g in small.values()]).norm() <= 0.05 * (1 + 1e-4)


@pytest.mark.parametrize("model", ["tiny-rn", "tiny-vit"])
def test_what_is_restored_goes_on_as_if_nothing_had_happened(model):
    case = Case(model, Augmented())
    first, second = learner(case), learner(case, seed=5)
    for number in range(2):
        first.step(examples(number))
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert second.steps == 2
    losses = [one.step(examples(2)) for one in (first, second)]
    assert torch.equal(*losses)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_for_matching_are_a_copy_on_the_cpu():
    one = learner(Case("tiny-rn"))
    weights = one.weights()
    kept = {name: value.copy() for name, value in weights.items()}
    one.step(examples(0))
    assert weights.keys() == one.model.state_dict().keys()
    assert all(np.array_equal(weights[name], kept[name]) for name in kept)


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_norms_biases_and_the_scale_do_not_decay(name):
    model = clip.build(name, seed=0)
    plain, decay = step.parameter_groups(model, 0.1)
    assert (plain["weight_decay"], decay["weight_decay"]) == (0.0, 0.1)
    names = {id(p): key for key, p in model.named_parameters()}
    free, decayed = ({names[id(p)] for p in group["params"]} for group in (plain, decay))
    assert not free & decayed and free | decayed == set(names.values())
    norms = {f"{m}.{key}" for m, module in model.named_modules() if "Norm" in type(module).__name__ for key, _ in module.named_parameters()}
    assert norms and norms <= free and "logit_scale" in free
    assert {key for key in free if key.endswith("weight")} <= norms
    assert all(key not in free for key in ("token_embedding.weight", "text_projection", "positional_embedding"))
    assert all("bias" not in key and "bn" not in key for key in decayed)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_share_is_cut_into_consecutive_micro_batches(parts):
    whole = examples(0, matched=True)
    found = step.split(whole, parts)
    assert len(found) == parts
    for field in ("images", "keys", "matched"):
        assert np.array_equal(np.concatenate([getattr(part, field) for part in found]), getattr(whole, field))
    assert [caption for part in found for caption in part.captions] == whole.captions
    assert {len(part.captions) for part in found} == {BATCH // parts}
    assert step.split(examples(0), parts)[0].matched is None


def test_pictures_are_resized_to_the_model_within_range():
    images = torch.rand(2, 3, 48, 48)
    assert clip.resize(images, (48, 48)) is images
    small = clip.resize((images > 0.5).float(), (32, 16))
    assert small.shape == (2, 3, 32, 16) and small.min() >= 0 and small.max() <= 1
    assert torch.allclose(clip.resize(torch.full((1, 3, 48, 48), 0.25), (32, 32)), torch.tensor(0.25))


def test_alone_nothing_is_gathered():
    x = torch.rand(3, 4)
    assert step.gather(x, 1, 0) is x and step.gather(None, 2, 0) is None
    assert clip_loss(ClipOutput(torch.eye(4), torch.eye(4), torch.tensor(100.0))) < 1e-6
