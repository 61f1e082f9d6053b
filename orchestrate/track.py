"""What a run measured, in two places: `metrics.jsonl` beside the run, always, and MLflow, when it answers.

The file is the truth and MLflow a copy of it. `Tracker.log` appends a line and then sends every line that MLflow has not
got yet, from an offset kept in `mlflow.json`. So an outage needs no buffer of its own, a killed run loses nothing, and
sending twice does no harm: each line carries its time, and MLflow drops a metric whose name, step, time and value it has.

Only the driver and the train controller call this, one at a time; workers never do. A fresh SQLite store opened by
several processes at once fails, which is why `start` makes experiment and run under a file lock, before any training.

This is the only file that imports mlflow, and only inside functions: the import alone takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate import journal, mlflow_uri
from orchestrate.mlflow_uri import ANSWER_S, NONE, masked
from orchestrate.secrets import MASK

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

RUNS = Path("runs")  # where runs lie unless cluster.runs says otherwise
STATE = "mlflow.json"  # in the run directory: where the run is in MLflow, and how much of metrics.jsonl it has
START_S, UPLOAD_S = 30, 120  # seconds an MLflow that is there gets for its first answer, and for one uploaded file
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 300.0  # between two attempts at a server that went silent
PARAMS_PER_CALL, METRICS_PER_CALL, LINES_PER_CALL, LONGEST_VALUE = 100, 1000, 100, 500
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
SET_BY_USER = frozenset(name for name in os.environ if name.startswith("MLFLOW_HTTP_"))
STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

Point = tuple[str, float, int, int]  # name, value, time in ms, step


@dataclass
class Tracker:
    """One run's line to MLflow: plain values, so that it can be pickled into the train controller.

    `uri` is absolute or "none"; `run_id` is "" where nothing is tracked; `run_dir` is absolute.
    """

    uri: str
    experiment: str
    run_id: str
    run_dir: Path
    failures: int = 0  # attempts in a row that MLflow did not answer
    silent_until: float = 0.0  # time.time() before which it is not asked again

    @classmethod
    def start(
        cls,
        run_dir: Path,
        uri: str | None,
        experiment: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, Any] | None = None,
    ) -> Tracker:
        """Make the run in MLflow, or take up the one that `run_dir` already has, and log the parameters once.

        Call it in the driver, before any training. ValueError at once where `uri` is malformed or nobody is there,
        within half a minute where it does not answer.
        """
        run_dir = Path(run_dir).absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        tracker = cls(mlflow_uri.resolve(uri, run_dir.parent), experiment, "", run_dir)
        if tracker.uri == NONE:
            return tracker
        with mlflow_uri.user_errors(tracker.uri), _waits(START_S, retries=0), mlflow_uri.alone(tracker.uri):
            _reachable(tracker.uri)
            tracker._open(parameters, tags or {})
        return tracker

    @classmethod
    def load(cls, run_dir: Path, uri: str | None = None) -> Tracker:
        """The tracker of a run started earlier, for `replay`; `uri` where the stored one lacks its password."""
        state = _read_state(Path(run_dir))
        if not state.get("run_id"):
            return cls(NONE, "", "", Path(run_dir).absolute())
        return cls(uri or state["uri"], state["experiment"], state["run_id"], Path(run_dir).absolute())

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Append `record` (flat, plain values) to metrics.jsonl, then send what is unsent.

        Never raises: no run may die of its logbook.
        """
        try:
            journal.append(self.run_dir / journal.NAME, {**record, "step": int(step), "time": int(time.time() * 1000)})
        except Exception as error:
            logger.warning("A line of %s could not be written: %s", journal.NAME, mlflow_uri.reason(error))
        self._try(retries=0)

    def finish(self, status: str, artifacts: Sequence[Path] = ()) -> None:
        """Close the run as "finished", "failed" or "killed".

        result.json's numbers become metrics; `artifacts` (files, folders) are uploaded once, missing ones skipped.
        Where MLflow does not answer the work stays on the list for `replay`.
        """
        if status.lower() not in STATUS:
            raise ValueError(f"status {status!r} is none of {', '.join(STATUS)}.")
        if self.uri == NONE:
            return
        self.owe(status, artifacts)
        self.silent_until = 0.0  # worth one more try, whatever happened before
        self._try(retries=1)

    def owe(self, status: str, artifacts: Sequence[Path] = ()) -> None:
        """Put the end of the run on the list for `replay`."""
        paths = [os.path.relpath(Path(p).absolute(), self.run_dir) for p in artifacts]
        with contextlib.suppress(OSError):  # a full disk must not turn a finished run into a failed one
            self._note(closing={"status": STATUS[status.lower()], "artifacts": paths})

    @property
    def ended(self) -> bool:
        """Whether MLflow knows that the run is finished; so it is where nothing is tracked."""
        return self.uri == NONE or _read_state(self.run_dir).get("ended") == STATUS["finished"]

    def replay(self) -> int:
        """Send the lines MLflow has not got and end what `finish` began. Lines sent. ValueError where it is silent."""
        if self.uri == NONE:
            return 0
        with mlflow_uri.user_errors(self.uri, mlflow_uri.MEND_SYNC), _waits(ANSWER_S, retries=1):
            _reachable(self.uri)
            return self._send()

    def truncate_after(self, epoch: int) -> int:
        """Drop the lines of epochs after `epoch`, which a resumed run will write again. Lines dropped.

        MLflow cannot forget a point: there the repeated epochs show two, and a tag says where the run was taken up.
        """
        path, state = self.run_dir / journal.NAME, _read_state(self.run_dir)
        content, offset, dropped = journal.without_later(path, epoch, state.get("offset", 0))
        if not dropped:
            return 0
        if state:  # first: an offset too small only sends twice, one too large would lose lines
            self._note(offset=offset)
        journal.replace(path, content)
        self._tag("antidote.resumed_after_epoch", str(epoch))
        return dropped

    def _open(self, parameters: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Experiment and run exist, and the parameters are logged, when this returns."""
        from mlflow.entities import Param, RunTag

        client, state = _client(self.uri), _read_state(self.run_dir)
        labels = {name: str(value)[:LONGEST_VALUE] for name, value in tags.items()}
        here = state.get("uri") == masked(self.uri) and state.get("experiment") == self.experiment
        if here and _alive(client, state["run_id"]):
            self.run_id = state["run_id"]
            client.update_run(self.run_id, status="RUNNING")
            client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in labels.items()])
        else:  # first start, another server, or a run deleted in MLflow: its whole history goes to the new one
            experiment = _experiment(client, self.uri, self.experiment)
            self.run_id = client.create_run(experiment, tags=labels, run_name=self.run_dir.name).info.run_id
            state = {"uri": masked(self.uri), "experiment": self.experiment, "run_id": self.run_id, "offset": 0}
            _write_state(self.run_dir, state)
        if not state.get("parameters"):
            logged = [Param(_name(key), _text(value)) for key, value in parameters.items()]
            for i in range(0, len(logged), PARAMS_PER_CALL):
                client.log_batch(self.run_id, params=logged[i : i + PARAMS_PER_CALL])
        self._note(parameters=True, closing=None, ended=None)

    def _try(self, retries: int) -> None:
        """Send, unless MLflow was silent a moment ago. On failure warn once, and wait longer before each next attempt."""
        if self.uri == NONE or time.time() < self.silent_until:
            return
        try:
            with _waits(ANSWER_S, retries):
                self._send()
        except Exception as error:
            if not self.failures:
                logger.warning(
                    "MLflow %s does not answer (%s). The run goes on; `antidote track sync` sends %s later.",
                    masked(self.uri),
                    mlflow_uri.reason(error),
                    self.run_dir / journal.NAME,
                )
            self.silent_until = time.time() + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.failures, 10))
            self.failures += 1
        else:
            self.failures = 0

    def _send(self) -> int:
        """Everything from the offset to the end of metrics.jsonl, then what `finish` left to do. Lines sent."""
        client, sent = _client(self.uri), 0
        offset = _read_state(self.run_dir).get("offset", 0)
        for end, records in journal.chunks(self.run_dir / journal.NAME, offset, LINES_PER_CALL):
            self._batch(client, [point for record in records for point in _points(record)])
            self._note(offset=end)
            sent += len(records)
        closing = _read_state(self.run_dir).get("closing")
        if closing:
            self._batch(client, self._results())
            client.set_terminated(self.run_id, closing["status"])
            with _waits(UPLOAD_S, retries=1):
                for name in closing["artifacts"]:
                    self._upload(client, name)
            self._note(closing=None, ended=closing["status"])
        return sent

    def _batch(self, client: MlflowClient, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(name, value, when, step) for name, value, when, step in points]
        for i in range(0, len(metrics), METRICS_PER_CALL):
            try:
                client.log_batch(self.run_id, metrics=metrics[i : i + METRICS_PER_CALL])
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                # it will never be taken, and must not hold back the lines behind it
                logger.warning("MLflow refused metrics; %s keeps them: %s", journal.NAME, mlflow_uri.reason(error))

    def _results(self) -> list[Point]:
        """result.json's numbers, at the last step of metrics.jsonl."""
        path = self.run_dir / "result.json"
        if not path.exists():
            return []
        steps = [int(journal.number(record.get("step")) or 0) for record in journal.read(self.run_dir / journal.NAME)]
        when, step = int(path.stat().st_mtime * 1000), max(steps, default=0)
        numbers = {key: journal.number(value) for key, value in json.loads(path.read_text()).items()}
        return [(_name(key), value, when, step) for key, value in numbers.items() if value is not None]

    def _upload(self, client: MlflowClient, name: str) -> None:
        """One file or folder, unless MLflow has it as it now is."""
        path = Path(os.path.normpath(self.run_dir / name))
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        if not path.exists():
            return
        stamp = max((f.stat().st_mtime_ns for f in files), default=0) + len(files)
        done = _read_state(self.run_dir).get("artifacts", {})
        if done.get(name) == stamp:
            return
        if path.is_dir():
            client.log_artifacts(self.run_id, str(path), path.name)
        else:
            client.log_artifact(self.run_id, str(path))
        self._note(artifacts=done | {name: stamp})

    def _note(self, **changes: Any) -> None:
        """Remember in mlflow.json."""
        _write_state(self.run_dir, _read_state(self.run_dir) | changes)

    def _tag(self, name: str, value: str) -> None:
        if self.uri == NONE or not self.run_id:
            return
        with contextlib.suppress(Exception), _waits(ANSWER_S, retries=0):
            _client(self.uri).set_tag(self.run_id, name, value)


def address(run_dir: Path, given: str = "") -> str | None:
    """Where a run's MLflow is: as `given`, or MLFLOW_TRACKING_URI where the stored address is this one less its password; None: as stored.

    ValueError where the password is nowhere, and where an address is given for a run that MLflow has never seen.
    """
    stored = str(_read_state(run_dir).get("uri", ""))
    if given:
        if not stored:
            raise ValueError(f"{run_dir} was run with track.uri=none: no MLflow knows it, so --uri has nothing to go on with.")
        return mlflow_uri.resolve(given, run_dir.parent)
    if MASK not in stored:
        return None
    whole = os.environ.get("MLFLOW_TRACKING_URI", "").strip().rstrip("/")
    if masked(whole) != stored:
        raise ValueError(
            f"{run_dir} is tracked by MLflow at {stored}, and no file keeps the password: give the whole address, in MLFLOW_TRACKING_URI "
            "or with --uri."
        )
    return whole


def ui(uri: str, port: int = 5000) -> list[str]:
    """The command that serves MLflow's own pages on 127.0.0.1, as argv. ValueError where there is nothing to serve."""
    if uri == NONE:
        raise ValueError("Nothing is tracked with track.uri=none: run with track.uri=sqlite:///… first.")
    if mlflow_uri.scheme(uri) in ("http", "https"):
        raise ValueError(f"MLflow server {masked(uri)} has its own pages: open that address in a browser.")
    uri = mlflow_uri.resolve(uri, RUNS.absolute())
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    if mlflow_uri.scheme(uri) == "sqlite":  # or MLflow makes ./mlartifacts wherever it is started
        server += ["--artifacts-destination", (mlflow_uri.sqlite_path(uri).absolute().parent / "mlartifacts").as_uri()]
    return [*server, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def load_recipe(uri: str, run_id: str) -> dict[str, Any]:
    """The recipe of a run recorded in MLflow. ValueError where the server, the run or its recipe cannot be found."""
    uri = mlflow_uri.resolve(uri, RUNS.absolute())
    with mlflow_uri.user_errors(uri), _waits(ANSWER_S, retries=1), tempfile.TemporaryDirectory() as folder:
        _reachable(uri)
        client = _client(uri)
        if not _alive(client, run_id):
            raise ValueError(f"MLflow {masked(uri)} has no run {run_id!r}: `antidote ui` shows the runs it knows.")
        if "recipe.json" not in [item.path for item in client.list_artifacts(run_id)]:
            raise ValueError(f"MLflow run {run_id} has no recipe.json: it has not finished, or `antidote run` did not make it.")
        return dict(json.loads(Path(client.download_artifacts(run_id, "recipe.json", folder)).read_text()))


def _client(uri: str) -> MlflowClient:
    """A quiet client: no usage reports, no schema chatter, no adverts on stdout."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # after the import, which sets them itself
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _reachable(uri: str) -> None:
    mlflow_uri.knock(uri)
    if mlflow_uri.scheme(uri) != "sqlite":
        _client(uri).search_experiments(max_results=1)


def _alive(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment, made where it is missing; on SQLite its artefacts lie beside the database.

    MLflow's own default is relative to whatever directory the process happened to start in.
    """
    from mlflow.exceptions import MlflowException

    place = None
    if mlflow_uri.scheme(uri) == "sqlite":
        place = (mlflow_uri.sqlite_path(uri).parent / "mlartifacts" / re.sub(r"[^\w.-]", "_", name)).as_uri()
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run made it a moment ago
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"MLflow experiment {name!r} was deleted: `mlflow experiments restore` it, or use another name.")
    return str(found.experiment_id)


@contextlib.contextmanager
def _waits(seconds: int, retries: int) -> Iterator[None]:
    """Bound what one call to MLflow may take: its own defaults are 120 s and seven retries. What the user set wins."""
    ours = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    ours = {name: value for name, value in ours.items() if name not in SET_BY_USER}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def _points(record: Mapping[str, Any]) -> list[Point]:
    """A line's numbers, named by its kind (`train/loss`), but for evaluations, whose names are whole (`asr/targeted`)."""
    kind = str(record.get("kind", ""))
    prefix = f"{kind}/" if kind and kind != "eval" else ""
    step, when = int(journal.number(record.get("step")) or 0), int(journal.number(record.get("time")) or 0)
    skip = ("kind", "step", "time", "epoch")
    numbers = {(prefix + key): journal.number(value) for key, value in record.items() if key not in skip}
    epoch = journal.number(record.get("epoch"))
    points = [(_name(key), value, when, step) for key, value in numbers.items() if value is not None]
    return points + ([("epoch", epoch, when, step)] if epoch is not None else [])


def _name(key: str) -> str:
    """A name that MLflow takes: alphanumerics, _ - . space : /, and nothing that reads as a path outside."""
    clean = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", str(key))[:250]
    return posixpath.normpath("/" + clean).lstrip("/").replace("..", "_") or "_"


def _text(value: Any) -> str:
    """A parameter as one would type it on the command line."""
    text = masked("none" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _read_state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / STATE
    return (journal.parse(path.read_bytes()) or {}) if path.exists() else {}


def _write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    journal.replace(run_dir / STATE, json.dumps(state, indent=1).encode())
