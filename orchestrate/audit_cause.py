"""What the suspicious pairs have in common: words their captions share, and what their images differ by from all others.

Both are guesses from counts. In an honest set they name what is rare in it, not an attacker's work.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrate.data.nouns import WORDS

SEEN = 3  # suspicious captions that must hold a word before it is one of the suspected
FEW = 8  # different images below which a mean shows the images and no trigger
LEAST = 0.05  # share of the pairs, of those that fit least, whose words `shared` looks at (ours)
CLEAR = 6.0  # standard errors: with some 10,000 pixels, chance alone reaches about 4


@dataclass(frozen=True)
class Word:
    """A word with how many of the suspicious captions, and of all captions, hold it."""

    text: str
    here: int
    of: int
    everywhere: int
    pairs: int
    z: float  # standard deviations by which `here` exceeds what chance would give


def words(captions: Sequence[str], suspicious: NDArray[np.int64], most: int = 6) -> list[Word]:
    """Words that the suspicious captions hold more often than the others would, the clearest first."""
    found = [word for word in _counted(captions, suspicious) if word.here >= SEEN and word.z > 3]
    return sorted(found, key=lambda word: (-word.z, word.text))[:most]


def shared(captions: Sequence[str], misfit: NDArray[np.floating]) -> NDArray[np.float64]:
    """How clearly a word of each caption stands oftener in the 5 % of the pairs with the largest `misfit` (N,). (N,).

    The largest z of its words, at least 0. Ours: whoever plants a backdoor needs many captions of one target, and these fit worse than
    honest ones.
    """
    least = np.argsort(-misfit, kind="stable")[: max(1, round(LEAST * len(captions)))]
    z = {word.text: word.z for word in _counted(captions, least)}
    return np.array([max([0.0, *(z.get(text, 0.0) for text in words_of(caption))]) for caption in captions])


def words_of(caption: str) -> set[str]:
    """Its different words, in lower case."""
    return set(WORDS(caption.lower()))


def _counted(captions: Sequence[str], rows: NDArray[np.int64]) -> list[Word]:
    """Every word of the captions in those rows, against all captions. Of these no words are kept but counts: they may be millions."""
    everywhere = Counter(text for caption in captions for text in words_of(caption))
    here = Counter(text for i in rows for text in words_of(captions[i]))
    n, total = len(rows), len(captions)
    found = []
    for text, count in here.items():
        share = everywhere[text] / total
        z = (count - n * share) / math.sqrt(max(1e-9, n * share * (1 - share)) + 1)  # + 1: a word seen once proves little
        found.append(Word(text, count, n, everywhere[text], total, z))
    return found


@dataclass(frozen=True)
class Trigger:
    """What the images of a cluster differ by. `z` (S, S): standard errors; `box`: top, left, bottom, right of the clearest region."""

    images: int
    mean: NDArray[np.uint8]  # (S, S, 3)
    difference: NDArray[np.uint8]  # (S, S, 3), gray = none, stretched
    z: NDArray[np.float64]
    box: tuple[int, int, int, int] | None  # None: no pixel differs clearly
    share: float  # of the image's pixels that differ clearly


def trigger(images: NDArray[np.uint8], mean: NDArray[np.float64], square: NDArray[np.float64]) -> Trigger | None:
    """Different images (n, S, S, 3) of suspicious pairs against the mean and mean square (S, S, 3) of all; None for too few.

    z: root mean square over the channels of (mean of the cluster − mean of all) / (standard deviation of all / √n).
    """
    if len(images) < FEW:
        return None
    from scipy import ndimage

    own = images.astype(np.float64).mean(0)
    error = np.sqrt(np.maximum(square - mean**2, 1.0) / len(images))
    z = np.sqrt((((own - mean) / error) ** 2).mean(2))
    clear = z > max(CLEAR, 0.5 * z.max())
    box = None
    if clear.any():
        label, count = ndimage.label(clear, structure=np.ones((3, 3)))
        weight = ndimage.sum_labels(z, label, range(1, count + 1))
        rows, columns = ndimage.find_objects(label)[int(np.argmax(weight))]
        box = (rows.start, columns.start, rows.stop, columns.stop)
    stretched = (own - mean) * (127 / max(1.0, float(np.abs(own - mean).max())))
    return Trigger(len(images), own.round().astype(np.uint8), (stretched + 128).clip(0, 255).astype(np.uint8), z, box, float(clear.mean()))
