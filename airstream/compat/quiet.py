"""This keeps transformers silent where what it would say has been judged already, or is said better by airstream."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import logging as transformers_logging

from airstream.system.importing import quiet_imports


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings, and those of the packages of formats, which it imports when they are needed."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with quiet_imports():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def quiet_converters() -> Iterator[None]:
    """Without what compressed-tensors says, by a log of its own, of weights without values."""
    name, loguru = "compressed_tensors", sys.modules.get("loguru")
    if loguru is None or (f"{name}.", False) in loguru.logger._core.activation_list:  # by the user
        yield
        return
    loguru.logger.disable(name)
    try:
        yield
    finally:
        loguru.logger.enable(name)
