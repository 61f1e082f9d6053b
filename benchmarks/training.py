"""What orchestration costs: ratios measured side by side in one run, on this machine, with the same model, batch, threads and data.

    python benchmarks/training.py [--rounds 3] [--size 4000] [--out benchmarks/training.json]

plain       the same Learner in one process, images in memory, no Ray            aim: ours ≥ 0.95 × its pairs/s
open_clip   open_clip's pattern: DataLoader over image files, PIL transforms, ClipLoss, the same architecture    aim: ours ≥ 1.5 ×
robust      a robust epoch (matching round and steps, 2 % pool) against a plain epoch of the same run, for RoCLIP as published
            and re-pairing the worst 6 % (aim: ≤ 1.15 ×), and for OTCCLIP (aim: ≤ 1.6 ×)

Every round runs all of them one after the other in fresh processes; the median of the rounds' ratios is what to quote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
EPOCHS, PLAIN = 10, 6  # of them plain
COUNTED = range(4, EPOCHS)  # before it the matching actors start beside the training; in the last epoch they leave


def overrides(size: int, threads: int) -> dict[str, Any]:
    return {
        "data.size": size,
        "data.heldout": 140,
        "train.epochs": EPOCHS,
        "cluster.threads": threads,
        "track.uri": "none",
        "track.report": False,
        "evaluate.probe": False,
        "attack": "none",
    }


def ours(size: int, threads: int, method: str = "roclip", more: Mapping[str, Any] | None = None) -> dict[str, float]:
    """A method's run on Ray: pairs/s of its plain epochs, and its robust epochs' seconds over its plain ones'."""
    from orchestrate import journal, recipes
    from orchestrate.train import fit

    with tempfile.TemporaryDirectory() as runs:
        defense = {"defense.pool_size": 0.02, "defense.warmup": PLAIN, "defense.every": 1, **(more or {})}
        found = recipes.get(method, {**overrides(size, threads), "cluster.runs": runs, **defense})
        result = fit(found[0].recipe)
        records = journal.read(Path(result["run"]) / journal.NAME)
    train = {r["epoch"]: r for r in records if r["kind"] == "train"}
    match = {r["epoch"]: r for r in records if r["kind"] == "match"}
    plain = [r for e, r in train.items() if not r["robust"] and e in COUNTED]
    robust = [r["seconds"] + match[e]["seconds"] for e, r in train.items() if r["robust"] and e in COUNTED]
    seconds = statistics.median(r["seconds"] for r in plain)
    return {
        "pairs_per_s": statistics.median(r["samples_per_s"] for r in plain),
        "robust_over_plain": statistics.median(robust) / seconds,
        "round_s": statistics.median(m["seconds"] for m in match.values()),
    }


def published(size: int, threads: int) -> dict[str, float]:
    """RoCLIP's released code: stored features of the pool, the own caption only where it was drawn."""
    return ours(size, threads, more={"defense.matched": "embedding", "defense.move": 1.0})


def transport(size: int, threads: int) -> dict[str, float]:
    return ours(size, threads, "otcclip")


def plain(size: int, threads: int) -> dict[str, float]:
    """The same steps in one process without Ray."""
    import numpy as np
    import torch

    from orchestrate import batches, prepared, recipes
    from orchestrate.data import reader
    from orchestrate.data.index import open_dataset
    from orchestrate.step import Examples, Learner

    torch.set_num_threads(threads)
    recipe = recipes.get("roclip", overrides(size, threads))[0].recipe
    dataset = open_dataset(recipe.data)
    images, _ = reader.load(dataset.train, prepared.stored_side(recipe), recipe.data.max_pixels)
    captions = np.array(dataset.train["caption"].to_pylist(), dtype=object)
    keys = batches.sample_keys(dataset.train, recipe.seed)
    batch = recipe.train.batch
    steps = len(captions) // batch
    learner = Learner(recipe.model, recipe.train, prepared.build_defense(recipe), seed=0, total_steps=steps * EPOCHS)
    rates = []
    for epoch in range(1, PLAIN + 1):
        order = batches.drawn(np.arange(len(captions)), batch, recipe.seed, epoch)
        drawn = batches.epoch_keys(keys, epoch)
        started = time.monotonic()
        for rows in order:
            learner.step(Examples(images[rows], list(captions[rows]), drawn[rows]))
        rates.append(steps * batch / (time.monotonic() - started))
    return {"pairs_per_s": statistics.median(rates[COUNTED[0] - 1 :])}


def open_clip_loop(size: int, threads: int) -> dict[str, float]:
    """open_clip's own pattern of training: files, PIL, DataLoader, its model's forward and its ClipLoss."""
    import torch
    from PIL import Image

    from models import clip
    from models.torchvision_door import open_clip
    from orchestrate import prepared, recipes
    from orchestrate.data import reader
    from orchestrate.data.index import open_dataset

    torch.set_num_threads(threads)
    recipe = recipes.get("augmented", overrides(size, threads))[0].recipe
    dataset = open_dataset(recipe.data)
    cfg = clip.config(recipe.model.name)
    side = prepared.stored_side(recipe)
    views = recipe.defense.parts[0][1].views  # type: ignore[union-attr]
    from torchvision import transforms as T

    transform = T.Compose(
        [
            T.RandomResizedCrop(side, scale=views.crop),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*views.jitter)], p=views.jitter_p),
            T.RandomGrayscale(views.gray_p),
            *([T.GaussianBlur(5, views.blur)] if views.blur[1] > 0 else []),
            T.ToTensor(),
            T.Normalize(*clip.image_stats(cfg)),
        ]
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=cfg["text_cfg"]["context_length"])
    captions = dataset.train["caption"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        for i, raw in enumerate(reader.read_bytes(dataset.train)):
            (Path(folder) / f"{i}.png").write_bytes(raw)  # type: ignore[arg-type]

        class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
            def __len__(self) -> int:
                return len(captions)

            def __getitem__(self, i: int) -> Any:
                return transform(Image.open(Path(folder) / f"{i}.png").convert("RGB")), tokenizer([captions[i]])[0]

        batch = recipe.train.batch
        loader = torch.utils.data.DataLoader(Pairs(), batch, shuffle=True, drop_last=True, num_workers=threads, persistent_workers=True)
        model = clip.build(cfg, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.train.lr, fused=True)
        loss_of = open_clip.ClipLoss()
        rates = []
        for _ in range(PLAIN):
            started, seen = time.monotonic(), 0
            for images, texts in loader:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    image, text, scale = model(images.contiguous(memory_format=torch.channels_last), texts)[:3]
                    loss = loss_of(image, text, scale)
                loss.backward()
                optimizer.step()
                seen += len(images)
            rates.append(seen / (time.monotonic() - started))
    return {"pairs_per_s": statistics.median(rates[COUNTED[0] - 1 :])}


LOOPS: dict[str, Callable[[int, int], dict[str, float]]] = {
    "plain": plain,
    "ours": ours,
    "open_clip": open_clip_loop,
    "published": published,
    "transport": transport,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="")
    parser.add_argument("--only", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(LOOPS[args.only](args.size, args.threads)))
        return
    rounds = []
    for number in range(args.rounds):
        found = {name: _fresh(name, args) for name in LOOPS}
        rounds.append(found)
        print(f"round {number + 1}: " + ", ".join(f"{name} {f['pairs_per_s']:.0f} pairs/s" for name, f in found.items()), flush=True)
    ratio = lambda over: statistics.median(r["ours"]["pairs_per_s"] / r[over]["pairs_per_s"] for r in rounds)
    summary = {
        "ours/plain": ratio("plain"),
        "ours/open_clip": ratio("open_clip"),
    }
    for name, title in (("published", "RoCLIP as published"), ("ours", "RoCLIP, 6 % re-paired"), ("transport", "OTCCLIP")):
        summary[f"robust/plain epoch, {title}"] = statistics.median(r[name]["robust_over_plain"] for r in rounds)
        summary[f"matching round, s, {title}"] = statistics.median(r[name]["round_s"] for r in rounds)
    for name, value in summary.items():
        print(f"{name:<40} {value:.3f}")
    if args.out:
        Path(args.out).write_text(json.dumps({"summary": summary, "rounds": rounds, "arguments": vars(args)}, indent=1))


def _fresh(name: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", name, "--size", str(args.size), "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
