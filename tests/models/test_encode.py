"""Embeddings equal open_clip's; token sets are what METHODS calls local features."""

import pytest
import torch
from torch.nn import functional as F

from models import clip, encode
from models.torchvision_door import open_clip

CAPTIONS = ["a dog", "", "two cats!! on a mat! hello there", "word " * 60]
PIXELS = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def variant(name="tiny-vit", vision=(), text=(), **top):
    cfg = clip.config(name)
    return cfg | {"vision_cfg": cfg["vision_cfg"] | dict(vision), "text_cfg": cfg["text_cfg"] | dict(text)} | top


MODELS = {
    "resnet": variant("tiny-rn"),
    "vit": variant(),
    "custom": variant("tiny-rn", custom_text=True),
    "linear": variant(text={"proj_bias": True}, custom_text=True),
    "no-projection": variant(text={"proj_type": "none"}),
    "bidirectional": variant(text={"no_causal_mask": True}, custom_text=True),
    "eos": variant(text={"pool_type": "eos", "eos_id": 49407}, custom_text=True),
    "eos-plain": variant(text={"pool_type": "eos", "eos_id": 49407}, quick_gelu=True),
    "average": variant(vision={"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}),
}


def made(cfg):
    """A model in evaluation whose norms, biases and running statistics are not the do-nothing ones of a fresh model."""
    model = clip.build(cfg, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.3 if "var" in key else 0.2)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return made(MODELS[request.param])


@torch.no_grad()
def test_images(model):
    expected = model.encode_image(PIXELS, normalize=True)
    alone, *nothing = encode.encode_image(model, PIXELS)
    pooled, tokens, mask = encode.encode_image(model, PIXELS, tokens=True)
    assert nothing == [None, None]
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    assert mask.shape == tokens.shape[:2] and mask.all()
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones_like(tokens[..., 0]))


@torch.no_grad()
def test_texts(model):
    ids = clip.tokenize(model, CAPTIONS)[:3, :12]
    expected = model.encode_text(F.pad(ids, (0, 32 - ids.shape[1])), normalize=True)
    alone, *nothing = encode.encode_text(model, ids)
    pooled, tokens, mask = encode.encode_text(model, ids, tokens=True)
    assert nothing == [None, None]
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    assert tokens.shape == (*ids.shape, 128)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones_like(tokens[..., 0]))
    end = ids.argmax(-1)
    assert mask.sum(1).tolist() == end.tolist()  # from the first token after the start to the end token
    assert not mask[:, 0].any()
    torch.testing.assert_close(tokens[torch.arange(3), end], pooled)  # the pooled text is the end token


@torch.no_grad()
def test_the_full_context_and_a_model_not_built_here():
    foreign = open_clip.CLIP(**clip.config("tiny-rn")).eval()
    ids = clip.tokenize(foreign, CAPTIONS)
    assert ids.shape == (4, 32)
    torch.testing.assert_close(encode.encode_text(foreign, ids)[0], foreign.encode_text(ids, normalize=True))
    with pytest.raises(ValueError, match="33 tokens"):
        encode.encode_text(foreign, F.pad(ids, (0, 1)))


@torch.no_grad()
def test_a_pool_that_attends_to_one_position_returns_its_token():
    model = made(MODELS["resnet"])
    pool = model.visual.attnpool
    for projection in (pool.q_proj, pool.k_proj):
        projection.weight.zero_()
        projection.bias.zero_()
    pool.q_proj.bias.fill_(1.0)
    pool.k_proj.weight[:, 0] = 1.0
    pool.positional_embedding[1 + 2, 0] += 300.0
    pooled, tokens, _ = encode.encode_image(model, PIXELS, tokens=True)
    torch.testing.assert_close(pooled, tokens[:, 2])


@torch.no_grad()
def test_vit_tokens_are_patches_through_the_class_tokens_projection():
    model = made(MODELS["vit"])
    model.visual.output_tokens = True
    _, patches = model.visual(PIXELS)
    model.visual.output_tokens = False
    expected = F.normalize(patches @ model.visual.proj, dim=-1)
    torch.testing.assert_close(encode.encode_image(model, PIXELS, tokens=True)[1], expected)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_trunk_runs_once_and_gradients_reach_it(name):
    model = made(MODELS[name]).train()
    calls = []
    model.visual.conv1.register_forward_hook(lambda *_: calls.append(1))
    pooled, tokens, _ = encode.encode_image(model, PIXELS, tokens=True)
    (pooled.sum() + tokens.sum()).backward()
    assert len(calls) == 1
    assert model.visual.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet", "vit", "custom"])
def test_bfloat16_autocast_returns_float32_near_the_exact_embedding(name):
    model = made(MODELS[name])
    ids = clip.tokenize(model, CAPTIONS)
    exact = [*encode.encode_image(model, PIXELS, True)[:2], *encode.encode_text(model, ids, True)[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [*encode.encode_image(model, PIXELS, True)[:2], *encode.encode_text(model, ids, True)[:2]]
    for rough, fine in zip(cast, exact, strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, fine, rtol=0, atol=0.05)
        torch.testing.assert_close(rough.norm(dim=-1), torch.ones_like(rough[..., 0]))


@torch.no_grad()
@pytest.mark.parametrize("pooling", [{"pool_type": "last"}, {"embed_cls": True}])
def test_texts_pooled_elsewhere_have_no_token_set(pooling):
    model = made(variant(text=pooling, custom_text=True))
    ids = clip.tokenize(model, CAPTIONS[:3])
    expected = model.encode_text(F.pad(ids, (0, 32 - ids.shape[1])), normalize=True)
    torch.testing.assert_close(encode.encode_text(model, ids)[0], expected)
    with pytest.raises(ValueError, match="end token"):
        encode.encode_text(model, ids, tokens=True)


@torch.no_grad()
def test_timm_towers_pool_but_have_no_token_set():
    tower = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    model = made(variant() | {"vision_cfg": tower})
    pixels = torch.rand(2, 3, 160, 160)
    torch.testing.assert_close(encode.encode_image(model, pixels)[0], model.encode_image(pixels, normalize=True))
    with pytest.raises(ValueError, match="ModifiedResNet"):
        encode.encode_image(model, pixels, tokens=True)
