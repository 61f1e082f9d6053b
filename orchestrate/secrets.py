"""Passwords and keys in addresses: found, and masked wherever a text is kept or shown. Recipes, logs, MLflow and reports hold none."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
# scheme://user:password@host and scheme://token@host; in abfs://container@account the part before @ is public
USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*)://(?P<user>[^/@\s'\"]+)@", re.IGNORECASE)
PUBLIC = ("abfs", "abfss", "wasb", "wasbs", "ssh", "git+ssh")
# ?sig=…, &access_key=… and their like, in an address or in a line of an environment
VALUE = re.compile(
    r"(?P<name>\b(?:[a-z0-9]+[_-])*(?:sig|signature|token|secret|password|passwd|access[_-]?key|secret[_-]?key|api[_-]?key|account[_-]?key))"
    r"=(?P<value>[^&\s'\";]+)",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text without passwords, tokens and keys in addresses."""
    return VALUE.sub(lambda m: f"{m['name']}={MASK}", USER.sub(_user, text))


def _user(found: re.Match[str]) -> str:
    public = found["scheme"].lower() in PUBLIC and ":" not in found["user"]
    return found[0] if public else f"{found['scheme']}://{MASK}@"


def credentials(text: str) -> bool:
    """Whether an address in the text holds one."""
    return "://" in text and masked(text) != text


def masked_tree(value: Any) -> Any:
    """The same of every text in nested plain values."""
    if isinstance(value, str):
        return masked(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: masked_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked_tree(inner) for inner in value]
    return value
