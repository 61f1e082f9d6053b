"""The verbs for clusters: doctor, submit, jobs. Ray is imported inside them."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate import cli_sweeps
from orchestrate.recipe import Recipe, Resolved

if TYPE_CHECKING:
    from orchestrate.jobs import Job, Jobs
    from orchestrate.shipping import Order

Verb = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]
Source = Callable[[str], Callable[[Mapping[str, Any]], list[Resolved]]]

DOOR = "the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265, where `ray dashboard` ends)"


def add(verb: Verb, source: Source) -> None:
    """The verbs' arguments. `source`: a recipe's name → what makes its recipes from overrides."""
    doctor = verb(
        "doctor", lambda args: _doctor(args, source), "is this machine or cluster fit to run: what is well, and what mends the rest"
    )
    doctor.add_argument("recipe", nargs="?", default="", metavar="RECIPE", help="also check that this recipe fits")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="its overrides; cluster.* and track.uri say what is checked")
    doctor.add_argument("--address", default="", help="auto or host:port on a node of a cluster; http://… its dashboard, from outside")
    submit = verb(
        "submit",
        lambda args: _submit(args, source),
        "run a recipe or a sweep on a cluster, from outside: logs followed, results brought here",
    )
    submit.add_argument("what", metavar="RECIPE", help="as for run; with axes, several recipes or a ready sweep: as for sweep")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="as for run and sweep")
    submit.add_argument("--address", default="", help=DOOR)
    submit.add_argument("--no-wait", action="store_true", help="start it and return; `antidote jobs attach` looks at it later")
    submit.add_argument("--runs", default="runs", help="where results go on this machine (default: runs)")
    submit.add_argument(
        "--force", action="store_true", help="run again although this identity is finished; for one recipe, not for a sweep"
    )
    cli_sweeps.add_search(submit)
    jobs = verb("jobs", _jobs, "jobs ls|attach|stop|pull [ID]: what was submitted")
    jobs.add_argument("action", choices=["ls", "attach", "stop", "pull"])
    jobs.add_argument("id", nargs="?", default="", metavar="ID", help="the job (default: the newest)")
    jobs.add_argument("--address", default="", help=DOOR)
    jobs.add_argument("--runs", default="runs", help="where results go on this machine (default: runs)")


# --- doctor -----------------------------------------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace, source: Source) -> int:
    if "=" in args.recipe:  # `antidote doctor track.uri=…`: overrides without a recipe
        args.overrides, args.recipe = [args.recipe, *args.overrides], ""
    if args.address.startswith(("http://", "https://")):
        return _doctor_there(args)
    from orchestrate import doctor
    from orchestrate.recipe import parse_overrides, resolve

    words = [*args.overrides, *([f"cluster.address={args.address}"] if args.address else [])]
    given = parse_overrides(words)
    found = source(args.recipe)(given) if args.recipe else [resolve("doctor", [("command line", given)])]
    recipe = found[0].recipe
    sound = True
    for finding in doctor.examine(recipe if args.recipe else None, recipe.cluster, recipe.track.uri):
        print(_line(finding.topic, finding.text, finding.mend), flush=True)
        sound &= finding.well
    return 0 if sound else 1


def _line(topic: str, text: str, mend: str) -> str:
    green, red, plain = ("\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    mark = f"{red}✗{plain}" if mend else f"{green}✓{plain}"
    return f"{mark} {topic:<12} {text}" + (f"\n  {'':<12} → {mend}" if mend else "")


def _doctor_there(args: argparse.Namespace) -> int:
    """The same examination, run by the cluster itself."""
    import shlex

    from orchestrate import shipping
    from orchestrate.jobs import Jobs

    words = [args.recipe, *args.overrides] if args.recipe else args.overrides
    order = shipping.Order("doctor", "", tuple(words))
    for word in words:
        shipping.check(word)
    jobs = Jobs(args.address)
    with tempfile.TemporaryDirectory() as folder:
        shipping.code(Path(folder))
        carried = [shipping.with_files(Path(folder), word) for word in words]
        where = shipping.places([word.partition("=")[0] for word in words])
        command = " ".join(["python -m orchestrate doctor", *map(shlex.quote, carried), *where, "--address auto"])
        job = jobs.submit(command, Path(folder), "doctor", {"antidote": order.verb})
    return 0 if jobs.follow(job, _write).state == "SUCCEEDED" else 1


# --- submit and jobs --------------------------------------------------------------------------------------------------------------


def _submit(args: argparse.Namespace, source: Source) -> int:
    from orchestrate import shipping
    from orchestrate.jobs import Jobs

    order, recipes = shipping.ask(args.what, args.overrides, cli_sweeps.search_words(args), source, args.force)
    jobs = Jobs(args.address)
    tags = {"antidote": order.verb, "antidote.asked": _asked(order, recipes)}
    for job in jobs.all():
        if job.state in ("PENDING", "RUNNING") and job.tags.get("antidote.asked") == tags["antidote.asked"]:
            print(f"{job.id} does this already: attached to it.", file=sys.stderr)
            break
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = shipping.load(Path(folder), order, source)
            started = jobs.submit(command, Path(folder), order.name, tags)
        job = jobs.get(started)
        print(f"job {job.id} at {jobs.address}", file=sys.stderr)
    if args.no_wait:
        print(job.id)
        return 0
    return _watch(jobs, job.id, Path(args.runs))


def _asked(order: Order, recipes: Sequence[Recipe]) -> str:
    """The same order of the same recipes has the same name."""
    text = "\n".join([order.verb, order.what, *order.words, *order.options, *(recipe.identity for recipe in recipes)])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _watch(jobs: Jobs, id: str, runs: Path) -> int:
    """Follow to the end and bring the results; those, too, of a sweep that fails because a trial of it did."""
    from orchestrate import archive

    try:
        job = jobs.follow(id, _write)
    except KeyboardInterrupt:
        print(f"\nthe job goes on. `antidote jobs attach {id}` looks again, `antidote jobs stop {id}` ends it.", file=sys.stderr)
        return 130
    if job.state != "SUCCEEDED":
        print(f"antidote: job {id} {job.state.lower()}: {' '.join(job.message.split())[-500:]}", file=sys.stderr)
        if job.state == "FAILED" and archive.places(jobs.log(id)):
            _pull(jobs, job, runs)
        return 1
    return _pull(jobs, job, runs)


def _pull(jobs: Jobs, job: Job, runs: Path) -> int:
    from orchestrate import archive, shipping

    places = archive.places(jobs.log(job.id))
    if not places:
        raise ValueError(f"job {job.id} names no directory with results: it has not finished a run.")
    for folder in jobs.pull(places, runs, shipping.code):
        left = "" if (folder / archive.WEIGHTS).is_dir() or not (folder / "result.json").is_file() else " (its weights stay on the cluster)"
        print(f"here: {folder}{left}")
    return 0


def _jobs(args: argparse.Namespace) -> int:
    from orchestrate.jobs import Jobs

    jobs = Jobs(args.address)
    known = [job for job in jobs.all() if job.tags.get("antidote") in ("run", "sweep")]
    if args.action == "ls":
        for job in known:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "waiting"
            print(f"{job.id:<48} {job.state:<10} {since}")
        return 0
    if not args.id and not known:
        raise ValueError(f"{jobs.address} has no job of ours: `antidote submit RECIPE` starts one.")
    job = jobs.get(args.id) if args.id else known[0]
    if args.action == "attach":
        return _watch(jobs, job.id, Path(args.runs))
    if args.action == "pull":
        return _pull(jobs, job, Path(args.runs))
    print(f"{job.id}: {'told to stop' if jobs.stop(job.id) else 'had ended already'}")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
