"""How far one run scales: measured over raylets on this machine, and a model of 8 to 256 GPUs that names the first bottleneck.

    python benchmarks/scaling.py [--nodes 1,2,4] [--methods roclip,otcclip] [--size 4000] [--epochs 4] [--page docs/scaling.md]

Measured: one cluster of n raylets for each n, each raylet with all its processes pinned to one core (round robin over this machine's), one
training worker and one matching actor a raylet, the same recipe and global batch. Where there are more raylets than cores they share
cores: what that measures is the cost of more processes, not of more hardware, and the table says so.

Modelled: stated laws (`Law`) over stated constants (`Machine`), with parameters and FLOPs counted on the architectures themselves, item
counts from the code that makes them, and the bytes a pair costs a worker measured here on a table of `--size` rows.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BEGIN, END = "<!-- {}: written by benchmarks/scaling.py -->", "<!-- /{} -->"


# --- measured ----------------------------------------------------------------------------------------------------------------


def measured(methods: list[str], nodes: list[int], size: int, epochs: int) -> str:
    """Throughput of training and of matching over the number of raylets, as a Markdown table."""
    cores = sorted(os.sched_getaffinity(0))
    lines = [
        f"{len(cores)} cores, one raylet a core while they last; {size:,} pairs, global batch 128, tiny-rn, matching every epoch.",
        "",
        "| method | raylets | cores | training, pairs/s | of ideal | matching, images/s | of ideal |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in methods:
        rows = [(n, *_run(method, n, size, epochs, cores)) for n in nodes]
        for n, train, match in rows:
            used = min(n, len(cores))
            ideal = used / min(rows[0][0], len(cores))
            shares = [f"{value / (first * ideal):.2f}" for value, first in ((train, rows[0][1]), (match, rows[0][2]))]
            shared = f"{used}" + (" (shared)" if n > len(cores) else "")
            lines.append(f"| {method} | {n} | {shared} | {train:,.0f} | {shares[0]} | {match:,.0f} | {shares[1]} |")
    return "\n".join(lines)


def _run(method: str, n: int, size: int, epochs: int, cores: list[int]) -> tuple[float, float]:
    """(training pairs/s, matching images/s) with n raylets, each pinned to one core; medians over the epochs but the first and last."""
    from ray.cluster_utils import Cluster

    from orchestrate import journal

    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for i in range(n):
            os.sched_setaffinity(0, {cores[i % len(cores)]})  # inherited by the raylet and all its processes
            cluster.add_node(num_cpus=2)
        os.sched_setaffinity(0, set(cores))
        with tempfile.TemporaryDirectory() as runs:
            words = {
                **{"attack": "none", "data.size": size, "data.heldout": 140, "train.epochs": epochs, "train.batch": 128},
                **{"train.precision": "fp32", "evaluate.precision": "fp32", "evaluate.probe": "false"},
                **{"defense.every": 1, "defense.warmup": 0, "defense.pool_size": 0.02, "track.uri": "none", "track.report": "false"},
                **{"cluster.address": cluster.address, "cluster.runs": runs, "cluster.workers": n, "cluster.cpus": 1.5},
                **{"cluster.match_actors": n, "cluster.match_cpus": 0.5, "cluster.match_batch": 256, "cluster.threads": 1},
            }
            command = [sys.executable, "-m", "orchestrate", "run", method, *(f"{k}={v}" for k, v in words.items())]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
            [file] = Path(runs).glob(f"*/{journal.NAME}")
            records = [r for r in journal.read(file) if 1 < r["epoch"] < epochs]
    finally:
        os.sched_setaffinity(0, set(cores))
        cluster.shutdown()
    train = statistics.median(r["samples_per_s"] for r in records if r["kind"] == "train")
    return train, statistics.median(r["pairs"] / r["seconds"] for r in records if r["kind"] == "match")


# --- modelled ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """One kind of node, and what software reaches on it. Figures of an H100 node as its maker gives them; the shares are assumptions."""

    gpus: int = 8  # a node
    flops: float = 990e12  # bf16, dense, a GPU
    utilisation: float = 0.35  # share of it that training and encoding reach
    product: float = 0.6  # share of it that a large matrix product reaches
    hbm: float = 80e9  # bytes a GPU
    ram: float = 2e12  # bytes a node
    inside: float = 450e9  # bytes/s a GPU, one way, within a node
    network: float = 50e9  # bytes/s a GPU, one way, between nodes
    tcp: float = 2.5e9  # bytes/s a node, Ray's object transfer
    latency: float = 30e-6  # s, one collective between nodes
    cores: int = 96  # a node, that decode


@dataclass(frozen=True)
class Architecture:
    """Counted, not recalled."""

    name: str
    parameters: int
    width: int  # of an embedding
    image: float  # FLOPs forward
    text: float
    norms: int  # synchronised batch norms

    @classmethod
    def of(cls, name: str) -> Architecture:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from models import clip

        cfg = clip.config(name, None)
        side = cfg["vision_cfg"]["image_size"]
        model = clip.build(cfg, seed=0).eval()
        counts = []
        with torch.no_grad():
            for call in (lambda: model.encode_image(torch.zeros(1, 3, side, side)), lambda: model.encode_text(torch.zeros(1, 77).long())):
                with FlopCounterMode(display=False) as counter:
                    call()
                counts.append(float(counter.get_total_flops()))
        norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        return cls(name, sum(p.numel() for p in model.parameters()), cfg["embed_dim"], counts[0], counts[1], norms)


@dataclass(frozen=True)
class Law:
    """Seconds and bytes of one plain step and one matching round of N pairs on W GPUs.

    Step, global batch B = min(512 W, 32,768), embeddings of d floats, P parameters:
      compute        3 (image + text FLOPs) B / W
      all-gather     2 B d 4 bytes to each GPU, (W - 1)/W of them from others (orchestrate/step.py gathers fp32)
      loss           every worker computes the whole batch's logits: 6 B² d FLOPs (forward, two products backward), 3 B² 4 bytes of memory
      all-reduce     2 P 4 (W - 1)/W bytes
      batch norm     2 collectives a layer
      decode         what N images take a node's cores longer than the encoders do, for sets that stream; twice: to match and to train
    Nothing else overlaps here; DDP hides a part of the all-reduce behind the backward pass.
    Round, pool of p captions, one matching actor a GPU:
      encode         (N image + p text FLOPs) / W
      product        2 N p d FLOPs / W
      weights        P 4 bytes from one node to all, passed on: ⌈log2(nodes)⌉ + 1 transfers
      pool           p d 4 bytes, likewise, and once to the desk
      pairing        N 8 bytes and the captions of the pool, likewise
      items          `work_items` counted, each `item` on the driver's node: what one costs here beside an actor that does nothing
    Memory of a node: the index, once, and for each of its workers what `bytes_a_pair` measured.
    """

    machine: Machine
    arch: Architecture
    pairs: int
    gpus: int
    pool: int
    bytes_a_pair: float  # of a worker
    table_bytes: float  # a pair, once a node
    decoded: float  # images/s a core
    item: float  # s that the driver's node spends on one work item

    @property
    def batch(self) -> int:
        return min(512 * self.gpus, 32_768)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.machine.gpus)

    def step(self) -> dict[str, float]:
        m, a, w, b = self.machine, self.arch, self.gpus, self.batch
        link = m.inside if self.nodes == 1 else m.network
        return {
            "compute": 3 * (a.image + a.text) * b / w / (m.flops * m.utilisation),
            "all-gather": 2 * b * a.width * 4 * (w - 1) / w / link,
            "loss": 6 * b * b * a.width / (m.flops * m.product),
            "all-reduce": 2 * a.parameters * 4 * (w - 1) / w / link,
            "batch norm": 2 * a.norms * m.latency,
        }

    def round(self) -> dict[str, float]:
        m, a = self.machine, self.arch
        hops = math.ceil(math.log2(self.nodes)) + 1
        return {
            "encode": (self.pairs * a.image + self.pool * a.text) / self.gpus / (m.flops * m.utilisation),
            "product": 2 * self.pairs * self.pool * a.width / self.gpus / (m.flops * m.product),
            "weights": hops * a.parameters * 4 / m.tcp,
            "pool": (hops + 1) * self.pool * a.width * 4 / m.tcp,
            "pairing": hops * (self.pairs * 8 + self.pool * 60) / m.tcp,
            "items": self.items() * self.item,
        }

    def items(self) -> int:
        from orchestrate.match import work_items

        return len(work_items([1], {1: self.pool}, self.pairs, 512, self.gpus))

    def ram(self) -> float:
        """Bytes of a node's memory: index and pool once, and each worker's own."""
        own = self.pairs * self.bytes_a_pair * self.machine.gpus
        return self.pairs * self.table_bytes + own + 2 * self.pool * self.arch.width * 4

    def hbm(self) -> float:
        """Bytes of a GPU's memory that scale with the run: logits of the loss, the pool."""
        return max(3 * self.batch**2 * 4, self.pool * self.arch.width * 4)

    def epoch(self) -> dict[str, float]:
        """Seconds of one robust epoch by what they go to."""
        steps = self.pairs // self.batch
        parts = {k: v * steps for k, v in self.step().items()}
        wait = max(0.0, 2 * self.decode() - parts["compute"] - self.round()["encode"])  # once to train on, once to match
        return parts | self.round() | {"decode": wait}

    def decode(self) -> float:
        """Seconds in which all nodes' cores decode every image once; 0 where half a node's memory holds the decoded set."""
        if self.pairs * 224 * 224 * 3 < self.machine.ram / 2:
            return 0.0
        return self.pairs / (self.nodes * self.machine.cores * self.decoded)

    def bottleneck(self) -> str:
        if self.ram() > self.machine.ram:
            return f"memory of a node: {self.ram() / 1e12:.1f} TB (index and captions in every worker)"
        if self.hbm() > self.machine.hbm:
            return f"memory of a GPU: {self.hbm() / 1e9:.0f} GB"
        parts = {k: v for k, v in self.epoch().items() if k not in ("compute", "encode")}
        worst = max(parts, key=lambda k: parts[k])
        return f"{worst} ({parts[worst] / sum(self.epoch().values()):.0%} of an epoch)"

    def efficiency(self) -> float:
        """Share of a robust epoch in which the encoders compute."""
        epoch = self.epoch()
        return (epoch["compute"] + epoch["encode"]) / sum(epoch.values())


def bytes_a_pair(rows: int) -> tuple[float, float]:
    """(bytes a training worker holds a pair, bytes of the index a pair), measured on a table of `rows` made rows."""
    import tracemalloc

    import pyarrow as pa

    from orchestrate import batches

    ids = [f"pair-{i:012d}" for i in range(rows)]
    captions = [f"a photo of a small red thing number {i} beside the sea" for i in range(rows)]
    table = pa.table({"id": ids, "path": ["bucket/shards/00000.tar"] * rows, "row": np.arange(rows), "caption": captions})
    tracemalloc.start()
    held = [
        np.array(table.column("caption").to_pylist(), dtype=object),
        batches.sample_keys(table, 0),
        batches.order(rows, 0, 1),
    ]
    held.append(batches.epoch_keys(held[1], 1))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / rows, table.nbytes / rows


def decoded_per_s(side: int = 224, seconds: float = 2.0) -> float:
    """Images/s that one core decodes, shrinks and crops here: a JPEG of 500 × 375 with the detail of a photograph (about 40 kB)."""
    import io
    import time

    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse) + rng.normal(0, 12, (375, 500, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        file.seek(0)
        np.asarray(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        count += 1
    return count / (time.process_time() - started)


class Idle:
    """An actor that does nothing, and answers as much as one of a matching round."""

    def __call__(self, item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**item, "payload": np.array([b"x" * 20_000], dtype=object)}


def item_s(few: int = 100, many: int = 400) -> float:
    """Seconds that one more work item takes in an execution as `match.Rounds` has it, its actor doing nothing."""
    import time

    from orchestrate import cluster
    from orchestrate.recipe import Cluster

    def seconds(count: int) -> float:
        items = [{"epoch": 1, "kind": 1, "start": i, "stop": i + 1} for i in range(count)]
        found = cluster.through_actors(items, Idle, (), Cluster(match_actors=1, match_cpus=1))
        next(found)  # the actor is up
        started = time.perf_counter()
        assert sum(1 for _ in found) == count - 1
        return time.perf_counter() - started

    with cluster.connected(Cluster()):
        seconds(few)
        return (seconds(many) - seconds(few)) / (many - few)


MODELS = ("RN50", "ViT-B-32")
SETS = ((1_000_000, 20_000), (10_000_000, 65_536), (100_000_000, 65_536), (400_000_000, 65_536), (400_000_000, 8_000_000))  # pairs, pool


def modelled(size: int) -> str:
    own, index = bytes_a_pair(max(size, 50_000))
    decoded, item = decoded_per_s(), item_s()
    lines = [
        f"Measured here: a worker holds {own:.0f} bytes a pair (captions, keys, order), a node's copy of the index {index:.0f}; "
        f"a core decodes {decoded:.0f} images/s; a work item whose actor does nothing takes {1000 * item:.1f} ms.",
        "",
        "| model | pairs | pool | GPUs | step, ms: compute | all-gather | loss | all-reduce | batch norm "
        "| round, s: encode | product | weights | pool | pairing | items (count) | decode twice, s | RAM a node | encoders' share "
        "| first bottleneck |",
        "| --- | ---: | ---: | ---: " + "| ---: " * 14 + "| --- |",
    ]
    for arch in map(Architecture.of, MODELS):
        for pairs, pool in SETS:
            for gpus in (8, 64, 256):
                lines.append(_row(Law(Machine(), arch, pairs, gpus, pool, own, index, decoded, item)))
    return "\n".join(lines)


def _row(law: Law) -> str:
    step, round_ = law.step(), law.round()
    cells = [law.arch.name, f"{law.pairs / 1e6:g} M", f"{law.pool:,}", str(law.gpus)]
    cells += [f"{1000 * step[k]:.2g}" for k in ("compute", "all-gather", "loss", "all-reduce", "batch norm")]
    cells += [f"{round_[k]:.3g}" for k in ("encode", "product", "weights", "pool", "pairing")]
    cells += [
        f"{round_['items']:.3g} ({law.items():,})",
        f"{2 * law.decode():,.0f}",
        f"{law.ram() / 1e9:,.0f} GB",
        f"{law.efficiency():.0%}",
        law.bottleneck(),
    ]
    return f"| {' | '.join(cells)} |"


def put(page: Path, name: str, table: str) -> None:
    """Replace one generated part of the page."""
    begin, end = BEGIN.format(name), END.format(name)
    text = page.read_text()
    assert begin in text and end in text, f"{page} has no place for {name}"
    page.write_text(re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,4")
    parser.add_argument("--methods", default="roclip,otcclip")
    parser.add_argument("--size", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--no-measure", action="store_true")
    parser.add_argument("--no-model", action="store_true")
    parser.add_argument("--page", type=Path, default=None, help="write the tables into this page")
    args = parser.parse_args()
    tables: dict[str, Any] = {}
    if not args.no_model:
        tables["model"] = modelled(args.size)
    if not args.no_measure:
        tables["measured"] = measured(args.methods.split(","), [int(n) for n in args.nodes.split(",")], args.size, args.epochs)
    for name, table in tables.items():
        print(f"\n{table}")
        if args.page:
            put(args.page, name, table)


if __name__ == "__main__":
    main()
