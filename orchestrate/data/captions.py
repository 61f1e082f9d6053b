"""Captions made from class names: phrases × synonyms × attributes, drawn for each sample by a hash of its id.

Made captions name the class and nothing else that is true: size, look, place and time are drawn by lot. They let a
labelled set train CLIP; they say less than human captions, and every report says that they are made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from orchestrate.data.nouns import SYNONYMS

NOUN_SHARE = 0.7  # of captions name the class by its own name, the rest by a synonym where there is one

PHRASES: tuple[str, ...] = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a snapshot of {}",
    "a close-up of {}",
    "a cropped photo of {}",
    "a photo showing {}",
    "{}",
    "here is {}",
    "there is {}",
    "we can see {}",
    "this is {}",
    "look at {}",
    "someone photographed {}",
    "my favourite picture of {}",
    "a view of {}",
)
SIZES: tuple[str, ...] = ("small", "little", "tiny", "large", "big", "huge", "medium-sized", "full-grown")
LOOKS: tuple[str, ...] = (
    *("beautiful", "plain", "striking", "handsome", "ordinary", "typical", "lovely", "unusual", "curious", "splendid"),
    *("familiar", "lone", "quiet", "solitary", "sunlit", "shaded", "blurry", "sharp", "bright", "dark", "colourful"),
    *("pale", "dusty", "clean", "old", "young", "nice", "charming", "impressive", "remarkable"),
)
PLACES: tuple[str, ...] = (
    "outdoors",
    "in the distance",
    "in the foreground",
    "seen from the side",
    "seen from the front",
    "seen from behind",
    "in the middle",
    "near some trees",
    "under a cloudy sky",
    "under a clear sky",
    "against a plain background",
    "in an open field",
    "by the roadside",
    "close to the camera",
    "in soft light",
    "in bright light",
    "in the shade",
    "on a wide plain",
    "in front of a wall",
    "near the shore",
)
TIMES: tuple[str, ...] = (
    "in the morning",
    "at noon",
    "in the afternoon",
    "in the evening",
    "on a sunny day",
    "on a rainy day",
    "on a windy day",
    "in summer",
    "in winter",
    "in autumn",
    "in spring",
    "today",
)


def made_captions(ids: Sequence[str], labels: Sequence[int], classes: Sequence[str], seed: int) -> list[str]:
    """A caption for each sample: depends on (id, class name, seed) alone. Some 100,000 different ones for each class.

    Labels are indices into `classes`; ValueError for one that is not.
    """
    wrong = next((i for i, label in enumerate(labels) if not 0 <= label < len(classes)), None)
    if wrong is not None:
        raise ValueError(f"Sample {ids[wrong]!r} has label {labels[wrong]}, but there are {len(classes)} classes.")
    key = hashlib.blake2b(f"{seed}/caption".encode(), digest_size=16).digest()
    digests = b"".join(hashlib.blake2b(i.encode(), digest_size=16, key=key).digest() for i in ids)
    draws = np.frombuffer(digests, dtype="<u2").reshape(-1, 8) / 65536.0
    words = [[name.replace("_", " ").lower(), *SYNONYMS.get(name.replace("_", " ").lower(), ())] for name in classes]
    taboo = tuple(sorted({word for some in words for word in some}))
    return [_caption(words[label], draw, taboo) for label, draw in zip(labels, draws.tolist(), strict=True)]


def _caption(nouns: Sequence[str], draw: Sequence[float], taboo: tuple[str, ...]) -> str:
    phrase, noun, size, look, place, time, which, _ = draw
    word = nouns[0] if noun < NOUN_SHARE or len(nouns) == 1 else nouns[1 + int(which * (len(nouns) - 1))]
    parts = [_drawn(SIZES, size, 0.5, taboo), _drawn(LOOKS, look, 0.7, taboo), word]
    thing = " ".join(part for part in parts if part)
    thing = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    tail = [_drawn(PLACES, place, 0.7, taboo), _drawn(TIMES, time, 0.4, taboo)]
    phrases = _allowed(PHRASES, taboo)
    return " ".join([phrases[int(phrase * len(phrases))].format(thing), *filter(None, tail)])


def _drawn(options: Sequence[str], draw: float, share: float, taboo: tuple[str, ...]) -> str:
    """One of `options` with probability `share`, else ""."""
    some = _allowed(tuple(options), taboo)
    return some[int(draw / share * len(some))] if draw < share and some else ""


@lru_cache(maxsize=64)
def _allowed(options: tuple[str, ...], taboo: tuple[str, ...]) -> tuple[str, ...]:
    """Options that name no class themselves: "near some trees" would be a lie in a set with the class tree."""
    pattern = re.compile("|".join(rf"\b{re.escape(word)}s?\b" for word in taboo) or r"(?!)")
    kept = tuple(option for option in options if not pattern.search(option))
    return kept or tuple(option for option in options if option == "{}")
