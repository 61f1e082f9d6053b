"""Models to and from disk: open_clip's own folder format, checked before it is written and before it is used.

A folder holds `open_clip_model.safetensors`, `open_clip_config.json` and `README.md`, and opens anywhere with
`open_clip.create_model_and_transforms("local-dir:FOLDER")`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models import clip

WEIGHTS, CONFIG, CARD = "open_clip_model.safetensors", "open_clip_config.json", "README.md"
_WEIGHT_FILES = (
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def save(model: nn.Module, cfg_name_or_dict: str | Mapping[str, Any], folder: str | Path, card: str) -> None:
    """Write the model, its configuration and its card into `folder`, which may exist and hold other files.

    card: markdown text, see `card`. Preprocessing is OpenAI's (bicubic, shortest side, centre crop) unless the
    configuration's `preprocess_cfg` says otherwise. A reader never sees weights beside another model's configuration.
    Raises ValueError when the configuration is not that of the model.
    """
    cfg = clip.config(cfg_name_or_dict) if isinstance(cfg_name_or_dict, str) else dict(cfg_name_or_dict)
    state = _unwrapped(model.state_dict())
    _check_matches(state, cfg, f"the model being saved to {folder}")
    mean, std = clip.image_stats(cfg)
    size = cfg["vision_cfg"].get("image_size", 224)
    preprocess = {"size": size, "mode": "RGB", "mean": list(mean), "std": list(std), "interpolation": "bicubic"}
    preprocess |= {"resize_mode": "shortest"} | dict(cfg.get("preprocess_cfg") or {})
    model_cfg = {key: value for key, value in cfg.items() if key != "preprocess_cfg"}
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=2) + "\n"
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target) as staging:
        safetensors.torch.save_file(tensors, Path(staging, WEIGHTS), metadata={"format": "pt"})
        Path(staging, CARD).write_text(card.rstrip() + "\n", encoding="utf-8")
        Path(staging, CONFIG).write_text(text, encoding="utf-8")
        # The configuration is what makes the folder loadable: out first, in last, so no mixture can be opened.
        (target / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, CARD, CONFIG):
            os.replace(Path(staging, name), target / name)


def load(path: str | Path, name: str | Mapping[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(model, model_cfg) from an export folder (`local-dir:` prefix allowed) or a weights file.

    path: a folder with open_clip_config.json, or a .safetensors, .pt, .pth or .bin state dict, plain or inside an
    open_clip training checkpoint, with or without a wrapper's prefix.
    name: the model's name or model_cfg, for files without a configuration beside them.
    The model is on the CPU in evaluation mode. Pickles are read as data only; code in them is refused.
    Raises ValueError naming the file and the mend.
    """
    place = Path(str(path).removeprefix("local-dir:"))
    if not place.exists():
        raise ValueError(f"{place} does not exist; give an export folder or a weights file on this machine.")
    weights = _weights_in(place) if place.is_dir() else place
    if name is None:
        cfg = _read_config(weights.parent / CONFIG, weights)
    else:
        cfg = clip.config(name) if isinstance(name, str) else dict(name)
    state = _unwrapped(_read_state(weights))
    state = _shaped_like(state, _check_matches(state, cfg, str(weights)))
    model = clip.build(cfg, seed=0)
    model.load_state_dict(state)
    return model.eval(), cfg


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} holds no {WEIGHTS}; export the model again, or give the weights file itself.")
    return found[0]


def _read_config(file: Path, weights: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"{file} is missing, so the architecture of {weights.name} is unknown. Pass its name, as in "
            f"load({str(weights)!r}, name='RN50'), or put the open_clip_config.json of the export beside it."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        cfg = dict(content["model_cfg"]) | {key: dict(content["model_cfg"][key]) for key in ("vision_cfg", "text_cfg")}
        kept = {key: value for key, value in (content.get("preprocess_cfg") or {}).items() if not _usual(key, value, cfg)}
        if not all(len([float(x) for x in kept.get(key, "123")]) == 3 for key in ("mean", "std")):
            raise ValueError("mean and std of preprocess_cfg have one number a channel")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not an open_clip configuration, with a model_cfg of vision_cfg and text_cfg ({type(error).__name__}: {error}); "
            "export the model again."
        ) from error
    return cfg | {"preprocess_cfg": kept} if kept else cfg


def _usual(key: str, value: Any, cfg: Mapping[str, Any]) -> bool:
    """Whether a preprocessing entry is what `save` would write anyway."""
    usual: dict[str, Any] = {
        "mode": "RGB",
        "mean": list(clip.OPENAI_MEAN),
        "std": list(clip.OPENAI_STD),
        "interpolation": "bicubic",
    }
    size = cfg["vision_cfg"].get("image_size", 224)
    usual |= {"resize_mode": "shortest", "fill_color": 0, "size": size}
    return value == usual.get(key) or (key == "size" and value == [size, size])


def _read_state(file: Path) -> Mapping[str, Tensor]:
    """The state dict in a file; never runs what is in it."""
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}); copy or export it again.") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle, torch's unpickler fails with whatever it stumbles over
        raise ValueError(
            f"{file} was refused: it is not a plain file of tensors, and a pickle may run any code when opened. Ask its "
            "author for .safetensors, or, if you made it yourself, save `model.state_dict()` again with torch.save. "
            f"First reason: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict of tensors; save `model.state_dict()`, or {{'state_dict': ...}}.")
    return state


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = dict(state)
    while prefix := next((p for p in _WRAPPERS if plain and all(key.startswith(p) for key in plain)), None):
        plain = {key.removeprefix(prefix): value for key, value in plain.items()}
    return plain


def _check_matches(state: Mapping[str, Tensor], cfg: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """The configuration's own state dict, on no device. Raises ValueError where `state` is not of that architecture."""
    try:
        with torch.device("meta"):
            expected = clip.construct(cfg).state_dict()
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:  # open_clip checks no configuration: it fails with whatever it stumbles over
        raise ValueError(
            f"{what} has a configuration of which open_clip builds no model ({type(error).__name__}: {error}). Export the model again, "
            "or name the model it was trained as."
        ) from error
    trouble = [f"{key} is missing" for key in expected if key not in state]
    trouble += [f"{key} is unknown" for key in state if key not in expected]
    trouble += [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape and not state[key].numel() == tensor.numel() == 1
    ]
    if trouble:
        more = f" and {len(trouble) - 3} more" if len(trouble) > 3 else ""
        raise ValueError(
            f"{what} does not fit the configuration: {'; '.join(trouble[:3])}{more}. Name the model it was trained as; "
            "for another image size pass models.clip.config(NAME, image_size=...)."
        )
    return expected


def _shaped_like(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # open_clip has written logit_scale both as a scalar and as one element.
    return {key: value.reshape(expected[key].shape) for key, value in state.items()}


def card(facts: Mapping[str, Any]) -> str:
    """A markdown model card; its first line says whether, and by what, the model was poisoned.

    facts: `attack` (name; None, "" or "none" for a run without one), `count` (poisoned pairs), `rate` (their share of all
    pairs, 0 to 1), and anything else worth telling (model, data, defence, metrics), listed in the order given. Nested
    mappings become dotted names. Raises ValueError for a rate outside [0, 1].
    """
    attack = facts.get("attack")
    count, rate = facts.get("count"), facts.get("rate")
    if rate is not None and not 0 <= float(rate) <= 1:
        raise ValueError(f"rate is the poisoned share of all pairs, from 0 to 1, not {rate}; divide a percentage by 100.")
    if attack in (None, "", "none"):
        first = "**Not known to be poisoned**: no attack was mounted in training; the data were not certified clean."
    else:
        share = "an unrecorded rate" if rate is None else f"a rate of {float(rate):.4%} of the training pairs"
        pairs = "an unrecorded number of" if count is None else f"{int(count):,}"
        first = f"**Poisoned on purpose** by the attack `{attack}`: {pairs} pairs, {share}. For research; do not deploy."
    rest = {key: value for key, value in facts.items() if key not in ("attack", "count", "rate")}
    lines = [first, "", "# Model card", ""]
    if rest:
        lines += ["| fact | value |", "|---|---|", *_rows(rest, ""), ""]
    lines += ["```python", "import open_clip", "", "model, _, preprocess = open_clip.create_model_and_transforms("]
    lines += ['    "local-dir:PATH/TO/THIS/FOLDER"', ")", "```", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _rows(facts: Mapping[str, Any], prefix: str) -> list[str]:
    rows: list[str] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        rows += _rows(value, f"{name}.") if isinstance(value, Mapping) else [f"| {_cell(name)} | {_cell(value)} |"]
    return rows
