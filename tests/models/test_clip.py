"""Configurations, construction from a seed, pixel statistics, and the door to open_clip."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import clip, torchvision_door
from models.torchvision_door import open_clip

OURS = ["small-rn", "tiny-rn", "tiny-vit"]


def test_importing_the_package_alone_does_not_import_torch():
    code = "import models, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(clip.__file__).parents[1], check=True)


def test_the_door_does_nothing_where_torchvision_imports():
    assert torchvision_door._declare_missing_operators() is None
    assert open_clip is sys.modules["open_clip"]


def test_names_hold_ours_and_every_architecture_of_open_clip():
    names = clip.names()
    assert names[:3] == OURS
    assert set(open_clip.list_models()) <= set(names)
    assert len(names) == len(set(names))


def test_config_is_a_fresh_copy_equal_to_open_clips():
    first = clip.config("RN50")
    first["vision_cfg"]["width"] = 1
    assert clip.config("RN50") == open_clip.get_model_config("RN50")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="tiny-rn"):
        clip.config("tiny_rn")
    with pytest.raises(ValueError, match="names"):
        clip.config("../configs/tiny-rn")


@pytest.mark.parametrize(("name", "good", "bad"), [("tiny-rn", 96, 80), ("tiny-vit", 72, 60), ("RN50", 192, 0)])
def test_image_size_must_fit_the_tower(name, good, bad):
    assert clip.config(name, image_size=good)["vision_cfg"]["image_size"] == good
    with pytest.raises(ValueError, match="multiple of"):
        clip.config(name, image_size=bad)


def test_a_timm_tower_keeps_its_size():
    with pytest.raises(ValueError, match="timm"):
        clip.config("convnext_base", image_size=64)


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_weights_follow_from_the_seed_and_leave_the_global_state_alone(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (clip.build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_another_image_size_builds_and_runs():
    model = clip.build("tiny-rn", image_size=96, seed=0).eval()
    assert model.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 128)
    assert model.model_cfg["vision_cfg"]["image_size"] == 96


def test_a_configuration_builds_the_model_of_its_name():
    named, given = clip.build("tiny-vit", seed=3), clip.build(clip.config("tiny-vit"), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), given.parameters(), strict=True))
    with pytest.raises(ValueError, match="image_size"):
        clip.build(clip.config("tiny-vit"), image_size=64, seed=3)


def test_towers_that_would_be_downloaded_are_refused():
    with pytest.raises(ValueError, match="downloads"):
        clip.build("roberta-ViT-B-32", seed=0)


def test_pixel_statistics_are_open_clips():
    assert (clip.OPENAI_MEAN, clip.OPENAI_STD) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert clip.image_stats(clip.config("tiny-rn")) == (clip.OPENAI_MEAN, clip.OPENAI_STD)
    half = clip.config("tiny-rn") | {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    mean, std = clip.image_stats(half)
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    assert clip.normalise(images, mean, std).flatten().tolist() == [-2.0, 0.0, 2.0]


def test_integer_pixels_are_refused():
    with pytest.raises(ValueError, match="255"):
        clip.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), clip.OPENAI_MEAN, clip.OPENAI_STD)
