"""Work items through a pool of real actors: their order, an actor that dies of an item once, one that does so every time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from orchestrate import cluster
from orchestrate.recipe import Cluster

pytestmark = pytest.mark.ray

POOL = Cluster(match_actors=2, match_cpus=0.5)


def squares() -> type:
    """The first item takes longest; item 3 kills its actor as often as `deaths` says. Made here, as workers do not have this file."""

    class Squares:
        def __init__(self, folder: str, deaths: int) -> None:
            self.folder, self.deaths = Path(folder), deaths

        def __call__(self, item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            number = int(item["number"][0])
            time.sleep(0.5 if number == 0 else 0.0)
            if number == 3 and len(list(self.folder.iterdir())) < self.deaths:
                (self.folder / str(time.monotonic_ns())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"number": item["number"], "square": item["number"] ** 2}

    return Squares


def test_items_are_answered_in_their_order_and_again_where_their_actor_died(tmp_path: Path) -> None:
    items = [{"number": i} for i in range(12)]
    always, once = tmp_path / "always", tmp_path / "once"
    always.mkdir(), once.mkdir()
    with cluster.connected(Cluster()), cluster.native_stderr(tmp_path / "ray.log"):
        found = [(int(row["number"]), int(row["square"])) for row in cluster.through_actors(items, squares(), (str(once), 1), POOL)]
        assert found == [(i, i * i) for i in range(12)] and len(list(once.iterdir())) == 1

        answers = cluster.through_actors(items, squares(), (str(always), 1_000), POOL)
        with pytest.raises(Exception) as error:
            list(answers)
        assert cluster.died(error.value)
        assert cluster.ATTEMPTS < len(list(always.iterdir())) <= 3 * (cluster.ATTEMPTS + 1), "given up too soon, or too late"
