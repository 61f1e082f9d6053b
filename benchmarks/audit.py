"""How fast an audit scores, and how much memory it holds: scenes, an untrained tiny-rn, each setting in a fresh process.

    python benchmarks/audit.py [--pairs 10000 100000] [--actors 1 2] [--out benchmarks/audit.json]

score     pairs/s of scoring alone: from the first item handed out to the last part written, actors' start included
whole     seconds of the whole audit, reading and ranking included (the model is given, so nothing is trained)
driver, actor   largest resident memory of the driver and of any scoring actor, in MB. Decoded pixels lie in the object store, which Ray
          counts to whoever maps them: `store` says how large they are, and 0 where the set streams (--stream)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def one(pairs: int, actors: int, stream: bool) -> dict[str, Any]:
    """One audit in this process."""
    from models import clip, export
    from orchestrate import recipes
    from orchestrate.audit import Options, audit

    more = {"data.size": pairs, "data.heldout": 140, "cluster.match_actors": actors, "cluster.match_cpus": 0.5, "cluster.threads": 1}
    recipe = recipes.get("clip-clean", {**more, "data.stream": "always" if stream else "never"})[0].recipe
    with tempfile.TemporaryDirectory() as folder:
        cfg = clip.config(recipe.model.name)
        export.save(clip.build(cfg, seed=0), cfg, Path(folder) / "model", "An untrained model.")
        peak = Peak()
        began = time.monotonic()
        with peak:
            facts = audit(recipe, Path(folder) / "out", Options(checkpoint=str(Path(folder) / "model"), copy_gb=0))
        whole = time.monotonic() - began
    side = 64
    return {
        "pairs": pairs,
        "actors": actors,
        "stream": stream,
        "pairs_per_s": pairs / facts["seconds/score"],
        "score_s": facts["seconds/score"],
        "whole_s": whole,
        "store_mb": 0 if stream else (pairs + 140) * side * side * 3 / 1e6,
        **peak.found,
    }


class Peak:
    """Largest private and shared resident memory, in MB, of this process and of its scoring actors, looked at ten times a second."""

    def __init__(self) -> None:
        self.found = {"driver_mb": 0.0, "driver_private_mb": 0.0, "actor_mb": 0.0, "actor_private_mb": 0.0}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.1):
            for who, files in (("driver", [Path("/proc/self")]), ("actor", _actors())):
                for folder in files:
                    try:
                        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
                    except OSError:
                        continue  # it has just ended
                    resident, shared = (int(fields[name].split()[0]) / 1e3 for name in ("VmRSS", "RssShmem"))
                    self.found[f"{who}_mb"] = max(self.found[f"{who}_mb"], resident)
                    self.found[f"{who}_private_mb"] = max(self.found[f"{who}_private_mb"], resident - shared)


def _actors() -> list[Path]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"MapBatches(ScoreActor)" in (folder / "cmdline").read_bytes():
                found.append(folder)
        except OSError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stream", action="store_true", help="read pixels from files instead of the object store")
    parser.add_argument("--out", default="")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.pairs[0], args.actors[0], args.stream)))
        return
    results = []
    for pairs in args.pairs:
        for actors in args.actors:
            words = ["--one", "--pairs", str(pairs), "--actors", str(actors), *(["--stream"] if args.stream else [])]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print({name: round(x) if isinstance(x, float) else x for name, x in results[-1].items()}, flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
