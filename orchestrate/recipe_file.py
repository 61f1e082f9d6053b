"""A recipe.json read from a file that the user named, or found in a directory, which may have come from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from orchestrate.recipe import METHODS, flatten


def read(file: Path) -> dict[str, Any]:
    """The recipe's tree. ValueError, with the file's name, where there is none."""
    if not file.is_file():
        raise ValueError(f"no file {file}. A finished run keeps its recipe in runs/<run>/recipe.json.")
    try:
        tree = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: a recipe is a JSON object with sections such as data and train, not a {type(tree).__name__}.")
    return tree


def found(file: Path, told: Collection[str]) -> dict[str, Any]:
    """`read`, of a directory that the user named. ValueError where a method of it, other than those `told` by the user, is code of a file
    or module: who names a directory has not said that its code may run."""
    tree = read(file)
    for method, use in flatten(tree).items():
        if method in METHODS and method not in told and ":" in str(use):
            raise ValueError(
                f"{file}: its {method} is code, {use}, and a directory may have come from elsewhere. If you trust that file, say so "
                f"with --recipe {file}; or choose another, as {method}=…, or {method}=none."
            )
    return tree
