"""transformers with accelerate's disk offload: every layer on disk, embeddings, norm and head in memory.

The form "4bit" is that of bitsandbytes, asked for as transformers has it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peers.measure import Request, Runner, generate_with_transformers, main

RESIDENT = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def load(request: Request) -> Any:
    """The model with accelerate's hooks; it reads the checkpoint's own files, so there is nothing to prepare."""
    num_layers = AutoConfig.from_pretrained(request.checkpoint).num_hidden_layers
    packed = BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True) if request.form else None
    layers = {f"model.layers.{number}": "disk" for number in range(num_layers)}
    return AutoModelForCausalLM.from_pretrained(
        request.checkpoint,
        dtype="auto",
        device_map=dict.fromkeys(RESIDENT, "cpu") | layers,
        offload_folder=request.work / "offload",
        quantization_config=packed,
    )


if __name__ == "__main__":
    main(Runner("accelerate", ("accelerate", "transformers", "torch"), load, generate_with_transformers))
