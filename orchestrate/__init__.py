"""The orchestrator. Importing it checks that the sibling rooms are ours.

The rooms are plain top-level packages, so a stray `models/` in the user's directory or site-packages could be imported instead:
a run that silently trains somebody else's code is worse than no run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _check_siblings() -> None:
    for room in ("models", "attacks", "defenses"):
        spec = importlib.util.find_spec(room)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != ROOT:
            raise ImportError(
                f"the package `{room}` that Python finds is {found or 'missing'}, not {ROOT / room}. "
                f"Start antidote from another directory, or take the other `{room}` off the Python path."
            )


_check_siblings()
