"""Draws by key, and each part of a view against Pillow, colorsys or a few lines of numpy."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from defenses import augment
from defenses.augment import ImageAugment, blurred, blurring, colouring, crops, resampling, uniforms

NOTHING = {"flip": 0.0, "crop": (1.0, 1.0), "jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0}


def make_images(n: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def make_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


# draws


def test_draws_are_uniform_and_uncorrelated_even_for_consecutive_keys():
    u = uniforms(np.arange(20_000, dtype=np.uint64), 8, salt=1).astype(np.float64)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi² with 19 degrees of freedom, p < 1e-5
    others = uniforms(np.arange(20_000, dtype=np.uint64), 8, salt=2)
    correlation = np.corrcoef(np.concatenate([u, others, np.roll(u, 1, axis=0)], axis=1).T) - np.eye(24)
    assert np.abs(correlation).max() < 0.035  # 5 / sqrt(20,000)


def test_every_key_bit_moves_about_half_of_the_draws():
    key = np.uint64(0x0123456789ABCDEF)
    flipped = key ^ (np.uint64(1) << np.arange(64, dtype=np.uint64))
    far = np.abs(uniforms(flipped, 200, 1) - uniforms(np.array([key]), 200, 1)) > 0.25
    assert far.mean(axis=1).min() > 0.4 and far.mean(axis=1).max() < 0.72  # P(|u − v| > ¼) = 9/16


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(1, 12), st.integers(0, 20))
def test_a_draw_depends_on_its_key_and_number_alone(keys, count, more):
    keys = np.array(keys, dtype=np.uint64)
    many = uniforms(keys, count + more, salt=3)
    assert many.dtype == np.float32
    np.testing.assert_array_equal(many[:, :count], uniforms(keys, count, salt=3))
    np.testing.assert_array_equal(many[::-1], uniforms(keys[::-1], count + more, salt=3))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_view_does_not_depend_on_its_batch(monkeypatch, chunk):
    images, keys, views = make_images(14, 20), make_keys(14), ImageAugment()
    whole = views.apply(images, keys)
    monkeypatch.setattr(augment, "CHUNK", chunk)
    parts = [views.apply(images[i:j], keys[i:j]) for i, j in ((0, 1), (1, 9), (9, 14))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(views.apply(images[order], keys[order.numpy()]), whole[order], atol=1e-6, rtol=0)


def test_turning_one_augmentation_off_leaves_the_draws_of_the_others():
    full, sharp = ImageAugment()._draw(make_keys(50)), ImageAugment(blur_p=0, gray_p=0)._draw(make_keys(50))
    np.testing.assert_array_equal(full[:, :9], sharp[:, :9])
    assert not sharp[:, 9:].any()


# the whole view


def test_nothing_on_is_the_identity_exactly():
    images = make_images(5, 17)
    assert torch.equal(ImageAugment(**NOTHING).apply(images, make_keys(5)), images)


def test_a_flip_is_exact():
    images = make_images(5, 17)
    assert torch.equal(ImageAugment(**NOTHING | {"flip": 1.0}).apply(images, make_keys(5)), images.flip(3))


def test_half_of_the_images_flip():
    images = make_images(1, 4).expand(2000, -1, -1, -1)
    views = ImageAugment(**NOTHING | {"flip": 0.5}).apply(images, make_keys(2000))
    flipped = (views == images.flip(3)).flatten(1).all(1).float().mean()
    assert abs(flipped - 0.5) < 0.05


def test_gray_is_gray_and_keeps_the_luma():
    images = make_images(6, 9)
    views = ImageAugment(**NOTHING | {"gray_p": 1.0}).apply(images, make_keys(6))
    torch.testing.assert_close(views, views[:, :1].expand_as(views))
    luma = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), images)
    torch.testing.assert_close(views[:, 0], luma)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 5, 24]), st.sampled_from([None, 1, 3, 40]))
@settings(max_examples=30, deadline=None)
def test_views_have_the_side_asked_for_and_stay_in_range(seed, side, out_side):
    views = ImageAugment(jitter=(1, 1, 1, 0.5), blur=(0.1, 9)).apply(make_images(4, side, seed), make_keys(4), out_side)
    assert views.shape == (4, 3, out_side or side, out_side or side) and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1


def test_constant_images_stay_constant_without_jitter():
    images = torch.full((8, 3, 12, 12), 0.3)
    views = ImageAugment(jitter_p=0).apply(images, make_keys(8), out_side=7)
    torch.testing.assert_close(views, torch.full((8, 3, 7, 7), 0.3))


def test_no_images_and_every_device():
    assert ImageAugment().apply(torch.empty(0, 3, 8, 8), make_keys(0)).shape == (0, 3, 8, 8)
    elsewhere = ImageAugment().apply(torch.empty(3, 3, 8, 8, device="meta"), make_keys(3), out_side=6)
    assert elsewhere.device.type == "meta" and elsewhere.shape == (3, 3, 6, 6)


# parts


def test_crops_fit_and_follow_the_law_of_area_and_ratio():
    left, top, width, height = crops(uniforms(make_keys(20_000), 22, 1), (0.08, 1.0), (3 / 4, 4 / 3)).T
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    area, ratio = width * height, width / height
    assert 0.08 - 1e-6 <= area.min() < 0.09 and 0.95 < area.max() <= 1 + 1e-6
    assert 3 / 4 - 1e-6 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3 + 1e-6
    assert abs(np.log(ratio).mean()) < 0.01
    small = area[area < 0.6]  # such boxes fit whatever their ratio, so nothing was redrawn: uniform
    assert abs(small.mean() - 0.34) < 0.01
    slack = 1 - width > 0.1
    assert abs((left[slack] / (1 - width[slack])).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("area", "ratio", "box"),
    [
        ((1, 1), (3 / 4, 4 / 3), [0, 0, 1, 1]),
        ((1, 1), (2, 2), [0, 0.25, 1, 0.5]),
        ((1, 1), (0.5, 0.5), [0.25, 0, 0.5, 1]),
    ],
)
def test_a_crop_that_cannot_fit_becomes_the_largest_central_one(area, ratio, box):
    boxes = crops(uniforms(make_keys(3), 22, 1), area, ratio)
    np.testing.assert_allclose(boxes, [box] * 3, atol=1e-6)


@given(
    st.floats(0, 0.9),
    st.floats(0.1, 1),
    st.floats(0, 0.9),
    st.floats(0.1, 1),
    st.sampled_from([5, 16, 31]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_crop_and_resize_are_pillows(left, width, top, height, out_side, mirror):
    side = 16
    width, height = min(width, 1 - left), min(height, 1 - top)
    image = make_images(1, side)[0, 0]
    flip = torch.tensor([float(mirror)])
    columns = resampling(torch.tensor([left]), torch.tensor([width]), flip, side, out_side)[0]
    rows = resampling(torch.tensor([top]), torch.tensor([height]), torch.zeros(1), side, out_side)[0]
    box = (left * side, top * side, (left + width) * side, (top + height) * side)
    pillow = Image.fromarray(image.numpy()).resize((out_side, out_side), Image.Resampling.BILINEAR, box=box)
    expected = np.asarray(pillow)[:, ::-1] if mirror else np.asarray(pillow)
    np.testing.assert_allclose((rows @ image @ columns.T).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.7, 2.0])
def test_blur_is_a_mirrored_gaussian_convolution(sigma):
    side, reach = 12, 5
    image = make_images(1, side)[0, 0].numpy()
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma else (offsets == 0).astype(float)
    kernel /= kernel.sum()
    padded = np.pad(image, reach, mode="reflect")
    expected = np.zeros_like(image)
    for dy, a in zip(offsets, kernel, strict=True):
        for dx, b in zip(offsets, kernel, strict=True):
            expected += a * b * padded[reach + dy : reach + dy + side, reach + dx : reach + dx + side]
    blur = blurring(torch.tensor([sigma]), side, reach)[0].numpy()
    np.testing.assert_allclose(blur @ image @ blur.T, expected, atol=1e-6)


@pytest.mark.parametrize("side", [32, 64])
def test_a_blurred_copy_is_the_view_of_that_sigma_alone(side):
    images = make_images(3, side)
    view = ImageAugment(**NOTHING | {"blur_p": 1.0, "blur": (6.0, 6.0)}).apply(images, make_keys(3))
    torch.testing.assert_close(blurred(images, 6.0), view, atol=1e-5, rtol=0)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_a_localized_view_shows_nothing_outside_the_first_ones_crop_and_its_margin(margin):
    side, keys, others = 64, make_keys(40), make_keys(80)[40:]
    views = ImageAugment(**NOTHING | {"crop": (0.1, 0.5)})
    box, first = views.around(keys, margin), views.around(keys, 0.0)
    np.testing.assert_allclose(first, views._draw(keys)[:, :4], atol=1e-6)
    assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= 1 + 1e-6).all()
    assert (box[:, 2:] <= (1 + margin) * first[:, 2:] + 1e-6).all() and (box[:, 2:] >= first[:, 2:] - 1e-6).all()
    if margin:
        assert (box[:, 2:] > 1.19 * first[:, 2:]).any()  # where the image reaches far enough
    x = np.broadcast_to((np.arange(side) + 0.5) / side, (40, side, side))
    where = torch.from_numpy(np.stack([x, x.swapaxes(1, 2), x], 1).astype(np.float32))  # each pixel's own place
    seen = views.apply(where, others, within=box)
    edge = 0.5 / side + 1e-4
    for axis in (0, 1):
        assert (seen[:, axis].amin((1, 2)).numpy() >= np.maximum(box[:, axis], edge) - edge).all()
        assert (seen[:, axis].amax((1, 2)).numpy() <= box[:, axis] + box[:, axis + 2] + edge).all()
    assert not torch.equal(seen, views.apply(where, keys)) and not torch.equal(seen, views.apply(where, others))


def test_blur_scales_with_the_side():
    views = ImageAugment(**NOTHING | {"blur_p": 1.0, "blur": (2.0, 2.0)})
    point = torch.zeros(1, 3, 56, 56)
    point[:, :, 28, 28] = 1
    seen = views.apply(point, make_keys(1))[0, 0].sum(0)
    variance = (seen * (torch.arange(56) - 28) ** 2).sum() / seen.sum()
    assert variance == pytest.approx(0.5**2, rel=0.15)  # 2 px · 56 / 224


def colour(image: np.ndarray, *factors: float) -> np.ndarray:
    """image (H, W, 3) → the same after brightness, contrast, saturation, hue, gray, unclipped."""
    pixels = torch.from_numpy(image.reshape(-1, 3).T.astype(np.float32))[None]
    matrix, shift = colouring(torch.tensor(factors)[:, None], pixels.mean(2))
    return (matrix @ pixels + shift)[0].T.reshape(image.shape).numpy()


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3])
@pytest.mark.parametrize("at", range(3))
def test_jitter_is_pillows(at, factor):
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[at]
    image = np.random.default_rng(0).integers(70, 170, (8, 8, 3), dtype=np.uint8)  # no factor here makes it clip
    factors = [1.0, 1.0, 1.0, 0.0, 0.0]
    factors[at] = factor
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor))
    np.testing.assert_allclose(colour(image / 255, *factors) * 255, expected, atol=1.6)  # Pillow rounds twice


@pytest.mark.parametrize("turns", [-0.1, 0.05, 0.1])
@pytest.mark.parametrize("rgb", [(0.6, 0.4, 0.4), (0.4, 0.6, 0.4), (0.4, 0.4, 0.6), (0.55, 0.55, 0.45)])
def test_hue_turns_the_way_hsv_does_and_keeps_the_luma(rgb, turns):
    out = colour(np.array(rgb)[None, None], 1.0, 1.0, 1.0, turns, 0.0)[0, 0]
    luma = np.array([0.299, 0.587, 0.114])
    assert out @ luma == pytest.approx(rgb @ luma, abs=1e-5)
    turned = (colorsys.rgb_to_hsv(*out)[0] - colorsys.rgb_to_hsv(*rgb)[0] + 0.5) % 1 - 0.5
    assert turned == pytest.approx(turns, abs=0.05)  # YIQ's circle is a little out of round seen from HSV


def test_colour_steps_done_at_once_are_the_steps_in_any_order():
    image = np.random.default_rng(1).random((6, 6, 3))
    steps = [(1.4, 1, 1, 0, 0.0), (1, 0.6, 1, 0, 0.0), (1, 1, 1.5, 0, 0.0), (1, 1, 1, 0.07, 0.0)]
    at_once = colour(image, 1.4, 0.6, 1.5, 0.07, 0.0)
    for order in (steps, steps[::-1], steps[2:] + steps[:2]):
        one_by_one = image
        for step in order:
            one_by_one = colour(one_by_one, *map(float, step))
        np.testing.assert_allclose(one_by_one, at_once, atol=2e-6)
    gray_last = colour(at_once, 1.0, 1.0, 1.0, 0.0, 1.0)
    np.testing.assert_allclose(colour(image, 1.4, 0.6, 1.5, 0.07, 1.0), gray_last, atol=2e-6)


# refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.5),
        ("blur_p", -0.1),
        ("crop", (0.0, 1.0)),
        ("crop", (0.5, 0.2)),
        ("ratio", (2, 1)),
        ("jitter", (2, 0, 0, 0)),
        ("jitter", (0, 0, 0, 0.6)),
        ("blur", (2, 1)),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        ImageAugment(**{field: value})


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="square"):
        ImageAugment().apply(torch.rand(2, 3, 8, 9), make_keys(2))
    with pytest.raises(ValueError, match="keys"):
        ImageAugment().apply(torch.rand(2, 3, 8, 8), make_keys(3))
