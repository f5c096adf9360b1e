"""Run a command with its memory, page cache included, limited by a cgroup; Linux, root, cgroup v1 or v2.

    python -m benchmarks.limited MIB COMMAND...

This is how a machine smaller than the model is had on a machine that is larger: under the limit the kernel drops the
command's own page cache first and kills the command when that does not suffice. Swap is limited along. Before the start
the whole page cache is dropped, so nothing comes from memory that an earlier run filled.

Knows nothing of models. Imports no large library, because a child inherits the peak RSS of the process that starts it.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MIB = 1 << 20
CGROUP_ROOT = Path("/sys/fs/cgroup")
TIMEOUT_STATUS = 124  # what timeout(1) exits with
NO_LIMIT_STATUS = 125  # what env(1) and timeout(1) exit with when they themselves fail


class LimitError(RuntimeError):
    """No memory limit can be set here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what the kernel counted for it."""

    status: int  # exit status, or minus the signal that ended it
    wall_seconds: float
    max_rss_bytes: int  # of the largest process among the command and the children it waited for
    read_bytes: int | None  # fetched from block devices (not from the page cache), its waited-for children included
    peak_bytes: int | None = None  # of the cgroup, page cache included; None without a limit
    is_timeout: bool = False
    is_out_of_memory: bool = False

    @property
    def is_success(self) -> bool:
        """Whether the command ended by itself with status 0."""
        return self.status == 0 and not self.is_timeout


@dataclass(frozen=True)
class _Version:
    """Where one cgroup version keeps things."""

    parent: Path
    limit: str
    swap_limit: str
    peak: str
    events: str


_V1 = _Version(
    CGROUP_ROOT / "memory",
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
)
_V2 = _Version(CGROUP_ROOT, "memory.max", "memory.swap.max", "memory.peak", "memory.events")


class MemoryGroup(AbstractContextManager["MemoryGroup"]):
    """A cgroup whose processes may use `limit_bytes` together. Closing it kills what is left inside.

    Raises:
        LimitError: this is not root, or there is no memory controller.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._version = _find_version()
        self._path = self._version.parent / f"airstream-benchmark-{os.getpid()}"
        try:
            self._path.mkdir()
            (self._path / self._version.limit).write_text(str(limit_bytes))
        except OSError as error:
            self.close()
            raise LimitError(
                f"cannot limit memory to {limit_bytes // MIB} MiB under {self._path.parent}: {error}"
            ) from error
        # v1 limits memory plus swap, v2 swap alone. The file is absent where swap is not accounted for.
        with suppress(OSError):
            (self._path / self._version.swap_limit).write_text("0" if self._version is _V2 else str(limit_bytes))

    @property
    def procs(self) -> Path:
        """The file that a process writes its id to in order to be inside."""
        return self._path / "cgroup.procs"

    def peak_bytes(self) -> int | None:
        """The most memory ever used at once, page cache included; None where the kernel does not keep it."""
        with suppress(OSError, ValueError):
            return int((self._path / self._version.peak).read_text())
        return None

    def has_killed(self) -> bool:
        """Whether the kernel killed a process here for lack of memory."""
        with suppress(OSError):
            events = (self._path / self._version.events).read_text().split()
            return int(dict(zip(events[::2], events[1::2], strict=False)).get("oom_kill", 0)) > 0
        return False

    def close(self) -> None:
        """Kill what is left inside and remove the group. May be called again."""
        for _ in range(50):  # a killed process leaves its group only once it is gone
            if self._kill_and_remove():
                return
            time.sleep(0.1)

    def _kill_and_remove(self) -> bool:
        if not self._path.exists():
            return True
        for process in self.procs.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        with suppress(OSError):
            self._path.rmdir()
        return not self._path.exists()

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_version() -> _Version:
    if not sys.platform.startswith("linux"):
        raise LimitError("a memory limit needs Linux's cgroups")
    if os.geteuid() != 0:
        raise LimitError("a memory limit needs root (cgroups, /proc/sys/vm/drop_caches)")
    if (_V1.parent / _V1.limit).parent.is_dir():
        return _V1
    controllers = _V2.parent / "cgroup.controllers"
    if controllers.is_file() and "memory" in controllers.read_text().split():
        with suppress(OSError):  # it may be on already; if it cannot be, setting the limit fails and says so
            (_V2.parent / "cgroup.subtree_control").write_text("+memory")
        return _V2
    raise LimitError(f"no cgroup memory controller under {CGROUP_ROOT}")


def check_limit() -> None:
    """Find out now, before hours of work, whether a memory limit can be set.

    Raises:
        LimitError: it cannot.
    """
    with MemoryGroup(64 * MIB):
        pass


def check_cold() -> None:
    """Find out now whether the page cache can be dropped, by dropping it.

    Raises:
        LimitError: it cannot.
    """
    try:
        drop_page_cache()
    except (OSError, AttributeError) as error:  # Windows has no os.sync
        raise LimitError(f"a cold page cache needs Linux and root (/proc/sys/vm/drop_caches): {error}") from error


def drop_page_cache() -> None:
    """Write dirty pages out and forget every clean one. Needs root; blocks on the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(
    command: Sequence[str],
    *,
    limit_bytes: int | None = None,
    timeout_seconds: float | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `command` to its end and return what the kernel counted. Blocks.

    With `limit_bytes` it runs inside a memory cgroup of that size and the page cache is dropped first.
    After `timeout_seconds` the command and everything it started is killed.

    Raises:
        LimitError: the limit cannot be set.
    """
    with MemoryGroup(limit_bytes) if limit_bytes is not None else nullcontext() as group:
        if group is not None:
            drop_page_cache()
            # The shell enters the group before it becomes the command: nothing the command allocates escapes.
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.procs), *command]
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, cwd=cwd, env=env, start_new_session=True
        ) as process:
            try:
                is_timeout = not _wait(process.pid, timeout_seconds)
            finally:
                read_bytes = disk_read_bytes(process.pid)  # the ended process still has its books: it is not reaped yet
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                _, wait_status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(wait_status)
        return Outcome(
            status=process.returncode,
            wall_seconds=time.perf_counter() - start,
            max_rss_bytes=usage.ru_maxrss * 1024,
            read_bytes=read_bytes,
            peak_bytes=group.peak_bytes() if group else None,
            is_timeout=is_timeout,
            is_out_of_memory=group.has_killed() if group else False,
        )


def end_when_asked() -> None:
    """Let SIGTERM end this program as an exception does: what it has started is killed then, and its cgroup removed.

    A peer that is left behind computes on, and spoils whatever is measured next.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _wait(pid: int, timeout_seconds: float | None) -> bool:
    """Wait for the end of a child without reaping it. False: it still runs after `timeout_seconds`."""
    handle = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([handle], [], [], timeout_seconds)
        return bool(ready)
    finally:
        os.close(handle)


def disk_read_bytes(pid: int | str = "self") -> int | None:
    """Bytes that a process made the kernel fetch from block devices so far, or None where that is not accounted for."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "read_bytes":
                return int(value)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line's command under its limit; returns the command's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.add_argument("mib", type=int, help="the limit in mebibytes")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("no command given")
    try:
        outcome = run(args.command, limit_bytes=args.mib * MIB, timeout_seconds=args.timeout)
    except LimitError as error:
        print(f"limited: {error}", file=sys.stderr)
        return NO_LIMIT_STATUS
    print(f"limited: {describe(outcome, args.mib)}", file=sys.stderr)
    if outcome.is_timeout:
        return TIMEOUT_STATUS
    return outcome.status if outcome.status >= 0 else 128 - outcome.status


def describe(outcome: Outcome, limit_mib: int) -> str:
    """One line for people."""
    peak = "unknown" if outcome.peak_bytes is None else f"{outcome.peak_bytes // MIB}"
    read = "unknown" if outcome.read_bytes is None else f"{outcome.read_bytes / 1e9:.2f} GB"
    ending = ", timed out" if outcome.is_timeout else ", killed for memory" if outcome.is_out_of_memory else ""
    return (
        f"peak {peak} MiB of {limit_mib} (page cache included), largest process {outcome.max_rss_bytes // MIB} MiB, "
        f"read from disk {read}, {outcome.wall_seconds:.1f} s{ending}"
    )


if __name__ == "__main__":
    sys.exit(main())
