"""What optional packages log while they are imported is not shown, and logging is as it was afterwards."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from airstream.system.importing import TALKATIVE, quiet_imports


@pytest.mark.parametrize("name", [*TALKATIVE, "torchao.kernel.intmm"])
def test_warnings_are_silent_meanwhile(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    levels = [logging.getLogger(each).level for each in TALKATIVE]
    with suppress(ImportError), quiet_imports():
        logger.warning("a kernel of mine could not be loaded")
        logger.error("something is wrong")
        raise ImportError
    logger.warning("after it")
    assert [record.message for record in caplog.records] == ["something is wrong", "after it"]
    assert [logging.getLogger(each).level for each in TALKATIVE] == levels


def test_a_level_that_the_user_has_set_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=TALKATIVE[0]):
        with quiet_imports():
            logging.getLogger(TALKATIVE[0]).info("wanted")
        assert logging.getLogger(TALKATIVE[0]).level == logging.INFO
    assert [record.message for record in caplog.records] == ["wanted"]


IN_A_FORK = """
import os, sys, airstream
if (pid := os.fork()) == 0:
    from airstream.system.forks import is_forked
    os._exit(0 if is_forked() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_that_is_the_first_to_use_the_package_is_known_as_one() -> None:
    """Else it would load a model with several threads, and wait for those of its parent."""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_FORK], check=False).returncode == 0
