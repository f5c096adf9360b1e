"""What of the reader's is left in this process: threads, open files."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("airstream-reader")]


def descriptors(folder: Path) -> list[str]:
    """What this process has open in `folder`, as far as the system tells."""
    if sys.platform != "linux":
        return []
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208 - in one go
    targets = [str(link.readlink()) for link in links if link.is_symlink()]  # the one that listed them is gone
    return [target for target in targets if target.startswith(str(folder))]
