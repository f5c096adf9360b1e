"""airstream on the CPU, told the memory budget, or left to take what there is.

A form is a codec, whose packed weights are multiplied as they are, `kernels="fast"`; or "fast" for the weights as they
are.
"""

from __future__ import annotations

from typing import Any

from airstream import AutoModel, repack
from benchmarks.peers.measure import AUTO, Request, Runner, generate_with_transformers, main


def prepare(request: Request) -> None:
    """Write the checkpoint anew in the form that is asked for."""
    repack(request.checkpoint, request.work / request.form, codec=request.form)


def load(request: Request) -> Any:
    """The streamed model; a checkpoint is read as it lies."""
    has_codec = request.form not in ("", "fast")
    return AutoModel.from_pretrained(
        request.work / request.form if has_codec else request.checkpoint,
        dtype="auto",
        device="cpu",
        max_memory={"cpu": AUTO if request.budget_bytes is None else request.budget_bytes},
        max_context=len(request.prompt) + request.num_tokens,
        max_batch_size=request.batch_size,
        kernels="fast" if request.form else "exact",
    )


def details(model: Any) -> dict[str, Any]:
    """What the plan promised and where the time went."""
    stats = model.stats
    return {
        "planned_peak_bytes": model.plan.peak_bytes["cpu"],
        "streamed_bytes": stats.streamed_bytes,
        "stall_seconds": stats.stall_seconds,
        "read_seconds": stats.read_seconds,
    }


if __name__ == "__main__":
    packages = ("airstream", "transformers", "torch")
    main(Runner("airstream", packages, load, generate_with_transformers, prepare, details))
