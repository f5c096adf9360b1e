"""transformers with accelerate's disk offload: every layer on disk, embeddings, norm and head in memory."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.measure import Request, Runner, generate_with_transformers, main

RESIDENT = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def load(request: Request) -> Any:
    """The model with accelerate's hooks; it reads the checkpoint's own files, so there is nothing to prepare."""
    num_layers = AutoConfig.from_pretrained(request.checkpoint).num_hidden_layers
    layers = {f"model.layers.{number}": "disk" for number in range(num_layers)}
    return AutoModelForCausalLM.from_pretrained(
        request.checkpoint,
        dtype="auto",
        device_map=dict.fromkeys(RESIDENT, "cpu") | layers,
        offload_folder=request.work / "offload",
    )


if __name__ == "__main__":
    main(Runner("accelerate", ("accelerate", "transformers", "torch"), load, generate_with_transformers))
