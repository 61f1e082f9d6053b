"""Ray Train's own checkpoint keeping, on our storage, by the classes that its controller and workers use; no cluster is needed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestrate.recipe import from_dict
from orchestrate.storage import CHECKPOINTS, Store

pytestmark = pytest.mark.ray


def test_a_second_controller_finds_the_last_checkpoint_of_the_first(tmp_path: Path) -> None:
    import ray.train
    from ray import cloudpickle
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.training_report import _TrainingReport

    store = Store.of(from_dict({"name": "r"}, {"cluster.runs": str(tmp_path / "runs"), "cluster.storage": str(tmp_path / "shared")}).recipe)
    config = ray.train.RunConfig(
        name=CHECKPOINTS,
        storage_path=store.home,
        storage_filesystem=store.filesystem,
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
    )
    place = cloudpickle.loads(cloudpickle.dumps(config)).storage_context

    async def two_epochs() -> None:
        manager = CheckpointManager(config.checkpoint_config, place)
        for epoch in (b"1", b"2"):
            made = tmp_path / f"epoch-{epoch.decode()}"
            made.mkdir()
            (made / "state.pt").write_bytes(epoch)
            worker = cloudpickle.loads(cloudpickle.dumps(place))
            kept = worker.persist_current_checkpoint(ray.train.Checkpoint.from_directory(str(made)), f"checkpoint_{epoch.decode()}")
            manager.register_checkpoint(_TrainingReport(checkpoint=kept, metrics={}, validation=False))

    asyncio.run(two_epochs())
    found = CheckpointManager(config.checkpoint_config, place).latest_checkpoint_result
    with cloudpickle.loads(cloudpickle.dumps(found.checkpoint)).as_directory() as folder:
        assert (Path(folder) / "state.pt").read_bytes() == b"2"
    assert [f.name for f in (tmp_path / "shared").rglob("checkpoint_*") if f.is_dir()] == ["checkpoint_2"]
    store.remove(CHECKPOINTS)
    assert not [f for f in (tmp_path / "shared").rglob("*") if f.is_file()]


def test_waiting_for_nodes_has_an_end_that_says_what_it_waited_for() -> None:
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState

    from orchestrate import cluster, train

    patience, waiting = train._Patience(2, 0.2), RestartingState(training_failed_error=ControllerError(ValueError("x")))
    for _ in range(4):  # 0.1 s each: never long in one piece
        patience.after_controller_state_update(None, waiting)
        patience.after_controller_state_update(None, RunningState())
    with pytest.raises(RuntimeError, match=r"waited 0.2 s \(cluster.timeout_s\) for room for 2 training workers \(cluster.min_workers\)"):
        for _ in range(4):
            patience.after_controller_state_update(None, waiting)
    assert cluster.cause(ControllerError(OSError("storage x has failed"))) == "training stopped: OSError: storage x has failed"
    assert cluster.cause(WorkerGroupError("m", {1: OSError("inner")})) == "training stopped: OSError: inner"
