"""What one node knows of itself, for `antidote doctor`: plain values, gathered by a task that Ray runs there. No Ray in here."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orchestrate import ROOT, mlflow_uri

# What is imported by a name that is not the package's.
MODULES = {"open_clip_torch": "open_clip", "scikit-learn": "sklearn", "POT": "ot", "pillow": "PIL"}
ROOMS = ("orchestrate", "models", "attacks", "defenses")
GPU_S, HTTP_S = 120.0, 10.0  # for a first computation on every GPU, and for one answer over HTTP
COMPUTE = """
import json, torch
n = torch.cuda.device_count()
for i in range(n):
    assert float(torch.ones(8, device=f"cuda:{i}").sum()) == 8
print(json.dumps({"count": n, "names": [torch.cuda.get_device_name(i) for i in range(n)], "cuda": torch.version.cuda}))
"""


def pins() -> list[str]:
    """Names of the packages that the project asks for."""
    if (ROOT / "pyproject.toml").is_file():
        asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    else:
        asked = [line for line in distribution("clip-antidote").requires or [] if "extra ==" not in line]
    return [re.split(r"[\s\[<>=!~;]", pin)[0] for pin in asked]


def look(packages: list[str], gpus: bool, storage: str, mark: str, paths: list[str], uri: str) -> dict[str, Any]:
    """Facts of this node. `gpus`: compute on each; `storage`: read the file `mark` there and leave one; `paths` must exist."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "shadowed": shadowed(packages),
        "code": str(ROOT),
        "disk_free": _free("/tmp"),
        "shm": _size("/dev/shm"),
        "missing": [path for path in paths if not os.path.exists(os.path.expanduser(path))],
        "open": listening(),
    }
    if gpus:
        found["gpus"] = _gpus()
    if storage:
        found["storage"] = _storage(storage, mark, found["host"])
    if uri and uri != mlflow_uri.NONE:
        found["mlflow"] = answer(uri)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def shadowed(packages: list[str]) -> list[str]:
    """Names that Python would take from somewhere else than they are installed: a stray `torch.py` or `models/` in front on the path."""
    wrong = []
    for name in packages:
        module = MODULES.get(name, name.replace("-", "_"))
        with contextlib.suppress(PackageNotFoundError, ValueError, ImportError):
            spec, home = importlib.util.find_spec(module), Path(str(distribution(name).locate_file(""))).resolve()
            origin = Path(spec.origin).resolve() if spec and spec.origin else None
            if origin is not None and not origin.is_relative_to(home):
                wrong.append(f"{module} is {origin}, not the one in {home}")
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != ROOT:
            wrong.append(f"{room} is {origin or 'missing'}, not {ROOT / room}")
    return wrong


def _free(path: str) -> float:
    """Share of the disk that is free; Ray stops storing objects below 5 %."""
    usage = shutil.disk_usage(path)
    return usage.free / usage.total


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).total
    return 0


def listening() -> list[str]:
    """Addresses that take TCP connections on this node, as `0.0.0.0:8265`; none where the system does not tell."""
    found = set()
    for name, words in (("tcp", 1), ("tcp6", 4)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A":
                    raw = bytes.fromhex(local.partition(":")[0])
                    raw = b"".join(raw[4 * i : 4 * i + 4][::-1] for i in range(words))
                    text = socket.inet_ntop(socket.AF_INET if words == 1 else socket.AF_INET6, raw)
                    found.add(f"{text.removeprefix('::ffff:')}:{int(local.partition(':')[2], 16)}")
    return sorted(found)


def _gpus() -> dict[str, Any]:
    """Every GPU of the node, computed on once, in a process that sees them all: Ray hides them from a task that asked for none."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run([sys.executable, "-c", COMPUTE], env=env, capture_output=True, text=True, timeout=GPU_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {GPU_S:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["unknown"])[-1][:300]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _storage(storage: str, mark: str, host: str) -> str:
    """ "" where this node reads what the driver has written and can write itself, else why not."""
    try:
        filesystem, path = opened(storage)
        with filesystem.open_input_stream(f"{path}/{mark}") as file:
            if file.read() != mark.encode():
                return "reads another content"
        with filesystem.open_output_stream(f"{path}/{mark}-{host}-{os.getpid()}") as file:
            file.write(host.encode())
        filesystem.delete_file(f"{path}/{mark}-{host}-{os.getpid()}")
    except FileNotFoundError:
        return "does not see what the driver wrote: the path means another place here"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def opened(storage: str) -> tuple[Any, str]:
    """(pyarrow file system, path on it) of a folder or an address such as s3://bucket/path."""
    from pyarrow import fs

    if "://" in storage:
        filesystem, path = fs.FileSystem.from_uri(storage)
        return filesystem, path.rstrip("/")
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(storage)).rstrip("/")


def answer(uri: str) -> str:
    """ "" where the MLflow store answers this node, else why not."""
    try:
        if mlflow_uri.scheme(uri) not in ("http", "https"):
            if mlflow_uri.scheme(uri) == "sqlite" and not mlflow_uri.sqlite_path(uri).parent.is_dir():
                return f"no directory {mlflow_uri.sqlite_path(uri).parent}"
            mlflow_uri.knock(uri)
            return ""
        parts = urlsplit(uri)
        user, password = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME"), parts.password
        password = password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
        request = urllib.request.Request(f"{bare.rstrip('/')}/health")
        if user and password:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
        with urllib.request.urlopen(request, timeout=HTTP_S):
            return ""
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason}"
    except Exception as error:
        return mlflow_uri.reason(error)
