"""What the doctor says of nodes that are well and of nodes that are not, and what a node finds out about itself."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrate import ROOT, cluster, doctor, probe
from orchestrate.cli import main
from orchestrate.cluster import Answer
from orchestrate.recipe import Cluster, resolve

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "open_clip_torch": "3.3.0", "numpy": "2.4.0"}


def node(host: str, error: str = "", **changes: object) -> Answer:
    facts = {"host": host, "versions": VERSIONS, "shadowed": [], "disk_free": 0.5, "shm": 1 << 30, "missing": [], "open": [], "storage": ""}
    resources = {"CPU": 8.0} | ({"GPU": 4.0} if "gpus" in changes else {})
    return Answer(host, "10.0.0.1", resources, {} if error else facts | changes, error)


def topics(*nodes: Answer, place: Cluster | None = None, storage: str = "s3://bucket/runs") -> dict[str, doctor.Finding]:
    return {finding.topic: finding for finding in doctor.judge(nodes, place or Cluster(address="auto"), storage, "none")}


def test_a_sound_cluster_is_well_in_every_line():
    found = topics(node("a"), node("b"))
    assert all(finding.well for finding in found.values())
    assert found["nodes"].text == "2 alive: a 8 CPU, b 8 CPU"
    assert found["versions"].text == "python 3.11.7, ray 2.60.0, torch 2.13.0, open_clip_torch 3.3.0; 5 compared"
    assert "all 2 nodes" in found["storage"].text and found["gpus"].text == "none; training runs on CPUs"


@pytest.mark.parametrize(
    ("topic", "sick", "said"),
    [
        ("versions", node("b", versions=VERSIONS | {"torch": "2.12.0"}), "torch is 2.13.0 on a, 2.12.0 on b: run deploy/setup.sh"),
        ("versions", node("b", versions=VERSIONS | {"numpy": "missing"}), "numpy is 2.4.0 on a, missing on b"),
        ("packages", node("b", shadowed=["torch is /x/torch.py"]), "b: torch is /x/torch.py"),
        ("storage", node("b", storage="does not see what the driver wrote"), "b: does not see what the driver wrote"),
        ("mlflow", node("b", mlflow="connection refused"), "b: connection refused"),
        ("data", node("b", missing=["/data/x"]), "b: /data/x"),
        ("disk", node("b", disk_free=0.02), "b: /tmp has 2% free"),
        ("disk", node("b", shm=32 << 20), "b: /dev/shm holds 32 MB"),
        ("ports", node("b", open=["127.0.0.1:9", "0.0.0.0:8265"]), "b: 0.0.0.0:8265"),
        ("nodes", node("b", error="no answer within 180 s"), "no answer from b (no answer within 180 s)"),
        ("gpus", node("b", gpus={"count": 3, "names": ["H200"]}), "b: torch sees 3 of 4"),
        ("gpus", node("b", gpus={"error": "CUDA driver version is insufficient"}), "b: CUDA driver version is insufficient"),
    ],
)
def test_what_is_wrong_is_named_with_its_node_and_its_mend(topic: str, sick: Answer, said: str):
    found = topics(node("a"), sick)
    assert [name for name, finding in found.items() if not finding.well] == [topic]
    assert said in f"{found[topic].text} {found[topic].mend}"


def test_nodes_that_have_left_are_no_fault():
    found = topics(node("a"), node("gone", error="dead"))
    assert found["nodes"].well and "1 have left" in found["nodes"].text


def test_a_cluster_where_nobody_answers_is_only_said_to_be_so():
    found = topics(node("a", error="no answer within 180 s"))
    assert list(found) == ["nodes"] and not found["nodes"].well


def test_a_laptops_own_ports_are_its_own_business():
    assert "ports" not in topics(node("a", open=["0.0.0.0:8265"]), place=Cluster())


def test_no_token_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=token" in doctor._door(Cluster()).mend
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor._door(Cluster()).well


@pytest.mark.parametrize(
    ("words", "nodes", "said"),
    [
        ({"cluster.workers": 2}, [{"CPU": 4.0}], ""),
        ({"cluster.workers": 9}, [{"CPU": 4.0}], "the cluster is too small"),
        ({"cluster.cpus": 3}, [{"CPU": 2.0}, {"CPU": 2.0}], "not node by node (2 CPU + 0 GPU, 2 CPU + 0 GPU)"),
        ({"cluster.gpus": 1}, [{"CPU": 4.0}], "the cluster is too small"),
    ],
)
def test_a_recipe_fits_node_by_node_or_not(words: dict[str, object], nodes: list[dict[str, float]], said: str):
    recipe = resolve("x", [("test", words)]).recipe
    has = {kind: sum(n.get(kind, 0.0) for n in nodes) for kind in ("CPU", "GPU")}
    finding = doctor.plan(recipe, recipe.cluster, has, nodes)
    assert finding.well == (not said) and said in finding.mend


# --- a node's own facts -----------------------------------------------------------------------------------------------------------


def test_the_pins_are_the_projects():
    assert {"torch", "ray", "open_clip_torch", "mlflow", "POT"} <= set(probe.pins())
    assert all(probe._version(name) != "missing" for name in probe.pins())


def test_nothing_is_shadowed_here_and_a_stray_file_is_found(tmp_path: Path):
    assert probe.shadowed(probe.pins()) == []
    (tmp_path / "jinja2.py").write_text("")
    code = "from orchestrate import probe; print(probe.shadowed(probe.pins()))"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert f"jinja2 is {tmp_path / 'jinja2.py'}, not the one in" in done.stdout


def test_open_ports_are_seen():
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0)), other.bind(("0.0.0.0", 0))
        one.listen(), other.listen()
        found = probe.listening()
        mine, all_hosts = (f"{host}:{port}" for host, port in (one.getsockname(), other.getsockname()))
        assert {mine, all_hosts} <= set(found)
    assert mine not in probe.listening()


def test_storage_is_the_same_place_or_another(tmp_path: Path):
    with doctor._marked(str(tmp_path / "runs")) as (mark, failure):
        assert failure == "" and probe._storage(str(tmp_path / "runs"), mark, "a") == ""
        (tmp_path / "other").mkdir()
        assert "another place" in probe._storage(str(tmp_path / "other"), mark, "a")
    assert list((tmp_path / "runs").iterdir()) == []
    with doctor._marked("/proc/nowhere") as (_, failure):
        assert failure
    with doctor._marked("s4://nowhere") as (_, failure):
        assert failure


@pytest.fixture
def server() -> Iterator[str]:
    class Answering(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            well = self.path == "/health" and self.headers.get("Authorization") == "Basic bWU6aHVzaA=="
            self.send_response(200 if well else 401)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{one.server_port}"
        one.shutdown()


def test_a_store_answers_refuses_or_is_silent(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert probe.answer(f"http://me:hush@{server}") == ""
    assert probe.answer(f"http://{server}") == "answers 401 Unauthorized"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    assert probe.answer(f"http://{server}") == ""
    assert probe.answer("http://127.0.0.1:9") == "connection refused"
    assert probe.answer("postgresql://me:hush@127.0.0.1:9/db") == "connection refused"
    assert probe.answer(f"sqlite:///{tmp_path}/mlflow.db") == ""
    assert "no directory" in probe.answer(f"sqlite:///{tmp_path}/none/mlflow.db")


def test_a_store_in_a_file_needs_a_place_that_this_machine_may_write_to(tmp_path: Path):
    """Its folder is made with the first run: that there is none yet is no fault."""
    found = doctor.file_store(f"sqlite:///{tmp_path}/none/yet/mlflow.db")
    assert found.well and "this machine alone" in found.text
    (tmp_path / "file").write_text("")
    assert not doctor.file_store(f"sqlite:///{tmp_path}/file/mlflow.db").well


def test_what_is_shipped_is_measured_as_ray_packs_it():
    assert 100_000 < cluster.shipped_bytes() < 5_000_000


def test_a_job_is_not_shipped_twice(monkeypatch: pytest.MonkeyPatch):
    """Ray refuses a driver's runtime environment that says again what its job's says."""
    monkeypatch.setenv(cluster.IN_JOB, "{}")
    assert cluster.runtime_env() == {}


def test_a_door_where_nobody_answers_is_told_with_the_mend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    assert main(["jobs", "ls", "--address", "http://127.0.0.1:9"]) == 1
    assert "no cluster answers at http://127.0.0.1:9: open the tunnel with `ray dashboard cluster.yaml`" in capsys.readouterr().err
