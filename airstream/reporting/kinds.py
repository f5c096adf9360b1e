"""This says in words what lies under a name: a pipe, a link that leads nowhere. It opens nothing, so never waits."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"} | (
    dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
)


def kind_of(mode: int) -> str:
    """What has `mode`, as in `os.stat_result`."""
    return KINDS.get(stat.S_IFMT(mode), "no file")


def what_lies(path: Path) -> str:
    """What `path` is, or else why it is nothing; empty if nothing has that name in a folder that is there."""
    try:
        return kind_of(path.stat().st_mode)
    except (OSError, ValueError, RuntimeError) as error:
        code = getattr(error, "errno", None)
    if code == errno.ELOOP:
        return "a link that leads in a circle"
    if code == errno.ENOENT and os.path.islink(path):  # noqa: PTH114 - a Path raises where it may not look
        return f"a link to {str(path.readlink())!r}, which leads nowhere"
    file = next((parent for parent in path.parents if os.path.isfile(parent)), None)  # noqa: PTH113 - likewise
    return "" if file is None else f"in no folder: {str(file)!r} is a file"
