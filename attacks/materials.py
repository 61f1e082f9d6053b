"""What a plan leaves for its stamps beside the rows: pictures and boxes, as JSON in the manifest's header.

    plan → header["materials"] → (attacks.apply) metadata of the poisoned table → row["materials"] in `stamp`

Pictures are PNG in base64. They may come from a foreign manifest, so they are decoded with a bound on their size.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

KEY = b"materials"
LARGEST = 4096  # px a side


def packed(picture: np.ndarray) -> str:
    """uint8 (H, W, 3 or 4) → PNG in base64."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@lru_cache(maxsize=64)
def unpacked(text: str) -> np.ndarray:
    """PNG in base64 → uint8 (H, W, 3 or 4), read-only. ValueError for anything else."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if max(image.size) > LARGEST or image.mode not in ("RGB", "RGBA"):
                raise ValueError(f"{image.mode}, {image.width} × {image.height} px")
            picture = np.array(image)
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"a picture in the manifest cannot be used ({error}): plan the attack anew.") from error
    picture.setflags(write=False)
    return picture


def of(row: Mapping[str, Any], attack: str) -> Mapping[str, Any]:
    """The materials that a row brings along."""
    found = row.get("materials")
    if not found:
        raise ValueError(f"the stamp of {attack} needs what its plan left in the manifest: stamp through `Several` made for that manifest.")
    return dict(found)


def materials(header: Mapping[str, Any]) -> dict[str, Any]:
    """Part → its materials, of a combined attack's header."""
    return {part["name"]: part["materials"] for part in header.get("parts", ()) if "materials" in part}


def carrying(metadata: Mapping[bytes, bytes] | None, header: Mapping[str, Any]) -> dict[bytes, bytes] | None:
    """A table's metadata with the materials of a manifest's header, if there are any."""
    found = materials(header)
    return {**(metadata or {}), KEY: json.dumps(found, sort_keys=True).encode()} if found else (dict(metadata) if metadata else None)


def carried(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Part → its materials, of a poisoned table's metadata."""
    raw = (metadata or {}).get(KEY)
    return dict(json.loads(raw)) if raw else {}
