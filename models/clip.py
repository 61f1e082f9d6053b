"""CLIP models by name: configurations, construction from a seed, tokens in, pixels in.

A configuration is open_clip's `model_cfg` dict (`embed_dim`, `vision_cfg`, `text_cfg`). It may carry one key more,
`preprocess_cfg`, for a model whose pixel statistics are not OpenAI's. Nothing here downloads anything.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from models import tokens
from models.torchvision_door import open_clip

OPENAI_MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
_CONFIGS = resources.files("models") / "configs"


def names() -> list[str]:
    """Every name `config` and `build` know: our small configurations first, then open_clip's."""
    ours = sorted(entry.name.removesuffix(".json") for entry in _CONFIGS.iterdir() if entry.name.endswith(".json"))
    return ours + [name for name in open_clip.list_models() if name not in ours]


def config(name: str, image_size: int | None = None) -> dict[str, Any]:
    """The model_cfg of a named model, a fresh copy.

    image_size: side of the square input in pixels; None keeps the configuration's own. It must be a multiple of 32 for
    ResNets and of the patch size for ViTs.
    Raises ValueError for an unknown name or an image size that the tower cannot take.
    """
    ours = _CONFIGS / f"{name}.json"
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"No model is called {name!r}.{hint} models.clip.names() lists them all.")
    cfg: dict[str, Any] = json.loads(ours.read_text()) if ours.is_file() else open_clip.get_model_config(name)
    if image_size is not None:
        _check_image_size(name, cfg["vision_cfg"], image_size)
        cfg["vision_cfg"]["image_size"] = image_size
    return cfg


def _check_image_size(name: str, vision: Mapping[str, Any], image_size: int) -> None:
    if "timm_model_name" in vision:
        if image_size != vision.get("image_size", 224):
            raise ValueError(
                f"{name} has a timm tower built for {vision.get('image_size', 224)} pixels; its size cannot be changed. "
                "Leave image_size out, or choose a configuration made for that size."
            )
        return
    step = 32 if isinstance(vision["layers"], (list, tuple)) else int(vision["patch_size"])
    if image_size < step or image_size % step:
        near = max(step, round(image_size / step) * step)
        raise ValueError(f"{name} needs an image_size that is a multiple of {step}, not {image_size}; try {near}.")


def build(name: str | Mapping[str, Any], *, image_size: int | None = None, seed: int) -> nn.Module:
    """An open_clip model on the CPU in float32, in training mode, with weights drawn from `seed` alone.

    name: a name from `names()`, or a model_cfg dict (then image_size must stay None). The caller's random state is left
    as it was. The model keeps its configuration as `model.model_cfg`.
    Raises ValueError for unknown names, and for text towers that would have to be fetched from the Hugging Face hub.
    """
    if isinstance(name, str):
        cfg = config(name, image_size)
    elif image_size is None:
        cfg = deepcopy(dict(name))
    else:
        raise ValueError("image_size goes with a model name; in a model_cfg dict set vision_cfg['image_size'].")
    # Not torch.manual_seed: that would also reseed the accelerators, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _opened(construct(cfg))


def _opened(model: nn.Module) -> nn.Module:
    """ResNets of one block a stage start with their residual branches open.

    open_clip starts each branch's last norm at zero, so that a deep net begins shallow. With one block a stage that leaves hardly a
    3 × 3 convolution after the stem, and the net learns shapes about half as fast (measured on the scenes set).
    """
    visual: Any = model.visual
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        for name, parameter in visual.named_parameters():
            if name.endswith("bn3.weight") and max(map(len, (visual.layer1, visual.layer2, visual.layer3, visual.layer4))) == 1:
                nn.init.ones_(parameter)
    return model


def construct(cfg: Mapping[str, Any]) -> nn.Module:
    """The open_clip module of a model_cfg, on torch's current default device, weights from torch's current random state.

    Raises ValueError for a model_cfg without its towers, and for towers that would have to be fetched. What else is wrong in it,
    open_clip meets wherever it first uses it.
    """
    sections = [key for key in ("vision_cfg", "text_cfg") if not isinstance(cfg.get(key), dict)]
    if sections:
        raise ValueError(f"A model_cfg needs {' and '.join(sections)}; see models.clip.config('RN50') for one that is whole.")
    kept = deepcopy(dict(cfg))
    arguments = {key: value for key, value in deepcopy(kept).items() if key not in ("preprocess_cfg", "custom_text")}
    vision, text = arguments["vision_cfg"], arguments["text_cfg"]
    if text.get("hf_model_name"):
        raise ValueError(
            f"The text tower {text['hf_model_name']!r} comes from the Hugging Face hub, and models are built without "
            "downloads here. Choose a configuration whose text_cfg has no hf_model_name."
        )
    if "timm_model_name" in vision:
        # timm takes names such as hf-hub:ORG/NAME and local-dir:PATH too, whatever `pretrained` says.
        if not re.fullmatch(r"[\w.-]+", str(vision["timm_model_name"])):
            raise ValueError(
                f"The image tower {vision['timm_model_name']!r} is not one of timm's own, and models are built without downloads here. "
                "Choose a configuration whose timm_model_name is a plain name, as timm.list_models() has it."
            )
        vision["timm_model_pretrained"] = False
    family = open_clip.CustomTextCLIP if kept.get("custom_text") else open_clip.CLIP
    model: nn.Module = (open_clip.CoCa if "multimodal_cfg" in arguments else family)(**arguments)
    model.model_cfg = kept  # type: ignore[assignment]
    return model


def tokenize(model_or_cfg: nn.Module | Mapping[str, Any], captions: Sequence[str]) -> Tensor:
    """Token ids (n, L) int64 of n captions, the ids of `open_clip.get_tokenizer` with the common padding cut off.

    L is the longest caption of the batch, at most the context length; a truncated caption keeps its end token. Captions
    are cached (least recently used out first), because byte-pair encoding in Python is slow.
    Raises ValueError when the model's tokenizer is not open_clip's own and is not on this machine.
    """
    if type(captions) is str:
        raise ValueError("tokenize takes a sequence of captions, not one string; pass [caption].")
    text = text_config(model_or_cfg)
    return tokens.encode(text, captions)


def text_config(model_or_cfg: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The `text_cfg` of a model or a model_cfg; for models built elsewhere, what the module itself tells."""
    if isinstance(model_or_cfg, Mapping):
        return dict(model_or_cfg["text_cfg"])
    kept = getattr(model_or_cfg, "model_cfg", None)
    if isinstance(kept, Mapping):
        return dict(kept["text_cfg"])
    module: Any = model_or_cfg
    if not hasattr(module, "context_length"):
        raise ValueError(
            f"{type(model_or_cfg).__name__} is not a CLIP model; pass the model itself (of a DistributedDataParallel "
            "wrapper, `.module`) or its model_cfg."
        )
    return {"context_length": int(module.context_length), "vocab_size": int(module.vocab_size)}


def image_stats(cfg: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel for pixels in [0, 1]: OpenAI's, unless `cfg["preprocess_cfg"]` names others."""
    preprocess = cfg.get("preprocess_cfg") or {}
    return tuple(preprocess.get("mean") or OPENAI_MEAN), tuple(preprocess.get("std") or OPENAI_STD)


def size(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in px of the model's input."""
    given = cfg["vision_cfg"].get("image_size", 224)  # open_clip's default
    return (given, given) if isinstance(given, int) else (given[0], given[1])


def side(cfg: Mapping[str, Any]) -> int:
    """Side in px of the model's input; the height, where it is not square."""
    return size(cfg)[0]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 3, H, W) in [0, 1] → (N, 3, *size): bicubic with antialias, clamped; unchanged where they have the size."""
    if tuple(images.shape[2:]) == size:
        return images
    return nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std for images (N, 3, H, W), float in [0, 1]. Raises ValueError for integer pixels."""
    if not images.is_floating_point():
        raise ValueError(f"normalise takes float pixels in [0, 1], not {images.dtype}; divide uint8 pixels by 255 first.")
    centre = torch.tensor(mean, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return (images - centre) / scale
