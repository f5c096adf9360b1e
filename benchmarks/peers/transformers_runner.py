"""transformers as it comes: the whole model in memory. Says which tokens are right."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.peers.measure import Request, Runner, generate_with_transformers, main


def load(request: Request) -> Any:
    """The resident model."""
    return AutoModelForCausalLM.from_pretrained(request.checkpoint, dtype="auto")


if __name__ == "__main__":
    main(Runner("transformers", ("transformers", "torch"), load, generate_with_transformers))
