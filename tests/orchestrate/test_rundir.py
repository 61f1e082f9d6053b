"""The last word of a run: which evaluation it is made of, and what is said where that one was lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrate import journal, rundir
from orchestrate.recipe import resolve


@pytest.fixture
def finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`rundir.finish` of a run with these evaluated epochs, each as accurate as its number says."""
    monkeypatch.setattr(rundir, "complete_gallery", lambda folder: None)
    ready: Any = SimpleNamespace(manifest=None, table=SimpleNamespace(num_rows=10))

    def call(epochs: tuple[int, ...], **overrides: object) -> dict[str, Any]:
        recipe = resolve("run", [("test", {key.replace("__", "."): value for key, value in overrides.items()})]).recipe
        (tmp_path / journal.NAME).unlink(missing_ok=True)
        for epoch in epochs:
            journal.append(tmp_path / journal.NAME, {"kind": "eval", "epoch": epoch, "seconds": 1.0, "zeroshot/top1": epoch / 100})
        return rundir.finish(recipe, tmp_path, ready, None, 0.0)

    return call


@pytest.mark.parametrize("epochs", [(), (2, 4)])
def test_a_run_without_its_last_evaluation_is_not_finished_and_keeps_its_training(
    finish: Any, tmp_path: Path, epochs: tuple[int, ...]
) -> None:
    """An earlier epoch's figures are no stand-in, and nothing is to be removed: the checkpoint holds the line that is missing."""
    with pytest.raises(
        RuntimeError, match=r"metrics\.jsonl lacks the evaluation of epoch 6, the last.*run the same command again"
    ) as error:
        finish(epochs, train__epochs=6, evaluate__every=2)
    assert "remove" not in str(error.value) and not (tmp_path / rundir.RESULT).exists()


def test_the_figures_are_those_of_the_last_epoch(finish: Any) -> None:
    assert finish((2, 4, 6), train__epochs=6, evaluate__every=2)["zeroshot/top1"] == 0.06


def test_after_a_repair_the_last_epoch_is_the_repairs(finish: Any) -> None:
    repaired = {"train__epochs": 6, "defense": "cleanclip", "defense__epochs": 3}
    result = finish((6, 9), **repaired)
    assert (result["before/zeroshot/top1"], result["zeroshot/top1"]) == (0.06, 0.09)
    with pytest.raises(RuntimeError, match="epoch 9"):
        finish((6,), **repaired)
    assert "before/zeroshot/top1" not in finish((9,), **repaired)
