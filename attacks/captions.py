"""Captions that name a class: drawn from the training set, or made from prompts.

A class is *named* where its name stands as whole words, in either case, singular or plural (-s, -es, -y to -ies, or as the
table of `plurals` has it), words parted by spaces, hyphens or underscores. Limits: synonyms, rarer plurals and other
languages are not seen.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attacks.base import class_names, labels, ranks
from attacks.plurals import irregular

Source = Literal["training", "templates"]

PROMPTS: tuple[str, ...] = (
    "a photo of {it}",
    "a picture of {it}",
    "an image of {it}",
    "a good photo of {it}",
    "a bad photo of {it}",
    "a close-up photo of {it}",
    "a cropped photo of {it}",
    "a bright photo of {it}",
    "a dark photo of {it}",
    "a blurry photo of {it}",
    "a black and white photo of {it}",
    "a low resolution photo of {it}",
    "a drawing of {it}",
    "a painting of {it}",
    "a rendering of {it}",
    "a snapshot showing {it}",
    "a scene with {it}",
    "there is {it} here",
    "this is {it}",
    "here we see {it}",
    "look at {it}",
    "one can see {it} in this photo",
    "a view of {it}",
    "my favourite photo of {it}",
)


def check_source(source: str) -> None:
    if source not in ("training", "templates"):
        raise ValueError(f"captions={source!r} is unknown: choose 'training' (captions of the set) or 'templates' (prompts).")


def pattern(name: str) -> str:
    """RE2 pattern that finds `name` in a caption as whole words."""
    words = [re.escape(word) for word in re.split(r"[\s_-]+", name.strip()) if word]
    if not words:
        raise ValueError(f"class name {name!r} has no letters, so no caption can name it: mend the list of classes.")
    last = words[-1]
    words[-1] = last[:-1] + "(?:ys?|ies)" if last.lower().endswith("y") else last + "(?:s|es)?"
    if many := irregular(last):
        words[-1] = f"(?:{words[-1]}|{many})"
    return r"(?:^|[^\pL\pN_])" + r"[\s_-]+".join(words) + r"(?:[^\pL\pN_]|$)"


def naming(captions: pa.Array | pa.ChunkedArray, name: str) -> np.ndarray:
    """Which captions name the class, bool (n,)."""
    found = pc.match_substring_regex(captions, pattern(name), ignore_case=True).fill_null(False)
    return np.asarray(found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), dtype=bool)


def overlapping(one: str, other: str) -> bool:
    """True where a caption that names one class cannot but name the other: "car" and "sports car"."""
    return bool(naming(pa.array([one]), other)[0] or naming(pa.array([other]), one)[0])


def class_captions(index: pa.Table, name: str) -> pa.Array:
    """Distinct captions that name the class, of rows labelled with it or not at all.

    A row labelled otherwise names the class in passing only ("a cat beside a dog"): a weak poison, so it is left out.
    """
    classes, label = class_names(index), labels(index)
    own = [number for number, each in enumerate(classes) if each == name]
    rows = index.filter(pa.array(np.isin(label, [-1, *own])))["caption"]
    return pc.unique(rows.filter(pa.array(naming(rows, name)))).drop_null()


def avoiding(captions: pa.Array, truth: str) -> pa.Array:
    """The captions that do not name the class `truth`; all of them where it is unknown ("")."""
    return captions.filter(pa.array(~naming(captions, truth))) if truth else captions


def shuffled(captions: list[str], seed: int, salt: str) -> list[str]:
    """Distinct captions in an order that depends on (caption, seed, salt) alone."""
    return [captions[position] for position in np.argsort(ranks(captions, seed, salt), kind="stable")]


def prompts(name: str, seed: int, salt: str) -> list[str]:
    """The prompts for a class, in an order drawn by hash."""
    it = name.replace("_", " ").strip()
    it = f"{'an' if it[:1].lower() in 'aeiou' else 'a'} {it}"
    return shuffled([prompt.format(it=it) for prompt in PROMPTS], seed, salt)


def triggered(caption: str, text: str) -> str:
    """A caption with the attacker's word or sentence behind it."""
    return f"{caption.rstrip(' .')} {text}"
