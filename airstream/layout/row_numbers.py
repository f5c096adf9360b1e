"""This finds patterns in row numbers that a converter has moved: a permutation, runs, interleaved rows.

It knows numbers. It refuses to know what they stand for.
"""

from __future__ import annotations

import torch


def is_permutation(ids: torch.Tensor, count: int) -> bool:
    """Whether `ids` are the numbers up to `count`, each of them once. Millions of them: sorting would take seconds."""
    if ids.dtype != torch.int64 or ids.numel() != count or not bool(((ids >= 0) & (ids < count)).all()):
        return False
    seen = torch.zeros(count, dtype=torch.bool, device="cpu")
    seen[ids] = True
    return bool(seen.all())


def dealt(ids: torch.Tensor) -> tuple[int, int] | None:
    """(rows, ways) if every `rows` numbers in `ids`, which count from 0, are dealt out in turn to `ways` runs.

    [0, 2, 4, 1, 3, 5, 6, 8, ...] is six rows dealt two ways: how llama.cpp and transformers differ on rotary halves.
    """
    if ids.numel() < 4 or ids[0] != 0 or ids[1] <= 1:
        return None
    ways = int(ids[1])
    rows = ways * int((ids == 1).nonzero()[0])
    if ids.numel() % rows or rows == ways:
        return None
    expected = torch.arange(ids.numel(), dtype=torch.long, device="cpu").view(-1, rows // ways, ways).transpose(1, 2)
    return (rows, ways) if torch.equal(ids, expected.reshape(-1)) else None


def runs(ids: torch.Tensor, begins: torch.Tensor) -> list[tuple[int, int, int]]:
    """Runs of consecutive numbers in `ids` within one source: (position in `ids`, first number, how many).

    `begins` says of every number whether a source begins with it.
    """
    breaks = ids[1:] != ids[:-1] + 1
    breaks |= begins[ids[1:]]
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), ids.numel()]
    firsts = ids[edges[:-1]].tolist()
    return [(begin, first, end - begin) for begin, end, first in zip(edges, edges[1:], firsts, strict=False)]
