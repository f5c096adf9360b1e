"""AirLLM on the CPU, with its defaults. Needs its own copy of the model first, one file for each layer.

A form is what it calls compression.
"""

from __future__ import annotations

from typing import Any

from airllm import AirLLMBaseModel

from benchmarks.peers.measure import Request, Runner, generate_with_transformers, main


class TokenizerFreeModel(AirLLMBaseModel):  # type: ignore[misc] # airllm is not typed
    """What AirLLM's `AutoModel` makes for Llama, less the tokenizer, which a random checkpoint does not have."""

    def get_tokenizer(self, hf_token: str | None = None) -> None:
        """No tokenizer: the runner speaks token ids."""


def load(request: Request) -> Any:
    """The streamed model; makes its copy of the checkpoint under `work` where that is missing."""
    return TokenizerFreeModel(
        str(request.checkpoint),
        device="cpu",
        layer_shards_saving_path=str(request.work),
        compression=request.form or None,
    )


def prepare(request: Request) -> None:
    """Make AirLLM's copy of the checkpoint."""
    load(request)


if __name__ == "__main__":
    main(Runner("airllm", ("airllm", "transformers", "torch"), load, generate_with_transformers, prepare))
