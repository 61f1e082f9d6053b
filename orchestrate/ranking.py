"""How many candidates beat the right one: what every rank, recall and success rate is made of."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**24  # scores held at once (64 MB in float32)
TIE = 2.0**-21  # cosines closer than this are equal: the rounding of a float32 dot product of unit vectors


def rivals(queries: Tensor, candidates: Tensor, mine: Tensor, theirs: Tensor | None = None, margin: float = -TIE) -> Tensor:
    """For each query (n, d) the candidates (m, d) of other groups that beat its own group's best plus margin.

    mine (n,) and theirs (m,) name the groups, theirs = 0 … m − 1 by default; int64 (n,) on the CPU. With −TIE equal
    rivals count, with +TIE they do not. At most BLOCK scores are held at once.
    """
    place = queries.device
    mine, theirs = mine.to(place), (torch.arange(len(candidates)) if theirs is None else theirs).to(place)
    step = max(1, BLOCK // max(1, len(candidates)))
    found = [torch.empty(0, dtype=torch.int64)]
    # The trainer may have allowed TF32 or opened an autocast, whose rounding would decide close calls.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(place.type, enabled=False):
            for i in range(0, len(queries), step):
                scores, own = queries[i : i + step] @ candidates.T, mine[i : i + step, None] == theirs
                bar = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True) + margin
                found.append((~(scores <= bar) & ~own).sum(1).cpu())  # not `>`: a NaN must not pass for the best
    finally:
        torch.set_float32_matmul_precision(before)
    return torch.cat(found)
