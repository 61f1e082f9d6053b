"""A run's directory: runs/<recipe>-<hash8>/, what lies in it, and who may write there."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.base import pick, trigger_of
from orchestrate import journal, mlflow_uri
from orchestrate.cluster import absolute
from orchestrate.data.pixels import Pixels
from orchestrate.prepared import Prepared, build_defense, left_out
from orchestrate.recipe import Recipe, flatten
from orchestrate.secrets import masked_tree
from orchestrate.storage import CHECKPOINTS, Store

RESULT = "result.json"
SHOWN = 8  # examples of each kind in the gallery
TABLES = ("manifest.parquet", "quarantine.parquet", "rounds", "plans.parquet")
ARTIFACTS = ("recipe.json", "data.json", *TABLES, "model", RESULT, "report.html", "audit/audit.html", "audit/scores.parquet")
TOLD = ("kind", "epoch", "step", "time", "seconds")  # of an evaluation's record, about the record
MATCHED = ("poisoned_kept", "clean_kept", "moved")  # of the last matching round, in result.json
SELECTED = ("share", "poison_in_safe", "poisoned_safe")  # of the last selection
ROUND = {"epoch": pa.int32(), "caption": pa.string(), "similarity": pa.float32(), "nearest": pa.string(), "stays": pa.bool_()}
PACKAGES = ("torch", "open_clip_torch", "ray", "mlflow", "pyarrow", "numpy")


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """The result of a finished run of the same identity, under whatever recipe name; None if there is none.

    One that another host finished is fetched from `cluster.storage`.
    """
    for file in sorted(absolute(recipe.cluster.runs).glob(f"*-{recipe.identity[:8]}/{RESULT}")):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            result = json.loads(file.read_text())
            if result.get("identity") == recipe.identity:
                return result
    store = Store.of(recipe)
    stored = journal.parse(store.read(RESULT) or b"") if store.shared else None
    if stored is None or stored.get("identity") != recipe.identity:
        return None
    folder = absolute(recipe.cluster.runs) / recipe.directory
    folder.mkdir(parents=True, exist_ok=True)
    store.pull(folder)
    write_json(folder / RESULT, stored | {"run": str(folder)})
    return stored | {"run": str(folder)}


def complete(recipe: Recipe, folder: Path) -> None:
    """What follows result.json, and is caught up on where a kill came between: the end of the MLflow run, the copy in the storage."""
    from orchestrate.track import Tracker

    uri = mlflow_uri.resolve(recipe.track.uri, folder.parent)
    tracker = Tracker.load(folder, uri if "@" in uri else None)
    if not tracker.ended:
        tracker.finish("finished", artifacts(folder))
    store = Store.of(recipe)
    if store.shared and store.read(RESULT) is None:
        store.push(folder)
    store.remove(CHECKPOINTS)


@contextlib.contextmanager
def claimed(recipe: Recipe, fresh: bool = False) -> Iterator[Path]:
    """The run's directory, with its recipe.json, held against a second process. `fresh` empties it first.

    Where `cluster.storage` knows more of the run than this directory does (another host went on with it), it is fetched.
    """
    folder = absolute(recipe.cluster.runs) / recipe.directory
    with journal.held(folder):
        if fresh:
            for child in folder.iterdir():
                if child.name != journal.LOCK:
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
            Store.of(recipe).remove()
        elif (store := Store.of(recipe)).shared:
            known = (folder / journal.NAME).stat().st_size if (folder / journal.NAME).exists() else -1
            if len(store.read(journal.NAME) or b"") > known:
                store.pull(folder)
        write_json(folder / "recipe.json", {**recipe.as_dict(), "identity": recipe.identity})
        yield folder


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, and without passwords in addresses."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(masked_tree(content), indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def parameters(recipe: Recipe) -> dict[str, Any]:
    """MLflow parameters: the recipe, flat under its dotted paths."""
    return {k: v for k, v in flatten(recipe.as_dict()).items() if not k.startswith("track.")}


def tags(recipe: Recipe) -> dict[str, str]:
    return {
        "mlflow.runName": recipe.directory,
        "antidote.recipe": recipe.name,
        "antidote.identity": recipe.identity,
        "antidote.attack": recipe.attack.use if recipe.attack else "none",
        "antidote.defense": recipe.defense.use if recipe.defense else "none",
    }


def artifacts(folder: Path) -> list[Path]:
    return [folder / name for name in ARTIFACTS if (folder / name).exists()]


def finish(recipe: Recipe, folder: Path, ready: Prepared, state: dict[str, Any] | None, data_seconds: float) -> dict[str, Any]:
    """Export the model and write result.json: the last word of a run; a directory that has it is finished.

    RuntimeError where the last epoch's evaluation was not written down.
    """
    records, repair = journal.read(folder / journal.NAME), build_defense(recipe).repair()
    evaluations = {r["epoch"]: r for r in records if r["kind"] == "eval"}
    epoch = recipe.train.epochs + (repair.epochs if repair else 0)
    if epoch not in evaluations:  # an earlier one (`evaluate.every`) says nothing of the model that is kept
        raise RuntimeError(
            f"{folder / journal.NAME} lacks the evaluation of epoch {epoch}, the last: it could not be written, as where the disk is full. "
            "Make room and run the same command again: the training is kept in its checkpoint, which holds what is missing."
        )
    last = evaluations[epoch]
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "identity": recipe.identity,
        "attack": recipe.attack.use if recipe.attack else "none",
        "defense": recipe.defense.use if recipe.defense else "none",
        "data": recipe.data.path,
        "seed": recipe.seed,
        "epochs": recipe.train.epochs,
        "workers": recipe.cluster.workers,
        "run": str(folder),
        "poison/count": ready.manifest.count if ready.manifest else 0,
        "poison/rate": ready.manifest.rate if ready.manifest else 0.0,
        "poison/pairs": ready.table.num_rows,
    }
    result |= {k: v for k, v in last.items() if k not in TOLD}
    if repair is not None:
        before = evaluations.get(recipe.train.epochs, {})  # none where its line could not be written, epochs ago
        result |= {f"before/{k}": v for k, v in before.items() if k not in TOLD}
    if recipe.data.exclude:
        removed, found = left_out(ready)
        result |= {"audit/removed": removed, "audit/share": removed / (removed + ready.table.num_rows), "audit/poison_removed": found}
    if (told := folder / "audit" / "audit.json").exists():  # the run's own, which it paid for
        result["seconds/audit"] = json.loads(told.read_text())["seconds"]
    rounds = [r for r in records if r["kind"] == "match"]
    shares = {k: v for k, v in (rounds[-1] if rounds else {}).items() if k in MATCHED or k.startswith("quality/")}
    result |= {f"match/{name}": share for name, share in shares.items()}
    selections = [r for r in records if r["kind"] == "select"]
    result |= {f"select/{k}": v for k, v in (selections[-1] if selections else {}).items() if k in SELECTED}
    for kind, kinds in (("train", ("train",)), ("match", ("match", "select")), ("eval", ("eval",))):
        result[f"seconds/{kind}"] = sum(r["seconds"] for r in records if r["kind"] in kinds)
    result["seconds/data"] = data_seconds
    result |= {f"versions/{name}": _version(name) for name in PACKAGES} | {"versions/python": platform.python_version()}
    complete_gallery(folder)
    if state is not None:
        model, cfg = trained(recipe, state)
        export(recipe, folder / "model", model, cfg, result)
        write_plans(recipe, folder, model, cfg)
    write_json(folder / RESULT, result)
    return result


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def trained(recipe: Recipe, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The trained model, on the CPU, and its model_cfg."""
    from models import clip

    cfg = clip.config(recipe.model.name, recipe.model.image_size or None)
    model = clip.build(cfg, seed=recipe.seed)
    model.load_state_dict(state["model"])
    return model, cfg


def export(recipe: Recipe, folder: Path, model: Any, cfg: dict[str, Any], result: dict[str, Any]) -> None:
    """The trained model as an open_clip folder, with a card that says what poisoned it."""
    from models import export as exporting

    facts = {
        "attack": result["attack"] if result["poison/count"] else "none",
        "count": result["poison/count"],
        "rate": result["poison/rate"],
        "defense": result["defense"],
        "recipe": recipe.name,
        "identity": recipe.identity,
        "data": recipe.data.path,
        **{k: v for k, v in result.items() if k.split("/")[0] in ("zeroshot", "probe", "retrieval", "asr")},
    }
    exporting.save(model, cfg, folder, exporting.card(facts))


def write_plans(recipe: Recipe, folder: Path, model: Any, cfg: dict[str, Any]) -> None:
    """plans.parquet, where the run's defence matches by transport; needs a complete gallery."""
    from orchestrate import plans
    from orchestrate.encoder import Encoder

    plans.write(folder, build_defense(recipe), Encoder(model, cfg, batch=recipe.evaluate.batch, precision=recipe.evaluate.precision))


# --- the gallery: a few pairs as a person would see them ---------------------------------------------------------------------------


def write_gallery(folder: Path, ready: Prepared, pixels: dict[str, Pixels]) -> None:
    """gallery.parquet: up to SHOWN poisoned pairs of each part and as many clean ones, with their pixels as PNG."""
    table = ready.table
    ids = table.column("id").to_pylist()
    groups: dict[str, list[int]] = {}
    kinds = {}
    if ready.manifest:
        for row in ready.manifest.table.to_pylist():
            kinds[row["id"]] = (row["kind"], row["truth"], ready.manifest.part_of(row["id"], row["stamp"], row["kind"]))
    for i, name in enumerate(ids):
        groups.setdefault(kinds[name][2] if name in kinds else "", []).append(i)
    rows = []
    for part, members in sorted(groups.items(), reverse=True):
        for k in pick([ids[i] for i in members], min(SHOWN, len(members)), 0, "gallery"):
            i = members[k]
            rows.append(_gallery_row(table, i, part, kinds.get(ids[i], ("", "", "")), pixels["train"], ready))
    pq.write_table(pa.Table.from_pylist(rows), folder / "gallery.parquet", compression="zstd")


def _gallery_row(table: pa.Table, i: int, part: str, kind: tuple[str, str, str], pixels: Pixels, ready: Prepared) -> dict[str, Any]:
    row = table.slice(i, 1).to_pylist()[0]
    shown = pixels.take(np.array([i]))[0]
    bare = None
    if row["stamp"]:
        plain = Pixels(table, None, pixels.side, pixels.max_pixels, pixels.images, pixels.place)
        bare = png(plain.take(np.array([i]))[0])
    classes = ready.dataset.classes
    truth = kind[1] or (classes[row["label"]] if row["label"] is not None and 0 <= row["label"] < len(classes) else "")
    return {
        "section": "poison" if row["poison"] else "clean",
        "kind": kind[0],
        "part": part,
        "row": i,
        "id": row["id"],
        "stamp": trigger_of(row["stamp"]),
        "png": png(shown),
        "original_png": bare,
        "caption": row["caption"],
        "adversary": row["adversary"] or "",
        "truth": truth,
    }


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def complete_gallery(folder: Path) -> None:
    """Add to the gallery what each round matched its pairs with, and what the pool held nearest where the own caption stayed."""
    file = folder / "gallery.parquet"
    gallery = pq.read_table(file)
    at, own = gallery.column("row").to_numpy(), gallery.column("caption").to_pylist()
    history: list[list[dict[str, Any]]] = [[] for _ in at]
    for pairs in sorted((folder / "rounds").glob("e[0-9][0-9][0-9].parquet")):
        table = pq.read_table(pairs)
        captions = pq.read_table(pairs.with_name(f"{pairs.stem}-pool.parquet")).column("caption")
        for k, i in enumerate(at):
            match = table.slice(int(i), 1).to_pylist()[0]
            similarity = 1.0 - match["distance"]
            nearest = captions[match["nearest"]].as_py()
            stays = match["pool_row"] < 0
            shown = {"epoch": int(pairs.stem[1:]), "caption": own[k] if stays else nearest, "similarity": similarity}
            history[k].append(shown | {"nearest": nearest, "stays": stays})
    kind = pa.list_(pa.struct([*ROUND.items()]))
    if "rounds" in gallery.column_names:
        gallery = gallery.drop_columns(["rounds"])
    pq.write_table(gallery.append_column("rounds", pa.array(history, kind)), file, compression="zstd")
