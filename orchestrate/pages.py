"""Pages: a template of this folder filled in, everything that comes from data escaped. Each extends base.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrate import journal


def write(out: Path, template: str, content: dict[str, Any], **filters: Callable[..., str]) -> Path:
    """The page at `out`, whole or not at all; its folder is made."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(filters)
    out.parent.mkdir(parents=True, exist_ok=True)
    journal.replace(out, page.get_template(template).render(content).encode())
    return out
