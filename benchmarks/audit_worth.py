"""What an audit is worth: each score against known poison, by set and attack; and what training without the worst pairs brings.

    python benchmarks/audit_worth.py OUT [scenes cifar10=PATH,data.size=10000 flickr8k=PATH,data.captions=every] [--pairs 6000]
                                     [--attacks …] [--train]

For each set and attack `OUT/audits/<set>-<attack>/` (clean: no poison, what a user without any would see), and with --train runs in
OUT/runs: undefended, without the worst 1 % and 5 %, RoCLIP and OTCCLIP. What is finished is not done again, so a stopped one goes on. Then:

    python docs/build.py --audits scenes OUT/audits/scenes-*
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from orchestrate.recipe import Recipe

# 1.5 % of the pairs: below the 3 % at which poison fills its own neighbourhoods.
SHARE, COPIES = 0.015, 4
# mm_poison II: captions of one class on the images of another, the swap of captions.
ATTACKS = ("targeted", "badnets", "stripes", "blended", "wanet", "mm_poison_2", "clean")
QUIET = {"track.uri": "none", "track.report": False, "evaluate.probe": False}
SHARED = {"cluster.cpus": 0.7, "cluster.match_cpus": 0.3}  # two at once on two cores
DROPS = (0.01, 0.05)
TRAINED = {"train.epochs": 14, "train.batch": 64, "train.warmup": 100}  # as in the demo


def poison(attack: str, pairs: int) -> dict[str, Any]:
    return {"targeted": {"attack.copies": COPIES}, "clean": {}}.get(attack, {"attack.count": round(SHARE * pairs)})


def data(spec: str, pairs: int) -> tuple[str, dict[str, Any]]:
    """`scenes`, or NAME=PATH with more keys after commas → (name, overrides)."""
    name, _, rest = spec.partition("=")
    path, *more = rest.split(",") if rest else ["scenes"]
    return name, {"data": path, "data.size": pairs, "data.heldout": 500, **dict(word.split("=", 1) for word in more)}


def trained(attack: str, base: dict[str, Any], scores: Path) -> list[Recipe]:
    """The members that are compared: nothing, the audit's worst left out, RoCLIP, OTCCLIP."""
    from orchestrate import recipes

    base = base | TRAINED | QUIET | SHARED
    left_out: list[dict[str, Any]] = [{"data.exclude": str(scores), "data.drop": drop} for drop in DROPS]
    members: list[tuple[str, dict[str, Any]]] = [("clip", {}), *(("clip", more) for more in left_out), ("roclip", {}), ("otcclip", {})]
    return [recipes.get(f"{method}-{attack}", base | more)[0].recipe for method, more in members]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sets", nargs="*", default=["scenes"])
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument("--train", action="store_true", help="also train with and without the worst pairs")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    from orchestrate import cluster, recipes, suite
    from orchestrate.audit import Options, audit
    from orchestrate.cli_audit import told
    from orchestrate.report_text import text_table

    out, members = args.out.absolute(), []
    here = {"cluster.threads": args.threads, "cluster.runs": str(out / "runs")}
    with cluster.connected(recipes.get("clip-clean")[0].recipe.cluster):
        for spec in args.sets:
            name, where = data(spec, args.pairs)
            for attack in args.attacks:
                base = where | poison(attack, int(where["data.size"])) | here
                folder = out / "audits" / f"{name}-{attack}"
                if not (folder / "audit.json").exists():
                    facts = audit(recipes.get(f"clip-{attack}", base)[0].recipe, folder, Options())
                    print("\n".join([f"\n{name}, {attack}: {facts['seconds']:.0f} s", *told({**facts, "out": folder})]), flush=True)
                if args.train and attack != "clean":
                    members += trained(attack, base, folder / "scores.parquet")
        for path in dict.fromkeys(member.data.path for member in members):
            results = suite.run([member for member in members if member.data.path == path])
            print("\n" + text_table(results))
            for result in results:
                if (found := result.get("audit/poison_removed")) is not None:
                    print(f"{Path(result['run']).name}: {found:g} poisoned pairs removed")


if __name__ == "__main__":
    main()
