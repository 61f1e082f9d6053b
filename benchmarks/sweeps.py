"""What a sweep costs beside its runs, whether kill -9 loses or repeats any, and whether ASHA finds what the whole grid finds.

    python benchmarks/sweeps.py [--sweep paper-grid-smoke --words seed=0] [--singles 5] [--out benchmarks/sweeps.json]
    python benchmarks/sweeps.py --asha zeroshot/top1 --words defense.every=1,2,4 defense.pool_size=0.005,0.02,0.1 evaluate.every=1 seed=0

overhead    wall time of the sweep, killed (kill -9 of the driver) when half of its trials are done and gone on with, over the sum of
            its single runs: `antidote run` on --singles of its recipes, evenly spread, one after another before and after; their mean
            times the number of trials                                                                          aim: at most 1.1
lost, repeated    trials of the sweep without a result at the end; trials that were done twice
ASHA        the same trials with --asha in a directory of its own: its best and the whole grid's, and what each took
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from orchestrate import measure, sweepdir  # noqa: E402

ANTIDOTE = [sys.executable, "-m", "orchestrate"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}


def begin(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*ANTIDOTE, *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(*words: str) -> float:
    start = time.monotonic()
    if begin(*words).wait():
        sys.exit(f"failed: antidote {' '.join(words)}")
    return time.monotonic() - start


def the_sweep(runs: Path) -> Path:
    [folder] = [path for path in runs.glob("*-sweep-*") if sweepdir.is_sweep(path)]
    return folder


def done(folder: Path) -> Counter[str]:
    """Identity → how often the trial was done."""
    lines = [json.loads(line) for line in (folder / sweepdir.TRIALS).read_text().splitlines()]
    return Counter(line["identity"] for line in lines if line["state"] == sweepdir.DONE)


def killed_and_resumed(sweep: str, words: list[str], runs: Path) -> dict[str, Any]:
    """Seconds of both drivers' lives, and what became of the trials."""
    start, process = time.monotonic(), begin("sweep", sweep, *words, f"cluster.runs={runs}")
    while not list(runs.glob("*-sweep-*/" + sweepdir.TRIALS)):
        if process.poll() is not None:
            sys.exit("the sweep ended before its first trial")
        time.sleep(0.2)
    folder = the_sweep(runs)
    trials = sweepdir.read(folder)["trials"]
    while len(done(folder)) < len(trials) // 2 and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first, before = time.monotonic() - start, done(folder)
    second = timed("sweep", str(folder), "--resume")
    after = done(folder)
    return {
        "trials": len(trials),
        "done_before_kill": len(before),
        "lost": sum(not (runs / trial["run"] / "result.json").exists() for trial in trials),
        "repeated": sum(count > 1 for count in after.values()),
        "seconds": first + second,
        "recipes": [str(runs / trial["run"] / "recipe.json") for trial in trials],
    }


def singles(recipes: list[str], count: int, where: Path) -> list[float]:
    """Seconds of `antidote run` on some of the sweep's recipes, each in a directory of its own."""
    some = recipes[:: max(1, len(recipes) // count)][:count]
    found = []
    for k, recipe in enumerate(some):
        found.append(timed("run", recipe, f"cluster.runs={where / str(k)}", "cluster.threads=0"))
        print(f"  single run {k + 1} of {len(some)}: {found[-1]:.1f} s", flush=True)
    return found


def scores(folder: Path, metric: str) -> dict[str, float]:
    """Label → value of each finished trial."""
    found = {}
    for event in sweepdir.events(folder).values():
        file = folder.parent / event.run / "result.json"
        if event.state in sweepdir.FINISHED and (value := measure.value(json.loads(file.read_text()), metric)) is not None:
            found[event.label] = value
    return found


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    told = killed_and_resumed(args.sweep, args.words, folder / "sweep")
    alone = singles(told.pop("recipes"), args.singles, folder / "alone")
    total = statistics.mean(alone) * told["trials"]
    return told | {"single_s": alone, "sum_of_singles_s": total, "sweep_over_singles": told["seconds"] / total}


def asha(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole grid, then the same with ASHA."""
    told: dict[str, Any] = {"metric": args.asha}
    found: dict[str, dict[str, float]] = {}
    for name, more in (("grid", []), ("asha", ["--asha", args.asha])):
        runs = folder / name
        seconds = timed("sweep", args.sweep, *args.words, f"cluster.runs={runs}", *more)
        found[name] = scores(the_sweep(runs), args.asha)
        winner = max(found[name], key=lambda label: found[name][label])
        states = Counter(event.state for event in sweepdir.events(the_sweep(runs)).values())
        told[name] = {"seconds": seconds, "best": winner, "value": found[name][winner], "trials": dict(states)}
    theirs = found["grid"][told["asha"]["best"]]
    return told | {"place_of_ashas_best_in_the_grid": 1 + sum(value > theirs for value in found["grid"].values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default="paper-grid-smoke", help="a ready sweep, or recipes by comma")
    parser.add_argument("--words", nargs="*", default=["seed=0"], help="axes and values")
    parser.add_argument("--singles", type=int, default=5)
    parser.add_argument("--asha", default="", metavar="METRIC", help="compare ASHA on this metric with the whole grid instead")
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    try:
        told = asha(args, folder) if args.asha else overhead(args, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(told, indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
