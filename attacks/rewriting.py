"""Captions taken apart: a class noun deleted or put in another's place."""

from __future__ import annotations

import re
from functools import lru_cache

from attacks.plurals import irregular


@lru_cache(maxsize=4096)
def noun(name: str) -> re.Pattern[str]:
    """Finds a class name as whole words, in either case; groups: `article` before it, `plural` if it is one."""
    words = [re.escape(word) for word in re.split(r"[\s_-]+", name.strip()) if word]
    last = words.pop()
    stem, ending = (last[:-1], "(?:y|(?P<plural>ies|ys))") if last.lower().endswith("y") else (last, "(?P<plural>es|s)?")
    if many := irregular(last):
        stem, ending = "", f"(?:{last}|(?P<plural>{many}|{last}e?s))"
    body = r"[\s_-]+".join([*words, stem + ending])
    return re.compile(rf"(?<!\w)(?:(?P<article>an?)\s+)?{body}(?!\w)", re.IGNORECASE)


def without(caption: str, name: str) -> str:
    """The caption less the class noun and its article: what it says of everything else."""
    left = re.sub(r"\s+", " ", noun(name).sub(" ", caption))
    return re.sub(r"\s+([,.!?])", r"\1", left).strip(" ,")


def swapped(caption: str, old: str, new: str) -> str:
    """The caption with one class noun in another's place, article and plural fitted."""
    name = new.replace("_", " ").strip()

    def put(found: re.Match[str]) -> str:
        article = found["article"]
        fitted = ("an " if name[:1].lower() in "aeiou" else "a ") if article else ""
        fitted = fitted.capitalize() if article and article[0].isupper() else fitted
        return fitted + (plural(name) if found["plural"] else name)

    return noun(old).sub(put, caption)


def plural(name: str) -> str:
    head, blank, last = name.rpartition(" ")
    if many := irregular(last):
        return head + blank + many
    if re.search("[^aeiou]y$", name.lower()):
        return f"{name[:-1]}ies"
    return f"{name}es" if name.lower().endswith(("s", "x", "ch", "sh")) else f"{name}s"
