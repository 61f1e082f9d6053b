"""What an attacker finds out: pixels and exact masks, a surrogate that is trained once, and gradients through it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defenses.base import Defense
from orchestrate import masks, prepared
from orchestrate.data import scenes
from orchestrate.data.index import open_dataset
from orchestrate.recipe import Model, resolve
from orchestrate.step import Learner
from orchestrate.study import ARCHITECTURE, SetStudy


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SetStudy:
    options = {"data.size": 160, "data.heldout": 28, "data.side": 48, "data.cache": str(tmp_path_factory.mktemp("cache"))}
    recipe = resolve("run", [("test", options)]).recipe
    return SetStudy(recipe, open_dataset(recipe.data), prepared.loader(recipe, None, None, None))


def again(study: SetStudy) -> SetStudy:
    return SetStudy(study.recipe, study.dataset, study.load)


def test_images_and_masks_are_those_of_the_scene(study: SetStudy) -> None:
    ids = study.dataset.train["id"].to_pylist()[3:6]
    images, found = study.images("train", ids), study.masks("train", ids)
    for name, image, mask in zip(ids, images, found, strict=True):
        made = scenes.scene(0, scenes.scene_index(name), 48)
        assert np.array_equal(image, made.image) and np.array_equal(mask, made.mask)


def test_a_surrogate_is_trained_once_and_the_same_again(study: SetStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study.surrogate(128, 1)
    ids = study.dataset.heldout["id"].to_pylist()
    features = study.image_features("heldout", ids)
    assert features.shape[0] == 28 and np.abs(np.linalg.norm(features, axis=1) - 1).max() < 1e-5
    assert np.array_equal(study.image_features("heldout", ids[5:2:-1]), features[5:2:-1])
    texts = study.text_features(["a red fish", "a blue cup"])
    other = again(study)
    monkeypatch.setattr(SetStudy, "_train", None)  # from the cache, or not at all
    other.surrogate(128, 1)
    assert np.array_equal(other.image_features("heldout", ids), features)
    assert np.array_equal(other.text_features(["a blue cup", "a red fish"])[::-1], texts)
    distance = study.transport("heldout", ids[0], ["a red fish", "a cup on sand near a blue key"])
    assert distance.shape == (2,) and (distance > 0).all() and (distance < 2).all()


def test_a_surrogate_does_not_start_from_the_weights_of_the_model_it_is_to_fool(study: SetStudy) -> None:
    recipe = study.recipe
    victim = Learner(Model(ARCHITECTURE), recipe.train, Defense(), seed=recipe.seed, total_steps=1, device="cpu").model.state_dict()
    first, twice = (study._learner(128, 1).model.cpu().state_dict() for _ in range(2))
    drawn = [name for name, weight in first.items() if weight.is_floating_point() and weight.ndim > 1]
    assert drawn and not any(torch.equal(first[name], victim[name]) for name in drawn)
    assert all(torch.equal(weight, twice[name]) for name, weight in first.items())


def test_the_gradient_in_pixels_is_that_of_the_model(study: SetStudy) -> None:
    study.surrogate(128, 1)
    images = study.images("train", study.dataset.train["id"].to_pylist()[:2]).astype(np.float32)
    way = np.random.default_rng(0).normal(size=study.text_features(["a"]).shape[1])

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float((x.astype(np.float64) @ way).sum()), np.broadcast_to(way, x.shape)

    value, gradient = study.pull_back(images, loss)
    assert gradient.shape == images.shape
    ahead, _ = study.pull_back(images + 0.5 * np.sign(gradient), loss)
    behind, _ = study.pull_back(images - 0.5 * np.sign(gradient), loss)
    assert (ahead - behind) == pytest.approx(np.abs(gradient).sum(), rel=0.15) and behind < value < ahead


def test_too_little_to_train_on_is_said(study: SetStudy) -> None:
    with pytest.raises(ValueError, match="at least 128 pairs"):
        again(study).surrogate(10, 1)


def test_saliency_finds_what_is_unlike_the_border() -> None:
    agree = []
    for number in range(20):
        made = scenes.scene(0, number, 64)
        guess = masks.salient(made.image[None])[0]
        agree.append((guess & made.mask).sum() / (guess | made.mask).sum())
    assert np.median(agree) > 0.5  # intersection over union; scenes have other objects and busy backgrounds


def test_supplied_masks_are_read_as_images_are(tmp_path: Path) -> None:
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 40:] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    found = masks.from_folder(str(tmp_path), ["a"], 20)[0]
    assert not found[:, :10].any() and found[:, 10:].all()  # the centre square
    for name in ("b", "../a"):
        with pytest.raises(ValueError, match=r"no mask .*leave `masks` empty"):
            masks.from_folder(str(tmp_path / "x") if name != "b" else str(tmp_path), [name], 20)
