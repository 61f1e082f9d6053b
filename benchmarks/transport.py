"""What transport costs, as ratios measured side by side in one run, on the same features, with the same threads.

    python benchmarks/transport.py [--checkpoint DIR --data PATH] [--images 256] [--pool 4000] [--threads 1] [--out FILE.json]

matching    `transport_nearest` against solving every pair: a loop of ot.emd2 (ε = 0), of ot.sinkhorn, ot.batch.solve_batch and a
            plain batched log-domain Sinkhorn (ε = 0.1, all to the same tolerance). The others' time is that of a sample of pairs,
            taken before and after ours, times images × pool.       aims: ≥ 150 × ot.emd2 at 16 × 16 tokens, ≥ 40 × at 49 × captions
solving     `transport_cost` against the same four on the same problems
scaling     time an image against the size of the pool

Features: image and caption tokens of a trained checkpoint (an open_clip folder) on a data set, or else clusters on the sphere, whose
16 × 16 and 49 × (8 to 20) tokens spread as widely within a set as trained ones do; and noise, where nothing can be pruned.
Times are CPU seconds of this process with one thread, which other processes disturb least, and wall-clock with more or on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from defenses.base import Features  # noqa: E402
from defenses.token_pool import TokenPool  # noqa: E402
from defenses.transport import transport_cost  # noqa: E402
from defenses.transport_matching import transport_nearest  # noqa: E402

EPSILON, TOL = 0.1, 1e-4


def clusters(
    images: int, pool: int, patches: int, words: tuple[int, int], features: int = 128, spread: float = 1.0
) -> tuple[Features, Features]:
    """Token sets around 64 topics; a set shares a topic, its tokens differ from it by `spread` of the topics' length."""
    generator = torch.Generator().manual_seed(0)

    def sets(count: int, size: int) -> Tensor:
        topic = topics[torch.randint(len(topics), (count,), generator=generator)]
        own = topic + 0.5 * torch.randn(count, features, generator=generator)
        return F.normalize(own[:, None] + spread * torch.randn(count, size, features, generator=generator), dim=2)

    topics = torch.randn(64, features, generator=generator)
    mask = torch.arange(words[1]) < torch.randint(words[0], words[1] + 1, (pool, 1), generator=generator)
    left, right = sets(images, patches), sets(pool, words[1])
    pooled = F.normalize((right * mask[:, :, None]).sum(1), dim=1)
    return Features(F.normalize(left.mean(1), dim=1), left), Features(pooled, right, mask)


def noise(images: int, pool: int, patches: int, words: tuple[int, int], features: int = 128) -> tuple[Features, Features]:
    return clusters(images, pool, patches, words, features, spread=1e3)


def trained(checkpoint: str, data: str, images: int, pool: int, device: str) -> tuple[Features, Features]:
    from models import export
    from orchestrate.data import reader
    from orchestrate.data.index import open_dataset
    from orchestrate.data.pixels import distinct
    from orchestrate.encoder import Encoder
    from orchestrate.recipe import Data

    model, cfg = export.load(checkpoint)
    table = open_dataset(Data(path=data)).train
    order = np.random.default_rng(0).permutation(table.num_rows)
    captions = table["caption"].take(order[:pool]).to_pylist()
    rows, _ = distinct(table)
    rows = rows.take(np.random.default_rng(1).permutation(rows.num_rows)[:images])
    side = cfg["vision_cfg"]["image_size"]
    pixels, _ = reader.load(rows, side if isinstance(side, int) else side[0])
    encoder = Encoder(model, cfg, device)
    return encoder.image_features(pixels, tokens=True), encoder.text_features(captions, tokens=True)


class Timer:
    """Seconds of a call: of this process's CPU with one thread, else of the wall clock."""

    def __init__(self, threads: int, device: str) -> None:
        self.clock = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
        self.device = device

    def __call__(self, call: Callable[[], Any], times: int = 1) -> float:
        runs = []
        for _ in range(times):
            start = self.clock()
            call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            runs.append(self.clock() - start)
        return min(runs)


def sample(images: Features, pool: Features, count: int) -> tuple[Tensor, Tensor]:
    """Costs (count, P, L) of random pairs, padded, and the captions' masses."""
    assert images.tokens is not None and pool.tokens is not None
    rng = np.random.default_rng(2)
    i = torch.from_numpy(rng.integers(len(images.tokens), size=count))
    j = torch.from_numpy(rng.integers(len(pool.tokens), size=count))
    mask = torch.ones(pool.tokens.shape[:2], dtype=torch.bool) if pool.mask is None else pool.mask.cpu()
    order = mask[j].int().argsort(dim=1, descending=True, stable=True)  # captions' tokens first, padding last
    tokens = pool.tokens.cpu()[j].gather(1, order[:, :, None].expand(-1, -1, pool.tokens.shape[2]))
    mask = mask[j].gather(1, order)
    longest = int(mask.sum(1).amax())
    masses = mask[:, :longest].float()
    return 1 - torch.bmm(images.tokens.cpu()[i], tokens[:, :longest].mT), masses / masses.sum(1, keepdim=True)


def log_sinkhorn(cost: Tensor, b: Tensor, epsilon: float, tol: float) -> Tensor:
    """What one writes first: log-domain Sinkhorn on the whole batch until its worst problem meets the tolerance."""
    ln_a, ln_b = -np.log(cost.shape[1]), b.clamp_min(1e-30).log()
    g = torch.zeros_like(b)
    for _ in range(1000):
        f = epsilon * (ln_a - torch.logsumexp((g[:, None] - cost) / epsilon, 2))
        g = epsilon * (ln_b - torch.logsumexp((f[:, :, None] - cost) / epsilon, 1))
        plan = torch.exp((f[:, :, None] + g[:, None] - cost) / epsilon)
        if float((plan.sum(2) - 1 / cost.shape[1]).abs().sum(1).amax()) < tol:
            break
    return (plan * cost).sum((1, 2))


def others(cost: Tensor, b: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The alternatives: problems solved and the call that solves them. Loops leave padding out, batches give it no mass."""
    import ot
    from ot.batch import solve_batch

    loop, batch = min(200, len(cost)), min(512, len(cost))
    lengths = (b > 0).sum(1).tolist()
    single = [
        (c[:, :n].double().numpy(), np.full(c.shape[0], 1 / c.shape[0]), np.full(n, 1 / n))
        for c, n in zip(cost[:loop], lengths, strict=False)
    ]
    some, masses, uniform = cost[:batch], b[:batch], cost.new_full((batch, cost.shape[1]), 1 / cost.shape[1])
    return {
        "ot.emd2": (loop, lambda: [ot.emd2(x, y, c) for c, x, y in single]),
        "ot.sinkhorn": (loop, lambda: [ot.sinkhorn(x, y, c, EPSILON, stopThr=TOL) for c, x, y in single]),
        "solve_batch sinkhorn": (batch, lambda: solve_batch(some, EPSILON, uniform, masses, tol=TOL, method="sinkhorn", grad="detach")),
        "solve_batch log_sinkhorn": (
            batch,
            lambda: solve_batch(some, EPSILON, uniform, masses, tol=TOL, method="log_sinkhorn", grad="detach"),
        ),
        "plain log-domain": (batch, lambda: log_sinkhorn(some, masses, EPSILON, TOL)),
    }


def gemm_share(call: Callable[[], Any], timer: Timer) -> float:
    """Share of a call's time that matrix products take."""
    spent, plain = [0.0], (torch.mm, torch.bmm)

    def timed(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*matrices: Tensor) -> Tensor:
            found: list[Tensor] = []
            spent[0] += timer(lambda: found.append(product(*matrices)))
            return found[0]

        return run

    torch.mm, torch.bmm = map(timed, plain)  # type: ignore[assignment]
    try:
        whole = timer(call)
    finally:
        torch.mm, torch.bmm = plain
    return spent[0] / whole


def bench(name: str, images: Features, pool: Features, timer: Timer, rounds: int) -> dict[str, Any]:
    assert images.tokens is not None and pool.tokens is not None
    n, m = len(images.tokens), len(pool.tokens)
    cost, b = sample(images, pool, 2048)
    rivals = others(cost, b)
    ready = TokenPool(pool.tokens, pool.mask, pool.pooled)
    mine: dict[str, Callable[[], Any]] = {
        "exact": lambda: transport_nearest(images.tokens, ready),
        "exact, λ=.5": lambda: transport_nearest(images.tokens, ready, weight=0.5, image_global=images.pooled),
        "entropic": lambda: transport_nearest(images.tokens, ready, epsilon=EPSILON),
    }
    solving: dict[str, Callable[[], Any]] = {
        "exact": lambda: transport_cost(cost[:200], b=b[:200], epsilon=0),
        "entropic": lambda: transport_cost(cost, b=b, epsilon=EPSILON, tol=TOL),
    }
    times: dict[str, list[float]] = {}
    for call in (*(call for _, call in rivals.values()), *solving.values()):
        call()  # imports and first allocations
    transport_nearest(images.tokens[:8], ready)
    for _ in range(rounds):
        for key, (count, call) in rivals.items():
            times.setdefault(key, []).append(timer(call) / count)
        for key, call in mine.items():
            times.setdefault(f"matching {key}", []).append(timer(call) / n)
        for key, call in solving.items():
            times.setdefault(f"solving {key}", []).append(timer(call) / (200 if key == "exact" else len(cost)))
        for key, (count, call) in rivals.items():
            times[key].append(timer(call) / count)
    second = {key: statistics.median(values) for key, values in times.items()}
    found = {key: call() for key, call in mine.items()}
    products = timer(lambda: _all_products(ready, images.tokens), 2) / n
    told = {
        "features": name,
        "images": n,
        "pool": m,
        "distinct": len(ready.row),
        "tokens": [images.tokens.shape[1], round(float(ready.length.float().mean()), 1)],
        "us_per_pair": {key: 1e6 * second[key] for key in rivals}
        | {f"transport_cost {key}": 1e6 * second[f"solving {key}"] for key in solving},
        "ms_per_image": {key: 1e3 * second[f"matching {key}"] for key in mine},
        "all_products_ms_per_image": 1e3 * products,
        "solves": {key: [float(x.solved.float().mean()), int(x.solved.max())] for key, x in found.items()},
        "gemm_share": gemm_share(mine["exact"], timer),
        "matching_ratio": {
            "exact / ot.emd2": second["ot.emd2"] * m / second["matching exact"],
            "exact, λ=.5 / ot.emd2": second["ot.emd2"] * m / second["matching exact, λ=.5"],
            **{f"entropic / {key}": second[key] * m / second["matching entropic"] for key in rivals if key != "ot.emd2"},
        },
        "solving_ratio": {
            "exact / ot.emd2": second["ot.emd2"] / second["solving exact"],
            **{f"entropic / {key}": second[key] / second["solving entropic"] for key in rivals if key != "ot.emd2"},
        },
    }
    return told


def _all_products(ready: TokenPool, tokens: Tensor) -> None:
    """The matrix product of all images with all captions, in the quicker precision: the floor of a matcher that must look at each pair."""
    captions = ready.tokens if ready.half is None else ready.half
    for rows in tokens.to(captions.dtype).flatten(0, 1).split(256):
        for block in captions.split(4096):
            torch.mm(rows, block.T)


def scaling(images: Features, pool: Features, timer: Timer) -> list[dict[str, float]]:
    images, pool = (Features(*(None if x is None else x.to(timer.device) for x in part)) for part in (images, pool))
    assert images.tokens is not None and pool.tokens is not None
    rows = []
    for size in (250, 1000, 4000, 16000):
        size = min(size, len(pool.tokens))
        if rows and rows[-1]["pool"] == size:
            break
        start = time.perf_counter()
        ready = TokenPool(pool.tokens[:size], None if pool.mask is None else pool.mask[:size])
        made = time.perf_counter() - start
        match = transport_nearest(images.tokens, ready)
        seconds = timer(lambda ready=ready: transport_nearest(images.tokens, ready), 3)
        rows.append(
            {
                "pool": size,
                "ms_per_image": 1e3 * seconds / len(images.tokens),
                "solves": float(match.solved.float().mean()),
                "ready_s": made,
            }
        )
    return rows


def show(told: dict[str, Any]) -> None:
    print(f"\n{told['features']}: {told['images']} images × {told['pool']} captions ({told['distinct']} distinct), tokens {told['tokens']}")
    for title in ("matching_ratio", "solving_ratio"):
        print(
            f"  {title.replace('_', ' ')}: "
            + "   ".join(f"{key} {value:.0f}×" if value >= 10 else f"{key} {value:.1f}×" for key, value in told[title].items())
        )
    print("  ms an image: " + "   ".join(f"{key} {value:.2f}" for key, value in told["ms_per_image"].items()), end="   ")
    print(f"all products {told['all_products_ms_per_image']:.2f}")
    print("  µs a pair: " + "   ".join(f"{key} {value:.1f}" for key, value in told["us_per_pair"].items()))
    print("  solves an image, mean and most: " + "   ".join(f"{key} {mean:.1f}, {most}" for key, (mean, most) in told["solves"].items()))
    print(f"  share of matrix products in exact matching: {told['gemm_share']:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="open_clip folder of a trained model")
    parser.add_argument("--data", help="data set to encode with it")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-noise", action="store_true", help="leave out the features that nothing can prune")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    timer = Timer(options.threads, options.device)
    sets: list[tuple[str, Callable[[], tuple[Features, Features]]]] = [
        ("clusters 16 × 16", lambda: clusters(options.images, options.pool, 16, (16, 16))),
        ("clusters 49 × 8–20", lambda: clusters(options.images, options.pool, 49, (8, 20))),
    ]
    if not options.no_noise:
        sets.append(("noise 49 × 8–20", lambda: noise(max(8, options.images // 16), options.pool, 49, (8, 20))))
    if options.checkpoint:
        if not options.data:
            parser.error("--checkpoint needs --data, the set to encode")
        sets.insert(0, ("trained", lambda: trained(options.checkpoint, options.data, options.images, options.pool, options.device)))
    results = []
    for name, make in sets:
        images, pool = (Features(*(None if x is None else x.to(options.device) for x in part)) for part in make())
        results.append(bench(name, images, pool, timer, options.rounds))
        show(results[-1])
    options.pool, scales = max(options.pool, 16000), {}
    for name, make in sets:
        if name in ("trained", "clusters 49 × 8–20"):
            scales[name] = scaling(*make(), timer)
            print(f"\nscaling, {name}:")
            for row in scales[name]:
                print("  " + "   ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if options.out:
        options.out.write_text(
            json.dumps({"threads": options.threads, "device": options.device, "sets": results, "scaling": scales}, indent=1)
        )


if __name__ == "__main__":
    main()
