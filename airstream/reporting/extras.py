"""This says what to type where an optional package is missing: the package, and the extra of ours that brings it."""

from __future__ import annotations


def install(package: str, extra: str) -> str:
    """`'pip install gguf (airstream's extra "demo" has it)'`."""
    return f'pip install {package} (airstream\'s extra "{extra}" has it)'
