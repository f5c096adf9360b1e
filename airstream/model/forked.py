"""This lets a model begin anew in a forked child, and says where it cannot.

It knows what a fork loses. It refuses to know what is computed.
"""

from __future__ import annotations

import logging

import torch

from airstream.errors import UnsupportedError
from airstream.model.generations import Generations
from airstream.model.turns import Turns
from airstream.profiling.observer import Observer
from airstream.system.forks import FORKED_INSIDE

logger = logging.getLogger(__name__)


def begin_anew(device: torch.device, turns: Turns, generations: Generations, observer: Observer) -> None:
    """Forget the parent's threads, and what they were at. What stays in memory is shared with the parent.

    Raises:
        UnsupportedError: the parent was computing, or does so on an accelerator.
    """
    if device.type != "cpu":
        raise UnsupportedError(
            f"a model on {device} does not work in a forked process, as nothing on a device does: load it in the "
            "child, or start that with multiprocessing's 'spawn'"
        )
    if turns.is_taken:
        raise UnsupportedError(FORKED_INSIDE)
    turns.after_fork()
    generations.after_fork()
    observer.after_fork()
    compute_on_one_thread()


def compute_on_one_thread() -> None:
    """Keep torch from waiting for threads that only the parent has."""
    if torch.get_num_threads() > 1:
        logger.warning(
            "a forked process: the threads that torch computes with are not here, and it would wait for them for ever. "
            "It computes on one thread; torch.set_num_threads() makes it more, if the parent has computed nothing"
        )
        torch.set_num_threads(1)
