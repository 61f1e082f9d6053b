"""Which distance tells poisoned pairs from clean ones: each on the same features, those of a run's model on the run's own pairs.

    python benchmarks/matching_quality.py RUN [--pairs 4000] [--look 0] [--out FILE.md]

RUN: the directory of a finished run with poison. Looked at: all poisoned pairs and `--pairs` clean ones, chosen by seed 0.
AUC     how well the rank of a pair's own caption among 64 others of the set tells poisoned from clean; .5: not at all. This is what
        `defense.move` goes by. Backdoor and targeted pairs also apart, as only the first wear a trigger.
freed   poisoned pairs whose nearest caption of these 64 does not name the adversary's class
kept    clean pairs whose nearest caption names a class that their own names, of those that name one

Distances: cosine of the pooled features; optimal transport of the tokens (exact, entropic, half mixed with cosine), also with masses that
follow each token's likeness to its side's pooled feature, softmax at a temperature τ; late interaction (each word to its best patch, each
patch to its best word, half of each); the mean tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from defenses.base import Features  # noqa: E402
from defenses.transport import transport_cost  # noqa: E402

PEERS = 64
CHUNK = 1024
TIE = 1e-6
Distance = Callable[[Features, Features], Tensor]  # N images, N captions with tokens → (N,)


def cosine(images: Features, captions: Features) -> Tensor:
    return 1 - (images.pooled * captions.pooled).sum(1)


def transport(epsilon: float, weight: float = 0.0, tau: float = 0.0) -> Distance:
    def distance(images: Features, captions: Features) -> Tensor:
        x, y, mask = images.tokens, captions.tokens, captions.mask
        assert x is not None and y is not None and mask is not None
        a = torch.softmax(_likeness(x, images.pooled) / tau, 1) if tau else None
        b = torch.softmax((_likeness(y, captions.pooled) / tau).masked_fill(~mask, -torch.inf), 1) if tau else mask.float()
        value = transport_cost(1 - torch.bmm(x, y.mT), a, b, epsilon=epsilon, tol=1e-3)[0].float()
        return value if not weight else weight * cosine(images, captions) + (1 - weight) * value

    return distance


def late(words: float) -> Distance:
    """Late interaction (FILIP): `words` of each word's best patch, the rest of each patch's best word."""

    def distance(images: Features, captions: Features) -> Tensor:
        x, y, mask = images.tokens, captions.tokens, captions.mask
        assert x is not None and y is not None and mask is not None
        like = torch.bmm(x, y.mT).masked_fill(~mask[:, None], -torch.inf)
        by_word = like.amax(1).masked_fill(~mask, 0).sum(1) / mask.sum(1)
        return 1 - words * by_word - (1 - words) * like.amax(2).mean(1)

    return distance


def mean_tokens(images: Features, captions: Features) -> Tensor:
    assert images.tokens is not None and captions.tokens is not None and captions.mask is not None
    mean = F.normalize((captions.tokens * captions.mask[:, :, None]).sum(1), dim=1)
    return 1 - (F.normalize(images.tokens.mean(1), dim=1) * mean).sum(1)


def _likeness(tokens: Tensor, pooled: Tensor) -> Tensor:
    return torch.bmm(tokens, pooled[:, :, None])[:, :, 0]


DISTANCES: dict[str, Distance] = {
    "cosine": cosine,
    "transport, exact": transport(0.0),
    "transport, ε = .1": transport(0.1),
    "transport, ε = .1, half cosine": transport(0.1, weight=0.5),
    "transport, ε = .1, masses τ = .3": transport(0.1, tau=0.3),
    "transport, ε = .1, masses τ = .1": transport(0.1, tau=0.1),
    "transport, ε = .1, masses τ = .05": transport(0.1, tau=0.05),
    "transport, ε = .1, masses τ = .05, half cosine": transport(0.1, weight=0.5, tau=0.05),
    "each word to its best patch": late(1.0),
    "each patch to its best word": late(0.0),
    "half of each": late(0.5),
    "mean tokens": mean_tokens,
}


@torch.no_grad()
def against_peers(distance: Distance, images: Features, own: Features, peers: Features) -> tuple[np.ndarray, np.ndarray]:
    """Share of the peers nearer to each image than its own caption (N,), and the nearest of them (N,)."""
    shares, nearest = [], []
    for some in torch.arange(len(images.pooled)).split(CHUNK):
        shown = _take(images, some)
        mine = distance(shown, _take(own, some))
        others = torch.stack([distance(shown, _take(peers, torch.full_like(some, k))) for k in range(len(peers.pooled))], 1)
        shares.append((others < mine[:, None] - TIE).float().mean(1))
        nearest.append(others.argmin(1))
    return torch.cat(shares).numpy(), torch.cat(nearest).numpy()


def _take(features: Features, rows: Tensor) -> Features:
    return Features(*(None if x is None else x[rows] for x in features))  # type: ignore[arg-type]


def load(run: Path, clean: int, look: float) -> tuple[pa.Table, list[str], Features, Features, Features, list[str]]:
    """(pairs looked at, classes, image features, own captions', peers', peers' captions) of a run."""
    import json

    from models import export
    from orchestrate import prepared
    from orchestrate.data.index import open_dataset
    from orchestrate.encoder import Encoder
    from orchestrate.pairing import draw_pool
    from orchestrate.recipe import from_dict

    recipe = from_dict(json.loads((run / "recipe.json").read_text())).recipe
    dataset = open_dataset(recipe.data)
    table = prepared.plan(recipe, dataset).table
    poison = table.column("poison").to_numpy(zero_copy_only=False)
    honest = np.flatnonzero(~poison)
    chosen = np.random.default_rng(0).permutation(honest)[:clean]
    rows = np.sort(np.concatenate([np.flatnonzero(poison), chosen]))
    pixels = prepared.pixels_of(recipe, prepared.build_attack(recipe, table), table, None, None).take(rows)
    model, cfg = export.load(run / "model")
    encoder = Encoder(model, cfg, "cpu", batch=recipe.evaluate.batch, precision=recipe.evaluate.precision)
    some, others = table.take(pa.array(rows)), draw_pool(table, PEERS, 0, 0).captions
    images = encoder.image_features(pixels, True, look)
    own, peers = (encoder.text_features(captions, True) for captions in (some.column("caption").to_pylist(), others))
    return some, list(dataset.classes), images, own, peers, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--look", type=float, default=0.0, help="sigma of the blur that the images are looked at through")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    from sklearn.metrics import roc_auc_score

    from orchestrate.pairing import named_classes

    torch.set_num_threads(args.threads)
    table, classes, images, own, peers, others = load(args.run, args.pairs, args.look)
    poison = table.column("poison").to_numpy(zero_copy_only=False)
    worn = np.array([stamp != "" for stamp in table.column("stamp").to_pylist()])
    named, offered = named_classes(table.column("caption").to_pylist(), classes), named_classes(others, classes)
    told = ~poison & np.array([bool(names) for names in named])
    assert images.tokens is not None and own.mask is not None
    lines = [
        f"{poison.sum()} poisoned and {(~poison).sum()} clean pairs, {images.tokens.shape[1]} patches, "
        f"{float(own.mask.sum(1).float().mean()):.1f} words a caption, blur {args.look:g}",
        "",
        "| distance | AUC | of backdoor pairs | of targeted pairs | freed | kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, distance in DISTANCES.items():
        share, nearest = against_peers(distance, images, own, peers)
        cells = []
        for part in (poison, poison & worn, poison & ~worn):
            some = part | ~poison
            cells.append(f"{roc_auc_score(part[some], share[some]):.3f}" if part.any() else "–")
        common = np.array([bool(named[i] & offered[k]) for i, k in enumerate(nearest)])
        lines.append(f"| {' | '.join([name, *cells, f'{1 - common[poison].mean():.1%}', f'{common[told].mean():.1%}'])} |")
        print(lines[-1], flush=True)
    print("\n" + lines[0])
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
