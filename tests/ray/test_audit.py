"""A whole audit on real actors, killed while it scores and gone on with by another number of actors."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from defenses.detect import SCORES

from .conftest import Antidote

pytestmark = pytest.mark.ray

SET = ("data.size=320", "data.heldout=140", "train.batch=64", "train.warmup=4", "train.precision=fp32", "evaluate.precision=fp32")
POISON = ("attack=targeted+badnets", "attack.targeted.targets=2", "attack.targeted.copies=6", "attack.badnets.count=8", "cluster.threads=1")
AUDIT = ("audit", "clip", *SET, *POISON, "--epochs", "2", "--batch", "33", "--drop", "20", "--out", "audit")
PARTS = 3  # of four batches each


def test_an_audit_that_is_killed_goes_on_where_it_was(antidote: Antidote) -> None:
    out = antidote.folder / "audit"
    process = antidote.start(*AUDIT, "cluster.match_cpus=0.25")
    antidote.until(lambda: list(out.glob("parts/*.parquet")), process)
    process.kill()
    process.wait()
    first = {file.name: file.stat().st_mtime_ns for file in out.glob("parts/*.parquet")}
    assert 0 < len(first) < PARTS, "all was scored before the kill"
    [trained] = out.glob("model/*/result.json")
    when = trained.stat().st_mtime_ns

    code, printed, error = antidote.run(*AUDIT, "cluster.match_cpus=0.25", "cluster.match_actors=2")
    assert code == 0, error
    assert all((out / "parts" / name).stat().st_mtime_ns == then for name, then in first.items()), "a finished part was done again"
    assert trained.stat().st_mtime_ns == when, "the model was trained again"
    facts = json.loads((out / "audit.json").read_text())
    assert (facts["pairs"], facts["poison"], facts["removed"], facts["actors"]) == (332, 20, 20, 2)
    assert 0 < facts["resumed"] < 332 and len(list(out.glob("parts/*.parquet"))) == PARTS
    assert facts["clean"] == "kept.parquet" and "no file holds it" in facts["why"]
    assert facts["measured"]["targeted"]["conflict"]["auroc"] == 1.0, "copies of one image with different captions"
    assert "targeted" in printed and (out / "audit.html").stat().st_size > 50_000

    scores = pq.read_table(out / "scores.parquet")
    rank = scores["rank"].to_numpy()
    assert sorted(rank) == list(range(1, 333))
    assert all(np.isfinite(scores[name].to_numpy()).all() for name in SCORES if name != "moved")
    kept = pq.read_table(out / "kept.parquet")["id"].to_pylist()
    assert set(kept) == {i for i, r in zip(scores["id"].to_pylist(), rank, strict=True) if r > 20}
    poison = [i.startswith("poison-") for i in scores["id"].to_pylist()]
    assert facts["poison_removed"] >= int(np.sum(np.array(poison) & (rank <= 20))) > 0


def test_a_run_that_audits_its_own_pairs_is_the_audit_and_the_run_without_its_worst(antidote: Antidote) -> None:
    """Killed while it audits, gone on with, and equal to the two commands that it stands for."""
    small = (*SET, *POISON, "train.epochs=2", "evaluate.probe=false", "track.uri=none", "cluster.match_cpus=0.25")
    process = antidote.start("run", "audited", *small)
    antidote.until(lambda: list(antidote.runs.glob("*/audit/model/*/metrics.jsonl")), process)
    process.kill()
    process.wait()
    code, printed, error = antidote.run("run", "audited", *small)
    assert code == 0 and "core_worker" not in error, error
    [result] = antidote.results()
    folder = next(antidote.runs.iterdir())
    assert "Audit, 5.1 % removed" in printed and f"audit: {folder}/audit/audit.html" in printed
    assert result["audit/removed"] == 17 and 0 < result["audit/poison_removed"] <= 17 and result["seconds/audit"] > 0  # 5 % of 332
    [young] = folder.glob("audit/model/*/metrics.jsonl")
    epochs = [json.loads(line)["epoch"] for line in young.read_text().splitlines() if '"train"' in line]
    assert epochs == list(range(1, 9)), "the young model's epochs were trained twice, or not at all"

    code, _, error = antidote.run("run", "clip", *small, f"data.exclude={folder}/audit/scores.parquet", "data.drop=0.05")
    assert code == 0, error
    twice = antidote.results()[-1]
    assert twice["identity"] != result["identity"]
    for name in ("zeroshot/top1", "retrieval/r1", "asr/targeted/hits", "asr/badnets/hits", "audit/poison_removed"):
        assert twice[name] == result[name], name
