"""transformers with accelerate's disk offload, which layers stay in memory left to accelerate and a memory budget."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.peers.measure import Request, Runner, generate_with_transformers, main


def load(request: Request) -> Any:
    """The model as `device_map="auto"` spreads it over `budget_bytes` of memory and the disk."""
    return AutoModelForCausalLM.from_pretrained(
        request.checkpoint,
        dtype="auto",
        device_map="auto",
        max_memory=None if request.budget_bytes is None else {"cpu": request.budget_bytes},
        offload_folder=request.work / "offload",
    )


def details(model: Any) -> dict[str, Any]:
    """How many modules ended up where."""
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())  # none where all of it fits
    return {"modules_on": {place: places.count(place) for place in sorted(set(places))}}


if __name__ == "__main__":
    packages = ("accelerate", "transformers", "torch")
    main(Runner("accelerate-auto", packages, load, generate_with_transformers, details=details))
