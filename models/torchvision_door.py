"""The one door to open_clip: `from models.torchvision_door import open_clip`.

open_clip and timm import torchvision, and torchvision's compiled operators match one torch build only. Beside a CPU-only
torch, PyPI's torchvision stops at import with "operator torchvision::nms does not exist". Nothing here calls those
operators, so where (and only where) that happens we declare their signatures and import again. The transforms then work;
`torchvision.io` and nms stay unavailable. It has to happen before the first import of open_clip in every process.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

_DECLARED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declare_missing_operators() -> Any:
    """Import torchvision; declare its operators if they are missing. Returns what must stay alive, or None."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return None
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    registry: Any = torch.library
    library = registry.Library("torchvision", "FRAGMENT")
    for signature in _DECLARED:
        library.define(signature)
    importlib.import_module("torchvision")
    return library


# The declarations vanish with the object, so the module holds it for as long as the process lives.
_library = _declare_missing_operators()

open_clip: Any = importlib.import_module("open_clip")
