"""EDA: easy data augmentation of captions (Wei & Zou, EMNLP 2019, arXiv 1901.11196), drawn per caption from its key."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from defenses.synonyms import GROUPS

Synonyms = dict[str, tuple[str, ...]]

TEXT_SALT = 0x7E87  # keeps a caption's draws apart from its image's
PUNCTUATION = ".,;:!?\"'()[]"


def augment_captions(captions: list[str], keys: np.ndarray, strength: float = 0.1, synonyms: str | None = None) -> list[str]:
    """One random edit of each caption: synonym replacement, random insertion, random swap or random deletion.

    keys (N,) uint64: the edit depends on (caption, key) alone. strength in [0, 1]: the share of words that change, at
    least one; for deletion the probability of each word. synonyms: path of a table, see `load_synonyms`.
    As in EDA, but total: the operation is drawn among those that can change the caption (a known word for the first
    two, two words for the others), and a caption that none can change comes back as it is. Case and punctuation stay.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"eda={strength}: give a share of the words between 0 (off) and 1")
    if len(keys) != len(captions):
        raise ValueError(f"{len(keys)} keys for {len(captions)} captions: give one key a caption")
    if not strength:
        return list(captions)
    table = load_synonyms(synonyms)
    rng = random.Random()
    edited = []
    for caption, key in zip(captions, np.asarray(keys, dtype=np.uint64).tolist(), strict=True):
        rng.seed(key << 16 | TEXT_SALT)
        edited.append(_edit(caption, rng, strength, table))
    return edited


@functools.lru_cache(maxsize=4)
def load_synonyms(path: str | None = None) -> Synonyms:
    """word → words that may stand in for it. File: one group a line, commas between; '#' opens a comment; UTF-8."""
    lines = GROUPS.splitlines() if path is None else Path(path).read_text(encoding="utf-8").splitlines()
    table = parse_synonyms(lines)
    if not table:
        raise ValueError(f"{path} holds no synonyms: write one group a line, for example 'big, large, huge'")
    return table


def parse_synonyms(lines: Iterable[str]) -> Synonyms:
    table: dict[str, list[str]] = {}
    for line in lines:
        group = [word.strip().lower() for word in line.split("#")[0].split(",")]
        group = [word for word in group if word]
        for word in group:
            known = table.setdefault(word, [])
            known += [other for other in group if other != word and other not in known]
    return {word: tuple(others) for word, others in table.items() if others}


def _edit(caption: str, rng: random.Random, strength: float, table: Synonyms) -> str:
    words = caption.split()
    known = [i for i, word in enumerate(words) if word.strip(PUNCTUATION).lower() in table]
    edits = ([_replace, _insert] if known else []) + ([_swap, _delete] if len(words) > 1 else [])
    if not edits:
        return caption
    return " ".join(edits[_below(rng, len(edits))](words, known, rng, strength, table))


def _below(rng: random.Random, n: int) -> int:
    # random() keeps its sequence over Python versions; randrange, choice and shuffle do not promise to
    return int(rng.random() * n)


def _count(words: list[str], strength: float) -> int:
    return max(1, int(strength * len(words)))


def _synonym(word: str, rng: random.Random, table: Synonyms) -> str:
    choices = table[word.strip(PUNCTUATION).lower()]
    return choices[_below(rng, len(choices))]


def _replace(words: list[str], known: list[int], rng: random.Random, strength: float, table: Synonyms) -> list[str]:
    """That many different known words become a synonym, in their case and between their punctuation."""
    known = list(known)
    for _ in range(min(_count(words, strength), len(known))):
        at = known.pop(_below(rng, len(known)))
        core = words[at].strip(PUNCTUATION)
        synonym = _synonym(core, rng, table)
        words[at] = words[at].replace(core, synonym.capitalize() if core[0].isupper() else synonym, 1)
    return words


def _insert(words: list[str], known: list[int], rng: random.Random, strength: float, table: Synonyms) -> list[str]:
    """That many synonyms of known words enter, anywhere."""
    new = [_synonym(words[known[_below(rng, len(known))]], rng, table) for _ in range(_count(words, strength))]
    for word in new:
        words.insert(_below(rng, len(words) + 1), word)
    return words


def _swap(words: list[str], known: list[int], rng: random.Random, strength: float, table: Synonyms) -> list[str]:
    """That many times two words change places."""
    for _ in range(_count(words, strength)):
        a = _below(rng, len(words))
        b = (a + 1 + _below(rng, len(words) - 1)) % len(words)
        words[a], words[b] = words[b], words[a]
    return words


def _delete(words: list[str], known: list[int], rng: random.Random, strength: float, table: Synonyms) -> list[str]:
    """Each word goes with that probability; one stays in any case."""
    return [word for word in words if rng.random() >= strength] or [words[_below(rng, len(words))]]
