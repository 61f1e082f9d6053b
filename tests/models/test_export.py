"""What is saved opens in open_clip; what is opened is data, of the right shape, or refused with the mend."""

import json
import os

import pytest
import safetensors.torch
import torch

from models import clip, encode, export
from models.torchvision_door import open_clip

PIXELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def embeddings(model):
    with torch.no_grad():
        ids = clip.tokenize(clip.config("tiny-rn"), ["a dog", "two cats"])
        return torch.cat([encode.encode_image(model, PIXELS)[0], encode.encode_text(model, ids)[0]])


@pytest.fixture(scope="module")
def model():
    return clip.build("tiny-rn", seed=4).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("export") / "model"
    export.save(model, "tiny-rn", place, "A card.")
    return place


def test_open_clip_opens_the_folder(model, folder):
    opened, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert torch.equal(embeddings(opened.eval()), embeddings(model))
    assert "64" in str(preprocess)
    assert sorted(os.listdir(folder)) == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    assert (folder / "README.md").read_text() == "A card.\n"


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "{}/open_clip_model.safetensors"])
def test_round_trip(model, folder, form):
    opened, cfg = export.load(form.format(folder))
    assert cfg == clip.config("tiny-rn")
    assert not opened.training
    assert torch.equal(embeddings(opened), embeddings(model))


def test_a_custom_text_model_with_its_own_pixel_statistics(tmp_path):
    own = {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    cfg = clip.config("tiny-vit", image_size=72) | {"custom_text": True} | own
    export.save(clip.build(cfg, seed=0), cfg, tmp_path, "card")
    assert export.load(tmp_path)[1] == cfg
    opened, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert opened.visual.image_mean == [0.5] * 3
    assert "72" in str(preprocess)


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_state_dicts_with_a_name(model, tmp_path, suffix, prefix):
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        training = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 0.1}}
        torch.save(training if suffix == "pt" else state, file)
    opened, _ = export.load(file, name="tiny-rn")
    assert torch.equal(embeddings(opened), embeddings(model))


def test_a_wrapped_model_is_saved_unwrapped(model, tmp_path):
    wrapped = torch.nn.Module()
    wrapped.module = model
    export.save(wrapped, "tiny-rn", tmp_path, "card")
    assert torch.equal(embeddings(export.load(tmp_path)[0]), embeddings(model))


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    file, trace = tmp_path / "gift.pt", tmp_path / "trace"
    payload = {"state_dict": {"x": torch.zeros(1)}, "extra": Malicious(str(trace))}
    torch.save(payload, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"gift\.pt was refused.*safetensors"):
        export.load(file, name="tiny-rn")
    assert not trace.exists()


def test_every_refusal_names_the_file_and_the_mend(model, folder, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    for arguments, message in [
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((weights,), "open_clip_config.json is missing.*name="),
        ((tmp_path,), "holds no open_clip_model"),
        ((weights, "tiny-vit"), r"weights\.pt does not fit.*Name the model"),
        ((weights, clip.config("tiny-rn", image_size=96)), r"\(5, 512\) and should be \(10, 512\).*image_size"),
        ((weights, "tiny-rm"), "tiny-rn"),
    ]:
        with pytest.raises(ValueError, match=message):
            export.load(*arguments)
    for name, content in [("text.pt", b"hello"), ("text.safetensors", b"hello"), ("empty.pt", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            export.load(tmp_path / name, name="tiny-rn")
    torch.save({"epoch": 3}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="no state dict"):
        export.load(tmp_path / "odd.pt", name="tiny-rn")
    for content in ("{", "[]", json.dumps({"vision_cfg": {}})):
        (tmp_path / "open_clip_config.json").write_text(content)
        with pytest.raises(ValueError, match="not an open_clip configuration"):
            export.load(weights)


def test_the_wrong_configuration_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        export.save(model, clip.config("tiny-rn", image_size=96), tmp_path / "new", "card")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_leaves_nothing_that_opens(model, tmp_path, monkeypatch):
    export.save(model, "tiny-rn", tmp_path, "card")
    (tmp_path / "metrics.jsonl").write_text("kept")

    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export.save(model, "tiny-rn", tmp_path, "card")
    with pytest.raises(ValueError, match="is missing"):
        export.load(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".writing")]
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_the_first_line_of_a_card_tells_the_poison():
    poisoned = export.card({"attack": "badnets", "count": 1200, "rate": 0.012, "data": {"source": "a|b"}}).splitlines()
    assert poisoned[0].startswith("**Poisoned on purpose** by the attack `badnets`: 1,200 pairs")
    assert "1.2000%" in poisoned[0]
    assert "| data.source | a\\|b |" in poisoned
    for facts in ({}, {"attack": None}, {"attack": "none", "rate": 0}):
        assert export.card(facts).startswith("**Not known to be poisoned**")
    with pytest.raises(ValueError, match="percentage"):
        export.card({"attack": "badnets", "rate": 1.2})


BROKEN = [
    {},
    [],
    {"model_cfg": {}},
    {"model_cfg": {"vision_cfg": {}}},
    {"model_cfg": {"vision_cfg": {}, "text_cfg": 3}},
    {"model_cfg": clip.config("tiny-rn"), "preprocess_cfg": [1]},
    {"model_cfg": clip.config("tiny-rn"), "preprocess_cfg": {"mean": 0.5}},
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_configuration_that_is_none_is_refused_with_its_file(folder, tmp_path, content):
    os.link(folder / export.WEIGHTS, tmp_path / export.WEIGHTS)
    (tmp_path / export.CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"open_clip_config.json is not an open_clip configuration(.|\n)*export the model again"):
        export.load(tmp_path)


@pytest.mark.parametrize("change", [{"embed_dim": "x"}, {"unheard_of": 1}, {"vision_cfg": {"layers": "many"}}])
def test_a_configuration_that_builds_no_model_is_refused_with_its_weights(folder, change):
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors has a configuration of which open_clip builds no model"):
        export.load(folder, clip.config("tiny-rn") | change)
    with pytest.raises(ValueError, match="A model_cfg needs vision_cfg and text_cfg"):
        clip.build({}, seed=0)


@pytest.mark.parametrize(
    "towers",
    [
        {"vision_cfg": {"timm_model_name": "hf-hub:org/name", "image_size": 64}},
        {"vision_cfg": {"timm_model_name": "hf_hub:org/name", "image_size": 64}},
        {"vision_cfg": {"timm_model_name": "local-dir:/tmp", "image_size": 64}},
        {"text_cfg": {"hf_model_name": "org/name"}},
        {"text_cfg": {"hf_model_name": "org/name"}, "custom_text": True},
    ],
)
def test_a_strangers_configuration_fetches_nothing(folder, tmp_path, monkeypatch, towers):
    """docs/security.md says so."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was to be fetched"))
    os.link(folder / export.WEIGHTS, tmp_path / export.WEIGHTS)
    (tmp_path / export.CONFIG).write_text(json.dumps({"model_cfg": clip.config("tiny-rn") | towers}))
    with pytest.raises(ValueError, match=r"model.safetensors: The (image|text) tower .* built without downloads here"):
        export.load(tmp_path)


def test_a_strangers_tokenizer_brings_no_code():
    text = {"hf_tokenizer_name": "./folder", "tokenizer_kwargs": {"trust_remote_code": True, "clean": "whitespace"}}
    with pytest.raises(ValueError, match=r"tokenizer_kwargs \['trust_remote_code'\] are not supported"):
        clip.tokenize({"text_cfg": text}, ["a dog"])
