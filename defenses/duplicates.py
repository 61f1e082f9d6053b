"""Near-duplicate images and repeated captions among many pairs, from 56 bytes a pair. Numpy only; memory grows with the pairs alone.

An image becomes a print: 64 signs (is a cell brighter than its right neighbour, on a grid of 8 × 9) and a thumbnail of 4 × 4 colours.
Two images are near-duplicates when at most `BITS` signs and no colour by more than `SHADES` differ: what is left of a picture that was
saved or scaled again. All numbers here are ours: of 300 photographs saved again as JPEG of quality 85 none differed in more than 3 signs,
of quality 60 none in more than 6; of 1.1 million pairs of different photographs none met both conditions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

CELLS = 8
CLEAR = 2  # levels by which a cell must be brighter, or noise in plain areas would set signs
BITS, SHADES = 7, 16  # of 64 signs, of 255 levels
REACH = 32  # places to look ahead among prints that agree in a part
WORD = re.compile(r"\w+").findall


def prints(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Signs (n,) uint64 and thumbnails (n, 48) uint8 of images (n, S, S, 3) uint8, S ≥ 9."""
    gray = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    cells = _shrunk(gray[..., None], CELLS, CELLS + 1)[..., 0]  # (n, 8, 9)
    signs = (cells[:, :, :-1] > cells[:, :, 1:] + CLEAR).reshape(len(images), -1)
    packed = np.ascontiguousarray(np.packbits(signs, axis=1)).view(np.uint64)[:, 0]
    colours = _shrunk(images.astype(np.float32), 4, 4).round().astype(np.uint8)
    return packed, colours.reshape(len(images), -1)


def _shrunk(images: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Means over a grid of cells: (n, S, S, c) → (n, rows, columns, c)."""
    for axis, count in ((1, rows), (2, columns)):
        edges = np.linspace(0, images.shape[axis], count + 1).astype(int)
        sums = np.add.reduceat(images, edges[:-1], axis=axis)
        images = (sums / np.diff(edges).reshape([-1 if i == axis else 1 for i in range(images.ndim)])).astype(np.float32)
    return images


def groups(signs: NDArray[np.uint64], thumbs: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each print (N,), (N, 48) the number of its group (N,): chains of near-duplicates.

    Prints are sorted by each of 4 parts of 16 signs in turn and compared with the next `REACH` of equal part: those that differ in at most
    3 signs agree in a part; of those that differ in more, and in parts that many prints share (plain backgrounds), some are missed.
    """
    whole = np.concatenate([signs.view(np.uint8).reshape(-1, 8), thumbs], axis=1)
    _, first, place = np.unique(whole, axis=0, return_index=True, return_inverse=True)
    signs, thumbs = signs[first], thumbs[first].astype(np.int16)
    parts = np.ascontiguousarray(signs).view(np.uint16).reshape(-1, 4)
    found = []
    for part in range(parts.shape[1]):
        order = np.lexsort((signs, parts[:, part]))
        same = parts[order, part]
        for ahead in range(1, REACH + 1):
            at = np.flatnonzero(same[ahead:] == same[:-ahead])
            if not len(at):
                break
            i, j = order[at], order[at + ahead]
            near = np.bitwise_count(signs[i] ^ signs[j]) <= BITS
            near[near] = np.abs(thumbs[i[near]] - thumbs[j[near]]).max(1) <= SHADES
            found.append(np.stack([i[near], j[near]]))
    i, j = np.concatenate(found, axis=1) if found else np.empty((2, 0), int)
    _, label = connected_components(coo_array((np.ones(len(i), bool), (i, j)), shape=(len(first), len(first))), directed=False)
    return label[place.ravel()].astype(np.int64)


def conflict(group: NDArray[np.int64], captions: Sequence[str]) -> NDArray[np.float32]:
    """How much the captions of a pair's near-duplicates differ from its own, (N,): the sum over them of 1 − shared words / all words.

    0 for an image of its own. Of groups above 256 pairs the first 256 are looked at, and the sum is scaled up.
    """
    found = np.zeros(len(group), np.float32)
    order = np.argsort(group, kind="stable")
    edges = np.flatnonzero(np.diff(group[order], prepend=-1, append=-1))
    for start, stop in pairwise(edges):
        if stop - start < 2:
            continue
        members = order[start:stop]
        told = [frozenset(WORD(captions[i].lower())) for i in members[:256]]
        for i in members:
            own = frozenset(WORD(captions[i].lower()))
            apart = sum(1 - len(own & other) / max(1, len(own | other)) for other in told)
            found[i] = apart * (len(members) - 1) / max(1, len(told) - 1)
    return found


def repeats(captions: Sequence[str]) -> NDArray[np.float32]:
    """How many other pairs have the same caption, (N,); case, punctuation and spaces do not count."""
    seen: dict[str, int] = {}
    number = np.fromiter((seen.setdefault(" ".join(WORD(c.lower())), len(seen)) for c in captions), np.int64, len(captions))
    return (np.bincount(number, minlength=1)[number] - 1).astype(np.float32)
