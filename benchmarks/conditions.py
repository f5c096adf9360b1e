"""The conditions of a comparison, without which no number means anything: machine, disk, model, limits."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.disk import CHUNK_BYTES, NUM_THREADS
from benchmarks.settings import Settings, Setup

COLD = "page cache dropped before every run"
_MODEL_KEYS = ("model_type", "dtype", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


def describe(settings: Settings, disk_rates: Sequence[float]) -> dict[str, Any]:
    """Everything that bears on the numbers. `disk_rates`: raw bytes per second before the first turn and after each."""
    limits = {
        "batch_size": settings.batch_size,
        "limit_mib": settings.limit_mib,
        "budget_mib": settings.budget_mib,
        "turns": settings.turns,
    }
    return describe_common(settings, disk_rates) | limits


def describe_common(settings: Setup, disk_rates: Sequence[float]) -> dict[str, Any]:
    """What bears on any measurement of a checkpoint on this machine."""
    config = json.loads((settings.checkpoint / "config.json").read_text())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "disk": {
            "method": f"O_DIRECT, {NUM_THREADS} threads, {CHUNK_BYTES >> 20} MiB reads",
            "bytes_per_second_before_and_after_turns": list(disk_rates),
        },
        "model": {key: config.get(key) for key in _MODEL_KEYS} | {"weight_bytes": settings.weight_bytes},
        "prompt": settings.prompt,
        "num_tokens": settings.num_tokens,
        "decoding": "greedy, end-of-sequence ignored",
        "cache_state": COLD,
    }


def describe_machine() -> dict[str, Any]:
    """What this computer is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes("MemTotal"),
        "kernel": platform.release(),
    }


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo, such as `MemAvailable`."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def caption(conditions: dict[str, Any]) -> str:
    """What `describe` returned, in two lines to stand above the table."""
    model, machine = conditions["model"], conditions["machine"]
    rates = conditions["disk"]["bytes_per_second_before_and_after_turns"]
    limit = conditions.get("limit_mib")
    memory = "memory not limited" if limit is None else f"{limit} MiB of memory"
    return (
        f"{model['weight_bytes'] / 1e9:.2f} GB of {model['dtype']} weights, {memory}, "
        f"{_prompts(conditions)}, {conditions['num_tokens']} new ones, {conditions['decoding']}; "
        f"{conditions['cache_state']}; turns: {conditions['turns']}, median (min-max).\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"kernel {machine['kernel']}; disk raw {min(rates) / 1e9:.2f}-{max(rates) / 1e9:.2f} GB/s."
    )


def _prompts(conditions: dict[str, Any]) -> str:
    batch_size, length = conditions.get("batch_size", 1), len(conditions["prompt"])
    return f"{batch_size} prompts of {length} tokens each" if batch_size > 1 else f"prompt of {length} tokens"
