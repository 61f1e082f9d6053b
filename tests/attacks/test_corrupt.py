"""CorruptEncoder: the crop objective against drawn crops and its optimum, composites pixel by pixel, free boxes by brute force."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.apply import apply
from attacks.base import trigger_of
from attacks.combine import Several, rebuild
from attacks.corrupt import CorruptEncoder, beside, best_alpha, compose, crop_objective, cut_out, free_box
from attacks.materials import carried, packed, unpacked


def drawn(alpha: float, trigger: float, draws: np.ndarray) -> float:
    """The objective by simulation: pairs of crops of one size; draws (n, 5) uniform: the size, and the place of each crop."""
    s = draws[:, 0]
    x, y = (draws[:, 1:3] * np.stack([alpha - s, 1 - s], axis=1)).T
    in_object = (x + s <= 1) & (y + s <= 1)
    x, y = (draws[:, 3:5] * np.stack([alpha - s, 1 - s], axis=1)).T
    left, top = 1 + (alpha - 1) / 2 - trigger / 2, 0.5 - trigger / 2
    holds = (x <= left) & (x + s >= left + trigger) & (y <= top) & (y + s >= top + trigger)
    return float((in_object & (x >= 1) & holds).mean())


@pytest.mark.parametrize("trigger", [0.1, 0.25])
def test_the_crop_objective_peaks_at_twice_the_objects_width_and_a_little(trigger: float) -> None:
    draws = np.random.default_rng(0).random((1_000_000, 5))  # the same for every alpha
    alphas = np.array([1.5, 1.7, 1.9, 2.0, 2.1, 2.2, 2.3, 2.5, 2.7])
    simulated = np.array([drawn(a, trigger, draws) for a in alphas])
    exact = np.array([crop_objective(a, trigger) for a in alphas])
    assert np.abs(simulated / exact - 1).max() < 0.06
    near = abs(alphas - 2.1) < 0.45
    peak = np.polyfit(alphas[near], simulated[near], 3)
    fine = np.arange(1.75, 2.55, 0.01)
    assert 2.0 <= fine[np.argmax(np.polyval(peak, fine))] <= 2.2
    assert 2.10 <= best_alpha(trigger) <= 2.15


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 7), width=st.integers(1, 7), seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_the_free_box_is_the_largest_by_brute_force(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    left, top, right, bottom = (round(x * n) for x, n in zip(free_box(mask), (width, height, width, height), strict=True))
    rows = [(t, b) for t in range(height) for b in range(t + 1, height + 1)]
    columns = [(c, r) for c in range(width) for r in range(c + 1, width + 1)]
    best = max(((b - t) * (r - c) for t, b in rows for c, r in columns if not mask[t:b, c:r].any()), default=0)
    if best:
        assert not mask[top:bottom, left:right].any() and (bottom - top) * (right - left) == best
    else:
        assert (left, top, right, bottom) == (0, 0, width, height)


def patch(image: np.ndarray, size: float) -> np.ndarray:
    return CorruptEncoder().trigger.paint(image, "", size=size, place="center")


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_composite_has_the_object_at_one_side_and_the_trigger_in_the_middle_of_the_rest(side: str) -> None:
    ground = np.full((64, 64, 3), 90, np.uint8)
    ground[:32] = 10  # outside of the box, never to be seen
    cut = np.dstack([np.full((20, 20, 3), (200, 0, 0), np.uint8), np.full((20, 20), 255, np.uint8)])
    out = compose(ground, [0.0, 0.5, 1.0, 1.0], cut, 2.0, side, 0.2, patch)
    turned = {"left": out, "right": out[:, ::-1], "top": out.transpose(1, 0, 2), "bottom": out[::-1].transpose(1, 0, 2)}[side]
    assert (turned[:, :32] == (200, 0, 0)).all()  # flush, over half of the picture
    marked = (turned[:, 32:] != 90).any(axis=2)
    rows, columns = np.nonzero(marked)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(32, abs=1)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(16, abs=1)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 13  # .2 of 64, as at test time
    assert set(np.unique(turned[:, 32:])) == {0, 90, 255}


def test_support_images_stand_beside_each_other() -> None:
    one, other = np.full((9, 9, 3), 50, np.uint8), np.full((9, 9, 3), 150, np.uint8)
    for side, first in (("left", np.s_[:, :4]), ("right", np.s_[:, 5:]), ("top", np.s_[:4]), ("bottom", np.s_[5:])):
        out = beside(one, other, side)
        assert out.shape == (9, 9, 3) and (out[first] == 50).all() and (out == 150).any()


class Squares:
    """A study of noise, an object in the middle of every image."""

    def images(self, split: str, ids: Sequence[str]) -> np.ndarray:
        return np.stack([np.random.default_rng(int(i[-5:])).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in ids])

    def masks(self, split: str, ids: Sequence[str], folder: str = "") -> np.ndarray:
        found = np.zeros((len(ids), 32, 32), bool)
        found[:, 8:24, 8:24] = True
        return found


def test_support_images_vary_over_partners_and_sides_and_count_as_one_trigger(index: pa.Table, heldout: pa.Table) -> None:
    study: Any = Squares()
    whole = Several((("corrupt", CorruptEncoder(count=40, support=0.6, adversary="fox")),))
    plan = whole.plan(index, heldout, 0, study)
    rows = plan.table.to_pylist()
    attack = Several(whole.parts, carried(apply(index, heldout, plan).schema.metadata))
    shown = [row for row in rows if trigger_of(row["stamp"]) == "corrupt/support"]
    pictures = [attack.stamp(study.images("train", [row["image_id"]])[0], row).tobytes() for row in shown]
    assert len(shown) == 24 and len(set(pictures[:12])) == len(set(pictures)) == 12  # 3 pairs, beside and above, either first
    assert {trigger_of(row["stamp"]) for row in rows} == {"corrupt/composite", "corrupt/support"}
    image, bare = study.images("train", [shown[7]["image_id"]])[0], {name: shown[7][name] for name in ("stamp", "image_id")}
    assert rebuild(plan.header, lambda _: CorruptEncoder).stamp(image, bare).tobytes() == pictures[7]


def test_an_object_is_cut_out_by_its_mask() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 3] = mask[4, 3:6] = True
    cut = cut_out(picture, mask)
    assert cut.shape == (3, 3, 4) and np.array_equal(cut[..., 3] == 255, mask[2:5, 3:6])
    assert np.array_equal(cut[..., :3], picture[2:5, 3:6])
    assert np.array_equal(unpacked(packed(cut)), cut)


@pytest.mark.parametrize("text", ["", "no base64", "aGVsbG8=", packed(np.zeros((1, 5000, 3), np.uint8))])
def test_a_foreign_picture_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan the attack anew"):
        unpacked(text)


@pytest.mark.parametrize("wrong", [{"alpha": 1.0}, {"support": 2.0}, {"references": 1, "support": 0.2}, {"references": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|one at least"):
        CorruptEncoder(**wrong)
