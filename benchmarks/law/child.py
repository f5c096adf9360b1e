"""The processes that `benchmarks.law` starts: one that chooses budgets, and one for every measured run of airstream.

    python -m benchmarks.law.child budgets --checkpoint DIR --shares 0,0.5,1 ...
    python -m benchmarks.law.child measure --checkpoint DIR --max-memory BYTES ...

They import torch, which `benchmarks.law` must not: a child inherits its parent's peak RSS. Each prints one JSON value
on the last line of standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.law.report import Budget, Measured
from benchmarks.limited import MIB
from benchmarks.peers.measure import Request, TokenClock, generate_with_transformers, parse_tokens

MAX_WORK_BYTES = 2 << 30  # of KV cache, activations and ring on top of all weights, at most


@dataclass
class PassClock(TokenClock):
    """A token clock that also notes how many bytes had been streamed at every tick."""

    streamed_bytes: Callable[[], int] = lambda: 0
    streamed: list[int] = field(default_factory=list)

    def tick(self) -> None:
        """A new token is there."""
        super().tick()
        self.streamed.append(self.streamed_bytes())


def choose_budgets(pass_bytes: Callable[[int], int | None], shares: Sequence[float], most_mib: int) -> list[Budget]:
    """For each of `shares`, the budget whose plan comes closest to it.

    A share is what a pass need not read, of what it reads with the smallest budget that still reads ahead. Where
    several budgets come equally close, a share of less than 1 gets the largest of them, and 1 gets `most_mib`.

    Args:
        pass_bytes: what a pass streams with a budget of so many MiB; None where nothing is read ahead with it. Falls as
            the budget grows.
        most_mib: a budget that holds everything.
    """
    least_mib = _smallest(lambda mib: pass_bytes(mib) is not None, 1, most_mib)
    full = pass_bytes(least_mib) or 0

    def share(mib: int) -> float:
        return 1.0 - (pass_bytes(mib) or 0) / full if full else 1.0

    def choose(wanted: float) -> Budget:
        above = most_mib if wanted >= 1 else _smallest(lambda mib: share(mib) > wanted, least_mib, most_mib)
        below = above if wanted >= 1 else max(above - 1, least_mib)
        chosen = min((below, above), key=lambda mib: abs(share(mib) - wanted))
        return Budget(wanted, share(chosen), chosen * MIB, full)

    return [choose(wanted) for wanted in shares]


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` for which `holds`, which is true from there on; `high` if for none."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def planned_pass_bytes(checkpoint: Path, max_context: int) -> Callable[[int], int | None]:
    """What `choose_budgets` asks about, by airstream's own plan."""
    from airstream import AutoModel
    from airstream.errors import BudgetError

    @cache
    def pass_bytes(mib: int) -> int | None:
        try:
            plan = AutoModel.plan(checkpoint, **_options(mib * MIB, max_context))
        except BudgetError:
            return None
        return plan.streamed_bytes if plan.prefetch_batches or not plan.streamed_bytes else None

    return pass_bytes


def measure(request: Request) -> Measured:
    """One run, in this process: the raw link, generation, the raw link again."""
    from airstream import AutoModel
    from airstream.system.memory import PeakMemory

    context = len(request.prompt) + request.num_tokens
    memory = PeakMemory()
    with AutoModel.from_pretrained(request.checkpoint, **_options(request.budget_bytes or 0, context)) as model:
        before = model.measure_link()
        clock = PassClock(streamed_bytes=lambda: model.stats.streamed_bytes)
        stalled = model.stats.stall_seconds
        tokens = generate_with_transformers(model, request, clock)
        stalled = model.stats.stall_seconds - stalled
        peak_rise = memory.rise()
        after = model.measure_link()
        plan = model.plan
    prediction = getattr(plan, "prediction", None)
    num_decoded = len(tokens) - 1
    return Measured(
        tokens=tokens,
        token_seconds=[end - start for start, end in zip(clock.seconds, clock.seconds[1:], strict=False)],
        pass_bytes=round((clock.streamed[-1] - clock.streamed[0]) / num_decoded),
        planned_pass_bytes=plan.streamed_bytes,
        link=[(each.nbytes, each.seconds) for each in (before, after)] if before.nbytes else [],
        stall_seconds=stalled,
        predicted_seconds=getattr(prediction, "decode_seconds", None),
        assumed_rates=list(getattr(prediction, "assumed", ())),
        planned_peak_bytes=plan.peak_bytes["cpu"],
        peak_rise_bytes=peak_rise,
        is_direct=plan.direct_io,
        version=_version(),
    )


def _options(max_memory: int, max_context: int) -> dict[str, Any]:
    # Around the page cache: unlimited memory would keep there what is meant to be streamed.
    return {"device": "cpu", "max_memory": max_memory, "max_context": max_context, "page_cache": False}


def _version() -> str:
    from importlib.metadata import version

    return ", ".join(f"{package} {version(package)}" for package in ("airstream", "transformers", "torch"))


def main(argv: Sequence[str] | None = None) -> None:
    """Choose budgets or measure, and print the JSON."""
    arguments = _parse(argv)
    checkpoint, context = arguments.checkpoint, len(arguments.prompt) + arguments.num_tokens
    if arguments.action == "budgets":
        most = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) + MAX_WORK_BYTES
        chosen = choose_budgets(planned_pass_bytes(checkpoint, context), arguments.shares, most // MIB)
        print(f"\n{json.dumps([asdict(budget) for budget in chosen])}", flush=True)
        return
    request = Request(checkpoint, Path(), arguments.prompt, arguments.num_tokens, arguments.max_memory)
    print(f"\n{json.dumps(asdict(measure(request)))}", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("budgets", "measure"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", type=parse_tokens, required=True)
    parser.add_argument("--tokens", type=int, required=True, dest="num_tokens")
    parser.add_argument("--shares", type=lambda text: [float(part) for part in text.split(",")], default=[])
    parser.add_argument("--max-memory", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
