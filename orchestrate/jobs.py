"""Ray Jobs: the door of a cluster for somebody outside it. One HTTP address, the dashboard's, usually at the end of an SSH tunnel.

Carries the token by itself where one is set up (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`). Every wait has an end.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate import archive, cluster

ADDRESS = "http://127.0.0.1:8265"
START_S = 120.0  # in which the head of a cluster that has just started comes to take jobs
LOST_S = 300.0  # how long a cluster that was reached may stay away while its log is followed
END_S = 60.0  # between a log's last line and the job's last state
PULL_S = 900.0  # for the job that packs results
OPEN = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Job:
    id: str
    state: str
    command: str
    message: str
    started: float  # seconds since 1970, 0 where it has not
    tags: Mapping[str, str]


class Jobs:
    def __init__(self, address: str = "") -> None:
        """`address`: the dashboard's, or "" for `RAY_API_SERVER_ADDRESS`, else localhost. ValueError where nobody lets us in."""
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray would prefer RAY_ADDRESS to what it is told
        token = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
        if os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(token):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            self.client = cluster.jobs_client(self.address)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(self._refused(error)) from error

    def _refused(self, error: BaseException) -> str:
        text = " ".join(str(error).split())
        if isinstance(error, PermissionError) or "token" in text:
            return (
                f"{self.address} wants its token: put the cluster's in ~/.ray/auth_token (or RAY_AUTH_TOKEN_PATH), and RAY_AUTH_MODE=token."
            )
        return f"no cluster answers at {self.address}: open the tunnel with `ray dashboard cluster.yaml`, or give --address. ({text[:200]})"

    def submit(self, command: str, folder: Path, name: str, tags: Mapping[str, str]) -> str:
        """Start `command` in a copy of `folder` on the cluster; the job's id."""
        job = f"{name}-{time.strftime('%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        env = {"working_dir": str(folder), "env_vars": dict(cluster.ENVIRONMENT)}
        until = time.monotonic() + START_S
        while True:
            try:
                return str(self.client.submit_job(entrypoint=command, submission_id=job, runtime_env=env, metadata=dict(tags)))
            except RuntimeError as error:
                if "No available agent" not in str(error):  # the dashboard answers a little before the agent that starts jobs is there
                    raise
                if time.monotonic() > until:
                    raise ValueError(
                        f"the head of {self.address} has taken no job for {START_S:g} s: its agent may not have started (another "
                        "Ray on port 52365?), see dashboard_agent.log there."
                    ) from error
            time.sleep(1)

    def all(self) -> list[Job]:
        """Every job that the cluster remembers, the newest first."""
        return sorted((_job(info) for info in self.client.list_jobs() if info.submission_id), key=lambda job: -job.started)

    def get(self, id: str) -> Job:
        """ValueError where the cluster has no such job."""
        try:
            return _job(self.client.get_job_info(id))
        except RuntimeError as error:
            known = ", ".join(job.id for job in self.all()[:5])
            raise ValueError(f"{self.address} has no job {id!r}: there are {known or 'none'}.") from error

    def log(self, id: str) -> str:
        return str(self.client.get_job_logs(id))

    def stop(self, id: str) -> bool:
        """Ask it to end; False where it had ended already."""
        self.get(id)
        return bool(self.client.stop_job(id))

    def follow(self, id: str, write: Callable[[str], Any]) -> Job:
        """Everything the job says, from its first line, until it ends. A connection that breaks is made again."""
        shown, away = 0, 0.0
        while True:
            before = shown
            try:
                shown = asyncio.run(self._tail(id, shown, write))
                job = self.get(id)
                if job.state not in OPEN:
                    return job
                away = 0.0 if shown > before else away or time.monotonic()
            except (RuntimeError, OSError, ValueError) as error:
                away = away or time.monotonic()
                if time.monotonic() - away > LOST_S:
                    raise ValueError(
                        f"{self.address} has not answered for {LOST_S:g} s ({error}). The job may go on: "
                        f"`antidote jobs attach {id}` looks again."
                    ) from error
            if away and time.monotonic() - away > END_S and self._ended(id):
                return self.get(id)
            time.sleep(1)

    def _ended(self, id: str) -> bool:
        try:
            return self.get(id).state not in OPEN
        except (RuntimeError, OSError, ValueError):
            return False

    async def _tail(self, id: str, shown: int, write: Callable[[str], Any]) -> int:
        """Writes what comes after the first `shown` characters; how many there are then."""
        seen = 0
        async for text in self.client.tail_job_logs(id):
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)
                shown = seen
        return max(shown, seen)

    def pull(self, places: Sequence[str], folder: Path, carry: Callable[[Path], None]) -> list[Path]:
        """Bring directories of the cluster here, by a second job whose log is the archive. `carry` fills the folder that it runs in."""
        import shlex
        import tempfile

        with tempfile.TemporaryDirectory() as cargo:
            carry(Path(cargo))
            command = shlex.join(["python", "-m", "orchestrate.archive", *places])
            job = self.submit(command, Path(cargo), "results", {"antidote": "archive"})
        until = time.monotonic() + PULL_S
        while (state := self.get(job).state) in OPEN:
            if time.monotonic() > until:
                self.stop(job)
                raise ValueError(f"the results were not packed within {PULL_S:g} s: `antidote jobs pull` tries again.")
            time.sleep(0.5)
        log = self.log(job)
        if state != "SUCCEEDED":
            raise ValueError(f"the cluster could not pack the results: {log.strip()[-300:]}")
        return archive.unpack(log, folder)


def _job(info: Any) -> Job:
    state = getattr(info.status, "value", info.status)
    return Job(
        info.submission_id, str(state), info.entrypoint, info.message or "", (info.start_time or 0) / 1000, dict(info.metadata or {})
    )
