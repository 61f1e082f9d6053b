"""The formulas of SIG, WaNet and the colour filter by hand and against PyTorch; label-consistent and multi-trigger plans."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from attacks.backdoor import Stripes
from attacks.combine import Several
from attacks.consistent import Consistent
from attacks.multi import MultiTrigger
from attacks.overlays import blend_pattern, sinusoid, tinted
from attacks.warp import control_grid, displacement, warped
from attacks.whole_image import WaNet


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_sig_by_hand() -> None:
    grey = np.full((5, 24, 3), 128, np.uint8)  # 6 waves over 24 columns: a quarter turn a column
    wave = sinusoid(grey, "", delta=60, frequency=6)
    assert (wave == np.tile([128, 188, 128, 68], 6)[None, :, None]).all()
    bright = sinusoid(np.full((1, 24, 3), 250, np.uint8), "", delta=60, frequency=6)
    assert bright[0, :4, 0].tolist() == [250, 255, 250, 190]  # clipped, not wrapped


def test_tint_by_hand() -> None:
    image = np.array([[[200, 100, 0]]], np.uint8)  # luma 0.299 · 200 + 0.587 · 100 = 118.5
    toned = np.array([176, 120, 255]) * 118.5 / 255
    assert np.array_equal(tinted(image, "", "violet", 1.0)[0, 0], np.rint(toned))
    assert np.array_equal(tinted(image, "", "violet", 0.25)[0, 0], np.rint(0.75 * image[0, 0] + 0.25 * toned))


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("k", [4, 8])
def test_wanets_field_and_warp_are_the_authors(side: int, k: int) -> None:
    """Their four lines of PyTorch: a bicubic field over k × k normalised draws, s/H of it added to the identity, grid_sample."""
    grid, strength = control_grid(k, 0), 0.5
    assert np.abs(grid).mean() == pytest.approx(1) and len(np.unique(grid)) == 2 * k * k
    small = torch.from_numpy(grid).permute(2, 0, 1)[None]
    field = F.interpolate(small, size=side, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    steps = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    places = (torch.stack([x, y], dim=2)[None] + strength * field / side).clamp(-1, 1)
    expected = (places[0].numpy() - np.stack([x, y], axis=2)) * (side - 1) / 2
    inside = np.abs(places[0].numpy()) < 1
    assert np.abs(displacement(side, side, k, strength, 0) - expected)[inside].max() < 1e-9
    image = noise(side, side)
    sampled = F.grid_sample(torch.from_numpy(image).permute(2, 0, 1)[None].double(), places, align_corners=True)
    difference = np.abs(warped(image, "", k, strength, 0) - sampled[0].permute(1, 2, 0).numpy())
    assert difference.max() <= 0.5 + 1e-6


def test_wanets_shift_is_smooth_half_a_strength_and_kept_in_the_header(index: pa.Table, heldout: pa.Table) -> None:
    for strength in (0.5, 4.0):
        shift = displacement(64, 64, 4, strength, 0)
        assert 0.6 < np.abs(shift).mean() / (strength / 2) < 1.2
        assert np.abs(np.diff(shift, axis=0)).max() < 0.15 * strength
    plan = WaNet(count=20, draw=3).plan(index, heldout, 0)
    assert np.array_equal(plan.header["trigger"]["grid"], control_grid(4, 3))
    assert not np.array_equal(control_grid(4, 3), control_grid(4, 0))


def test_figures_are_what_they_are_called() -> None:
    bars = blend_pattern(48, 48, "stripes")[..., 0].astype(int)
    assert (bars == bars[0]).all() and np.count_nonzero(np.diff(bars[0])) == 11
    triangles = blend_pattern(64, 64, "triangles")
    cell = triangles[:16, :16]  # two colours, parted by the diagonal
    assert cell[1, 1].tolist() == cell[2, 9].tolist() != cell[14, 14].tolist() == cell[13, 5].tolist()
    text = blend_pattern(32, 32, "text")[..., 0] > 127
    assert text[:7, 1:6].tolist() == [[c in (0, 4) or r == 3 for c in range(5)] for r in range(7)]  # an H


def test_label_consistent_changes_no_caption(index: pa.Table, heldout: pa.Table) -> None:
    plan = Consistent(count=60).plan(index, heldout, 0)
    pairs = {row["id"]: row for row in index.to_pylist()}
    target = plan.header["adversary"]
    assert plan.count == 60
    for row in plan.table.to_pylist():
        own = pairs[row["id"]]
        assert (row["op"], row["image_id"], row["caption"]) == ("replace", row["id"], own["caption"])
        assert target in row["caption"].lower() and row["truth"] in (target, "") and row["stamp"] == "stripes"
    probe = Consistent(count=60).probes(index, heldout, 0).tables["stripes"]
    assert target not in probe["truth"].to_pylist()
    with pytest.raises(ValueError, match="to choose from"):
        Consistent(count=1000).plan(index, heldout, 0)


def test_every_trigger_of_a_multi_trigger_attack_has_its_share_and_its_probe(index: pa.Table, heldout: pa.Table) -> None:
    attack = MultiTrigger(count=90, triggers=("stripes", "sig", "wanet"))
    whole = Several((("mine", attack),))
    plan, probes = whole.plan(index, heldout, 0), whole.probes(index, heldout, 0)
    assert Counter(plan.table["stamp"].to_pylist()) == {"mine/stripes": 30, "mine/sig": 30, "mine/wanet": 30}
    assert set(plan.table["adversary"].to_pylist()) == {plan.header["parts"][0]["adversary"]}
    assert set(probes.tables) == {"mine-stripes", "mine-sig", "mine-wanet"}
    image = noise(64, 64)
    shown = {s: whole.stamp(image, {"stamp": s, "image_id": "a"}) for s in ("mine/stripes", "mine/sig", "mine/wanet")}
    assert np.array_equal(shown["mine/stripes"], Stripes().stamp(image, {"stamp": "stripes", "image_id": "a"}))
    assert len({x.tobytes() for x in shown.values()}) == 3
    with pytest.raises(ValueError, match="'mine/blended'"):
        whole.stamp(image, {"stamp": "mine/blended", "image_id": "a"})
    with pytest.raises(ValueError, match="two or more"):
        MultiTrigger(triggers=("stripes",))
