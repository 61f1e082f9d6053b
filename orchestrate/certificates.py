"""Certified accuracy of a checkpoint's features against poisoning of the labelled set: neighbours and shards, table and plot. No Ray."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from attacks.base import labels as labels_of
from attacks.base import ranks
from defenses import certify
from orchestrate import prepared, rundir
from orchestrate.encoder import Encoder
from orchestrate.progress import Phase
from orchestrate.recipe import Recipe
from orchestrate.statistics import logistic_head

C_SHARD = 0.1  # inverse penalty of a shard's head: fixed, for one chosen on all shards would let a poisoned one speak for the rest
PRINTED = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
NEAR = 0.05  # share of the pairs of test images that lie within the default radius


@dataclass(frozen=True)
class Settings:
    """0 stands for a default (`k`, `radius`). That of `radius` depends on the test images alone. That of `k` depends on the size of the
    labelled set and, where its rows name the classes, on whether one more is named: a guarantee beyond this needs a k that was given."""

    most: int = 50  # largest poisoning size
    k: int = 0  # neighbours; 0: half of an average class of the labelled set
    radius: float = 0.0  # of rNN, 1 − cosine; 0: NEAR of the pairs of test images lie within
    shards: int = 50  # heads of partition aggregation; 0: none


@dataclass(frozen=True)
class Certificate:
    """curves: name → certified accuracy at each size; facts: what it was computed with."""

    sizes: np.ndarray
    curves: dict[str, np.ndarray]
    facts: dict[str, Any]


def certify_checkpoint(checkpoint: str, model: str | None, recipe: Recipe, settings: Settings) -> Certificate:
    """Features of `recipe.data`: labelled training rows vote on labelled held-out rows."""
    from models import clip, export

    built, cfg = export.load(checkpoint, model)
    dataset = prepared.opened(recipe.data)
    load = prepared.loader(recipe, None, None, None, recipe.data.side or clip.side(cfg))
    encoder = Encoder(built, cfg, "cuda" if torch.cuda.is_available() else "cpu", recipe.evaluate.batch, recipe.evaluate.precision)
    parts: list[tuple[Tensor, np.ndarray, list[str]]] = []  # features, labels, hashes of the images
    for name, rows in (("labelled", dataset.train), ("test", dataset.heldout)):
        rows = prepared.as_clean(rows.filter(pa.array(labels_of(rows) >= 0)))
        if not rows.num_rows:
            raise ValueError(f"{recipe.data.path} has no {name} images with a class: give a labelled data set.")
        found, content = [], []
        with Phase(f"encode {name}", rows.num_rows, "image") as phase:
            for low in range(0, rows.num_rows, recipe.evaluate.batch):
                images = load(rows.slice(low, recipe.evaluate.batch))
                found.append(encoder.images(images).cpu())
                content += [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]
                phase.at(min(low + recipe.evaluate.batch, rows.num_rows))
        parts.append((torch.cat(found), labels_of(rows), content))
    return curves(*parts[0], *parts[1][:2], len(dataset.classes), settings, recipe.seed)


def curves(
    train: Tensor, labels: np.ndarray, content: Sequence[str], test: Tensor, truth: np.ndarray, classes: int, settings: Settings, seed: int
) -> Certificate:
    """train (n, d) and test (m, d) unit norm; labels (n,), truth (m,) in [0, classes); content: hashes of the n images."""
    if settings.most < 0 or settings.k < 0 or settings.radius < 0 or settings.shards < 0:
        raise ValueError("--max, --k, --radius and --shards are 0 or more.")
    sizes = np.arange(settings.most + 1)
    k = settings.k or max(1, len(train) // (2 * classes))
    if len(train) < k + settings.most:
        raise ValueError(
            f"kNN certificates up to {settings.most} need k + {settings.most} labelled examples; there are {len(train)}: lower --k."
        )
    if not settings.radius and len(test) < 2:
        raise ValueError("one test image has no pairs to take a radius from: give --radius, or more held-out images (data.heldout).")
    radius = settings.radius or float(np.quantile(1 - _pairs(test), NEAR))
    with Phase("votes") as phase:
        near = certify.rnn_votes(train, labels, test, radius, classes)
        found = {
            f"kNN, k={k}": certify.individual(certify.knn_votes(train, labels, test, k, classes), truth, sizes),
            f"rNN, r={radius:.3g}": certify.individual(near, truth, sizes),
            f"rNN, r={radius:.3g}, joint": certify.joint(near, truth, sizes),
        }
        if settings.shards:
            votes = shard_votes(train, labels, content, test, classes, settings.shards, seed, phase)
            found[f"probe, {settings.shards} shards"] = certify.individual(votes, truth, sizes)
    facts = {"labelled": len(train), "test": len(test), "classes": classes, "k": k, "radius": radius, "shards": settings.shards}
    return Certificate(sizes, found, facts | {"abstained": float((near.sum(1) == 0).mean())})


def _pairs(test: Tensor) -> np.ndarray:
    """Cosines of pairs of different test images; of the first 2,000 of them."""
    some = test[:2000].double()
    return (some @ some.T).numpy()[np.triu_indices(len(some), 1)]


def shard_votes(
    train: Tensor,
    labels: np.ndarray,
    content: Sequence[str],
    test: Tensor,
    classes: int,
    shards: int,
    seed: int,
    phase: Phase | None = None,
) -> np.ndarray:
    """One logistic head a shard, fitted and scaled on that shard alone, each with one vote → (m, C). An empty shard does not vote.

    The shard follows from the image alone (`content`, a hash of each): an example that is added, removed or given another label touches one
    shard; one whose image is changed, two. An id would not do: where ids are row numbers, a removed row moves all behind it.
    """
    home = ranks(content, seed, "shard") % np.uint64(shards)
    votes = np.zeros((len(test), classes), dtype=np.int64)
    x, y = train.numpy(), test.numpy()
    for shard in range(shards):
        own = home == shard
        if own.any():
            guess = logistic_head(x[own], labels[own], y, C_SHARD)
            votes[np.arange(len(test)), guess] += 1
        if phase:
            phase.at(shard + 1, "shards", shards)
    return votes


def lines(found: Certificate) -> list[str]:
    """The table as text, and what it does not say."""
    names = list(found.curves)
    shown = [e for e in PRINTED if e <= found.sizes[-1]]
    shown += [int(found.sizes[-1])] if found.sizes[-1] not in shown else []
    told = ["  ".join(["poisons", *(f"{name:>16}" for name in names)])]
    for e in shown:
        told.append("  ".join([f"{e:>7}", *(f"{100 * found.curves[name][e]:>{max(16, len(name)) - 2}.1f} %" for name in names)]))
    f = found.facts
    told.append(f"certified accuracy: {f['test']:,} test images, {f['labelled']:,} labelled ones, {f['classes']} classes")
    return [*told, certify.SCOPE]


def write(found: Certificate, out: Path) -> list[Path]:
    """certificate.json, certificate.csv, and the plot as PNG and PDF."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"certificate.{ending}" for ending in ("json", "csv", "png", "pdf")]
    curves_: Mapping[str, list[float]] = {name: curve.tolist() for name, curve in found.curves.items()}
    rundir.write_json(files[0], {"scope": certify.SCOPE, **found.facts, "sizes": found.sizes.tolist(), "certified": curves_})
    with files[1].open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["poisons", *curves_])
        table.writerows(zip(found.sizes.tolist(), *curves_.values(), strict=True))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in found.curves.items():
        axes.step(found.sizes, 100 * curve, where="post", label=name)
    axes.set(
        xlabel="poisoned examples of the labelled set", ylabel="certified accuracy, %", ylim=(0, 100), xlim=(0, max(1, found.sizes[-1]))
    )
    axes.legend(frameon=False)
    axes.set_title("Holds under this fixed encoder; says nothing of its own training", fontsize=9, loc="left")
    for path in files[2:]:
        figure.savefig(path, dpi=200)
    return files
