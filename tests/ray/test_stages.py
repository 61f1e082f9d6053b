"""An attack and a defence from a user's files, the latter selects pairs and then repairs: what it leaves, and that kills change nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrate import scaffold

from .conftest import EXACT, TINY, Antidote, kill, processes

pytestmark = pytest.mark.ray
MINE = '''
from dataclasses import dataclass

from defenses.base import Repair
from defenses.cleanclip import CleanCLIP
from defenses.safeclip import SafeCLIP


@dataclass(frozen=True)
class Both(SafeCLIP):
    """SafeCLIP, and CleanCLIP's repair after it."""

    warmup: int = 1
    pool_size: float = 0.2

    def repair(self) -> Repair:
        return CleanCLIP(clean=64, epochs=2, batch=32, lr=1e-3, warmup=1).repair()
'''
PLAIN = tuple(word for word in TINY if not word.startswith(("defense.", "attack=", "attack.stripes")))
ATTACK = ("attack=targeted+./frame.py:Frame", "attack.Frame.count=30")
WORDS = ("clip", *PLAIN, *ATTACK, "track.uri=none", "defense=./mine.py:Both", "defense.growth=0.05")
SAME = tuple(key.replace("stripes", "Frame") for key in EXACT)
EPOCHS = 6  # four of training, two of repair


def prepared(folder: Path) -> Antidote:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    scaffold.write("attack", "frame", folder)
    return Antidote(folder)


def test_selection_and_repair_come_out_the_same_when_killed_in_either_stage(tmp_path: Path) -> None:
    calm = prepared(tmp_path / "calm")
    result = calm.result(*WORDS)
    chosen = [r for r in calm.records() if r["kind"] == "select"]
    assert [r["epoch"] for r in chosen] == [3, 4]
    assert chosen[1]["safe"] - chosen[0]["safe"] == round((chosen[0]["share"] + 0.05) * 384) - chosen[0]["safe"] > 0
    assert [r["epoch"] for r in calm.records() if r["kind"] == "train" and r.get("repair")] == [5, 6]
    assert [r["epoch"] for r in calm.records() if r["kind"] == "eval"] == [4, 6]
    assert result["before/zeroshot/total"] == result["zeroshot/total"] == 140
    table = pq.read_table(Path(result["run"]) / "rounds" / "e004-safe.parquet")
    assert table.num_rows == 384 and sum(table["safe"].to_pylist()) == chosen[1]["safe"]
    assert min(c for c, s in zip(*(table[n].to_pylist() for n in ("cosine", "safe")), strict=True) if s) == pytest.approx(
        chosen[1]["threshold"]
    )

    assert 0 < result["asr/Frame/total"] <= 130

    rough = prepared(tmp_path / "rough")
    process = rough.start("run", *WORDS)
    rough.until(lambda: any(r["epoch"] == 3 and r["kind"] == "train" for r in rough.records()), process)
    kill([process.pid])  # the share of safe pairs is only in the checkpoint now
    process.communicate(timeout=60)
    process = rough.start("run", *WORDS)
    rough.until(lambda: any(r["epoch"] == 5 and r["kind"] == "train" for r in rough.records()), process)
    kill(processes("ray::RayTrainWorker", process.pid))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    again = rough.results()[-1]
    assert [r["epoch"] for r in rough.records() if r["kind"] == "train"] == list(range(1, EPOCHS + 1))
    assert {key: again[key] for key in SAME} == {key: result[key] for key in SAME}
    assert pq.read_table(Path(again["run"]) / "rounds" / "e004-safe.parquet").equals(table)
