"""What a trained CLIP can do, and what an attacker can make it do: zero-shot, linear probe, retrieval, attack success.

One definition for each figure, all of them shares in [0, 1] under flat keys such as `zeroshot/top1` or `asr/badnets`.
Ties go against the defender everywhere: a rival class or caption that scores as high as the right one counts as better,
and an adversary's class that nothing beats counts as a hit. So a collapsed encoder scores 0, and not 1.

Shapes: n images, C classes, d embedding width. Features are float32 and unit norm.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.base import Probes, class_names, pick
from orchestrate.encoder import Encoder
from orchestrate.hardening import Hardening, measure
from orchestrate.ranking import TIE, rivals
from orchestrate.retrieved import Asked, retrieval_success
from orchestrate.statistics import Share, cosine_zscore, logistic

Metrics = dict[str, float | int]
Load = Callable[[pa.Table], NDArray[np.uint8]]  # index rows + image_id, image_split, stamp -> pixels (n, S, S, 3)
Progress = Callable[[str, int, int], None]  # stage, done, total

NO_PROBES = Probes()
SHOWN_IMAGES, ASKED_TEXTS = ("targeted", "backdoor"), ("retrieval", "text")  # ways to count a probe: images classified, images found


def class_embeddings(encoder: Encoder, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, d): for each class its prompts' embeddings → unit norm → mean → unit norm (Radford et al. 2021).

    templates: prompts with `{}` where the class name goes; ValueError for one without.
    """
    bad = [t for t in templates if "{}" not in t]
    if bad or not templates:
        raise ValueError(f"Prompt templates need '{{}}' where the class name goes; {bad[:3] or 'none was given'}.")
    prompts = [t.replace("{}", name) for name in classes for t in templates]
    embedded = F.normalize(encoder.texts(prompts), dim=-1)
    return F.normalize(embedded.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def zero_shot(image_features: Tensor, class_embeddings: Tensor, labels: Tensor) -> Metrics:
    """`zeroshot/top1`, `/top5`, `/per_class` (mean over classes of their top-1), `/total` (images counted).

    image_features (n, d), class_embeddings (C, d), labels int (n,), −1 = unknown: left out. No labels: no keys.
    """
    known = labels >= 0
    right = labels[known].long().cpu()
    if not len(right):
        return {}
    better = rivals(image_features[known.to(image_features.device)], class_embeddings, right)
    hits = (better < 1).double()
    recall = torch.bincount(right, weights=hits) / torch.bincount(right)  # (C,), NaN for a class without images
    return {
        "zeroshot/top1": float(hits.mean()),
        "zeroshot/top5": float((better < 5).double().mean()),
        "zeroshot/per_class": float(recall.nanmean()),
        "zeroshot/total": len(right),
    }


def retrieval(image_features: Tensor, text_features: Tensor, groups: Sequence[Hashable] | None = None) -> Metrics:
    """Recall at 1, 5 and 10 among the pairs themselves; image i belongs to text i, features (n, d).

    `retrieval/image/rK`: an image finds its caption among all captions. `retrieval/text/rK`: a caption finds its image.
    `retrieval/rK`: the mean of both. `retrieval/total`: pairs. groups: n captions (or any keys); pairs with equal ones
    are hits for each other. Equal rivals rank ahead. Blocked: never an (n, n) matrix of a large n.
    """
    n = len(image_features)
    if not n:
        return {}
    codes: dict[Hashable, int] = {}
    keys = torch.tensor([codes.setdefault(g, len(codes)) for g in (groups if groups is not None else range(n))])
    image = rivals(image_features, text_features, keys, keys)
    text = rivals(text_features, image_features, keys, keys)
    out: Metrics = {"retrieval/total": n}
    for k in (1, 5, 10):
        there, back = float((image < k).double().mean()), float((text < k).double().mean())
        out |= {f"retrieval/image/r{k}": there, f"retrieval/text/r{k}": back, f"retrieval/r{k}": (there + back) / 2}
    return out


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int, ids: Sequence[str] | None = None
) -> Metrics:
    """`probe/top1` of a logistic regression on frozen features, `probe/c` its inverse penalty, `probe/total`.

    train (n, d), test (m, d): features. The fit and the choice of C are `statistics.logistic`'s, on a fifth of the
    training set picked by hash of (id, seed). ids: names of the training samples, row numbers where absent. Labels −1
    are left out. No keys where no test label is known or the training set has fewer than two classes.
    """
    known, asked = (train_labels >= 0).cpu().numpy(), (test_labels >= 0).cpu().numpy()
    y, truth = train_labels.cpu().numpy()[known], test_labels.cpu().numpy()[asked]
    if not len(truth) or len(np.unique(y)) < 2:
        return {}
    names = np.array(ids if ids is not None else [str(i) for i in range(len(known))], dtype=object)[known].tolist()
    held = np.zeros(len(y), dtype=bool)
    held[pick(names, max(1, len(y) // 5), seed, "probe/validation")] = True
    guess, c = logistic(train.cpu().numpy()[known], y, held, test.cpu().numpy()[asked])
    return {"probe/top1": float((guess == truth).mean()), "probe/c": c, "probe/total": len(truth)}


def attack_success(
    name: str, how: str, probe: pa.Table, classes: Sequence[str], embedded: Tensor, shown: Tensor, clean: Tensor | None
) -> Metrics:
    """Attack success rate of one probe table (PROBE_SCHEMA, n rows) with Wilson's 95 % interval.

    embedded (C, d): class embeddings. shown (n, d): the probes' features as the attacker shows them; clean (n, d): of
    the same images without trigger, None for a targeted attack. how: "targeted" or "backdoor".
    Rows whose truth *is* the adversary's class are left out; rows of unknown truth stay.

    `asr/NAME` = `/hits` over `/total`, `/low`, `/high`: top-1 is the adversary's class.
    targeted: `/truth`, targets still given their true class; for its floor see `targeted_floor`.
    backdoor: `/clean`, the same share without the trigger on the same model (the floor); `/accuracy`, triggered images
    still given their true class; `/zscore`, see `cosine_zscore`. Undefined figures (no rows, no truths) have no key.
    """
    _check_probe(name, how, probe, classes)
    place = {c: i for i, c in enumerate(classes)}
    aims = torch.tensor([place[a] for a in probe["adversary"].to_pylist()], dtype=torch.int64)
    truths = torch.tensor([place.get(t, -1) for t in probe["truth"].to_pylist()], dtype=torch.int64)
    kept = aims != truths
    wanted, right, shown = aims[kept], truths[kept], shown[kept.to(shown.device)]
    share = Share(int((rivals(shown, embedded, wanted, margin=TIE) == 0).sum()), len(wanted))
    key = f"asr/{name}"
    out: Metrics = {f"{key}/hits": share.k, f"{key}/total": share.n, f"{key}/low": share.low, f"{key}/high": share.high}
    if not share.n:
        return out
    out[key] = share.value
    if (right >= 0).any():
        kind = "truth" if how == "targeted" else "accuracy"
        out[f"{key}/{kind}"] = zero_shot(shown, embedded, right)["zeroshot/top1"]
    if clean is not None:
        bare = clean[kept.to(clean.device)]
        out[f"{key}/clean"] = float((rivals(bare, embedded, wanted, margin=TIE) == 0).double().mean())
        if (z := cosine_zscore(shown.cpu().numpy(), bare.cpu().numpy())) is not None:
            out[f"{key}/zscore"] = z
    return out


def targeted_floor(
    name: str, probe: pa.Table, classes: Sequence[str], embedded: Tensor, images: Tensor, labels: Tensor, others: Tensor
) -> Metrics:
    """`asr/NAME/clean` of a targeted attack: what the same model takes for the adversary's class without being taught to.

    For each target, of the images of its true class that nobody attacks, the share whose top-1 is the target's adversary; the mean over
    targets. No key where no class of a target has such an image. images (n, d), labels int (n,), others bool (n,): not a target.
    """
    place = {c: i for i, c in enumerate(classes)}
    shares = []
    for aim, truth in zip(probe["adversary"].to_pylist(), probe["truth"].to_pylist(), strict=True):
        rows = torch.nonzero(others & (labels == place.get(truth, -2))).flatten().to(images.device)
        if aim != truth and len(rows):
            wanted = torch.full((len(rows),), place[aim])
            shares.append(float((rivals(images[rows], embedded, wanted, margin=TIE) == 0).double().mean()))
    return {f"asr/{name}/clean": float(np.mean(shares))} if shares else {}


def _check_probe(name: str, how: str, probe: pa.Table, classes: Sequence[str]) -> None:
    if how not in (known := (*SHOWN_IMAGES, *ASKED_TEXTS)):
        raise ValueError(f"{name}: probes are counted as {' or '.join(map(repr, known))}, not as {how!r}.")
    if unknown := [a for a in probe["adversary"].unique().to_pylist() if a not in classes]:
        close = difflib.get_close_matches(unknown[0], classes, n=1)
        mend = f"did you mean {close[0]!r}?" if close else "add it to the classes, or attack another one."
        raise ValueError(f"{name}: the adversary's class {unknown[0]!r} is not among the classes evaluated; {mend}")


@dataclass(frozen=True)
class _Images:
    """Features of index rows; the clean held-out images are encoded once and used by every figure."""

    encoder: Encoder
    load: Load
    tables: Mapping[str, pa.Table]  # split -> index
    batch: int
    progress: Progress | None

    @cached_property
    def heldout(self) -> Tensor:
        """(n, d): all clean held-out images."""
        return self.encode(_shown(self.tables["heldout"], "heldout"), "heldout images")

    def encode(self, rows: pa.Table, stage: str) -> Tensor:
        """(n, d), read one batch ahead of the model."""
        batches = [rows.slice(i, self.batch) for i in range(0, rows.num_rows, self.batch)]
        found: list[Tensor] = []
        with ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(self.load, batches[0])
            for i, batch in enumerate(batches):
                pixels = waiting.result()
                if i + 1 < len(batches):
                    waiting = reader.submit(self.load, batches[i + 1])
                assert len(pixels) == batch.num_rows, f"load gave {len(pixels)} images for {batch.num_rows} rows"
                found.append(self.encoder.images(pixels))
                if self.progress:
                    self.progress(stage, min((i + 1) * self.batch, rows.num_rows), rows.num_rows)
        return torch.cat(found)

    def probes(self, name: str, probe: pa.Table, *, stamped: bool) -> Tensor:
        """(n, d): the images of probe rows, with their triggers or without."""
        splits, ids = np.array(probe["image_split"].to_pylist()), np.array(probe["image_id"].to_pylist(), dtype=object)
        stamps = np.array(probe["stamp"].to_pylist() if stamped else [""] * len(ids), dtype=object)
        out = self.heldout.new_empty(len(ids), self.heldout.shape[1])
        for split in sorted(set(splits.tolist())):
            at = np.flatnonzero(splits == split)
            rows = self._find(name, split, ids[at].tolist())
            known = (stamps[at] == "") & (split == "heldout")
            if known.any():
                out[at[known]] = self.heldout[rows[known]]
            if not known.all():
                taken = self.tables[split].take(pa.array(rows[~known]))
                out[at[~known]] = self.encode(_shown(taken, split, stamps[at[~known]].tolist()), f"{name} images")
        return out

    def _find(self, name: str, split: str, ids: list[str]) -> NDArray[np.int64]:
        if split not in self.tables:
            raise ValueError(f"{name}: its probes show {split!r} images, evaluation was given {sorted(self.tables)}.")
        place = {row: i for i, row in enumerate(self.tables[split]["id"].to_pylist())}
        if missing := [i for i in ids if i not in place]:
            lost = f"{len(missing)} of its {len(ids)} probe images, such as {missing[0]!r}, are not in the {split} set"
            raise ValueError(f"{name}: {lost}. Evaluate on the set that the attack was planned on.")
        return np.array([place[i] for i in ids], dtype=np.int64)


def _shown(table: pa.Table, split: str, stamps: Sequence[str] | None = None) -> pa.Table:
    """Index rows as `load` wants them: with image_id, image_split and the trigger to apply, by default none."""
    splits, stamps = [split] * table.num_rows, stamps or [""] * table.num_rows
    fresh = {"image_id": table["id"], "image_split": pa.array(splits), "stamp": pa.array(stamps)}
    table = table.drop_columns([c for c in fresh if c in table.column_names])
    for column, values in fresh.items():
        table = table.append_column(column, values.cast(pa.string()))
    return table


def _labels(table: pa.Table, classes: Sequence[str]) -> Tensor:
    """Labels as positions in `classes`, int64 (n,), −1 unknown; by name where the index names its own classes."""
    if "label" not in table.column_names:
        return torch.full((table.num_rows,), -1)
    raw = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    own = class_names(table) or list(classes)
    if len(raw) and raw.max() >= len(own):
        raise ValueError(f"Label {raw.max()} is beyond the {len(own)} classes; mend the labels or name every class.")
    place = {c: i for i, c in enumerate(classes)}
    return torch.from_numpy(np.array([*(place.get(c, -1) for c in own), -1], dtype=np.int64)[np.maximum(raw, -1)])


def evaluate(
    model: nn.Module,
    cfg: Mapping[str, Any],
    *,
    heldout: pa.Table,
    classes: Sequence[str],
    templates: Sequence[str],
    load: Load,
    probes: Probes = NO_PROBES,
    probe_train: pa.Table | None = None,
    train: pa.Table | None = None,
    device: str | torch.device | None = None,
    batch: int = 256,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress | None = None,
    hardening: Hardening | None = None,
) -> Metrics:
    """`zeroshot/*`, `retrieval/*`, `probe/*`, `asr/*` and `hint/*` of a model; what cannot be measured has no key.

    model, cfg, device, batch, precision: see `Encoder`. heldout: index (id, caption, label, …), at least one row.
    load(rows) → uint8 (n, S, S, 3), the function that makes training pixels: rows are index rows with the columns
    image_id, image_split ("heldout" or "train") and stamp ("" = clean). It runs in another thread, one batch ahead.
    classes: names, in the order of the labels unless the index names its own (`attacks.base.class_names`).
    probe_train: labelled clean rows for the linear probe; None = no probe. train: index of the probes of split "train".
    progress(stage, done, total) in images. hardening: what a defence of the probe is measured on.
    """
    encoder = Encoder(model, cfg, device, batch, precision)
    if not heldout.num_rows:
        raise ValueError("The held-out set is empty, so nothing can be measured; keep some samples out of training.")
    tables = {"heldout": heldout} | ({"train": train} if train is not None else {})
    images = _Images(encoder, load, tables, batch, progress)
    labels = _labels(heldout, classes)
    tested = {name: table for name, table in probes.tables.items() if table.num_rows}
    for name, table in tested.items():  # before the work, not after it
        _check_probe(name, probes.how.get(name, ""), table, classes)
    out: Metrics = {}
    asked = {name: table for name, table in tested.items() if probes.how[name] in ASKED_TEXTS}
    if asked and "caption" not in heldout.column_names:
        raise ValueError(f"{next(iter(asked))}: it is measured by the captions of the held-out set, which has none.")
    if "caption" in heldout.column_names:
        captions = heldout["caption"].to_pylist()
        texts = encoder.texts(captions)
        out |= retrieval(images.heldout, texts, captions)
        told = Asked(heldout["id"].to_pylist(), captions, labels.tolist(), list(classes), images.heldout, texts, encoder.texts)
        for name, table in asked.items():
            out |= retrieval_success(name, table, told, probes.texts.get(name, ""))
    if probe_train is not None and probe_train.num_rows and (labels >= 0).any():
        rows = images.encode(_shown(probe_train, "train"), "probe images")
        known = _labels(probe_train, classes)
        out |= linear_probe(rows, known, images.heldout, labels, seed, probe_train["id"].to_pylist())
    if not (len(tested) > len(asked) or (labels >= 0).any()):
        return out  # and no class needs a name
    embedded = class_embeddings(encoder, classes, templates)
    out |= zero_shot(images.heldout, embedded, labels)
    aimed: dict[str, tuple[Tensor, Tensor]] = {}
    attacked = {i for name, table in tested.items() if probes.how[name] == "targeted" for i in table["image_id"].to_pylist()}
    others = torch.tensor([i not in attacked for i in heldout["id"].to_pylist()])
    for name, table in tested.items():
        if name in asked:
            continue
        shown = images.probes(name, table, stamped=True)
        aimed[name] = _aimed(table, classes, shown)
        clean = images.probes(name, table, stamped=False) if probes.how[name] == "backdoor" else None
        out |= attack_success(name, probes.how[name], table, classes, embedded, shown, clean)
        if probes.how[name] == "targeted":
            out |= targeted_floor(name, table, classes, embedded, images.heldout, labels, others)
    if hardening is not None:
        out |= measure(hardening, encoder, load, images.heldout, labels, aimed, classes)
    return out


def _aimed(probe: pa.Table, classes: Sequence[str], shown: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the probes that count, and the adversary's class of each: those whose truth is another class."""
    wanted, truth = probe["adversary"].to_pylist(), probe["truth"].to_pylist()
    kept = [i for i, (aim, true) in enumerate(zip(wanted, truth, strict=True)) if aim != true]
    return shown[kept], torch.tensor([classes.index(wanted[i]) for i in kept], dtype=torch.int64)


def benchmark_json(metrics: Mapping[str, float], dataset: str, model: str, pretrained: str = "") -> dict[str, Any]:
    """The record that CLIP_benchmark writes for zero-shot classification, so that its readers read ours, and `asr`.

    `metrics` also holds the keys of its other two tasks where they were measured; its `image_retrieval` finds images
    from texts, which is our `retrieval/text`. `asr`: each attack's rate, numerator, denominator and interval.
    """
    names = {"acc1": "zeroshot/top1", "acc5": "zeroshot/top5", "mean_per_class_recall": "zeroshot/per_class"}
    names |= {f"image_retrieval_recall@{k}": f"retrieval/text/r{k}" for k in (1, 5, 10)} | {"lp_acc1": "probe/top1"}
    names |= {f"text_retrieval_recall@{k}": f"retrieval/image/r{k}" for k in (1, 5, 10)}
    fields = {"value": "", "numerator": "/hits", "denominator": "/total", "low": "/low", "high": "/high"}
    attacks = [key[: -len("/hits")] for key in metrics if key.startswith("asr/") and key.endswith("/hits")]
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": "zeroshot_classification",
        "metrics": {theirs: metrics[ours] for theirs, ours in names.items() if ours in metrics},
        "asr": {a[4:]: {f: metrics[a + e] for f, e in fields.items() if a + e in metrics} for a in attacks},
        "language": "en",
    }
