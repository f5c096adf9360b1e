"""This says what it means that a hub did not give out a checkpoint, and what to do about it.

It knows the errors of huggingface_hub, what they were caused by, and the statuses of HTTP. huggingface_hub itself says
of most of them that a file is not in its cache: the cause is what is told here. It refuses to know what was to be
downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from airstream.errors import AirstreamError, CheckpointNotFoundError, DiskSpaceError
from airstream.reporting.alike import meant_path
from airstream.reporting.first_line import first_line
from airstream.system.disk_space import FULL, remedy_for

Folder = str | os.PathLike[str]

OFFLINE = (
    "is neither a local folder nor complete in the hub's cache, and the hub may not be asked (offline: "
    "local_files_only=True, or HF_HUB_OFFLINE is set). Connect once to download it, or name a local folder"
)

MAKE_ROOM = "Make room, or name a folder on another disk with cache_dir=..., or HF_HOME"

CONNECTION: tuple[tuple[tuple[str, ...], str], ...] = (
    (("name or service not known", "name resolution", "getaddrinfo", "nodename nor servname"),
     "its address cannot be found: there is no network here, or its DNS does not answer"),
    (("certificate", "ssl"), "its certificate is not accepted: that of a proxy goes into SSL_CERT_FILE"),
    (("proxy",), "the proxy refuses: look at HTTPS_PROXY"),
    (("refused",), "the connection is refused: look at HF_ENDPOINT and HTTPS_PROXY"),
    (("timed out", "timeout"), "it does not answer in time"),
)  # fmt: skip
"""What is in the message of an error of the network, and what it says of the hub."""


def explain(
    error: Exception,
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: Folder | None,
) -> AirstreamError:
    """The error to raise for `error`, which came of downloading the repository `name`."""
    found = _explained(error, name, revision, token, _again(name, cache_dir))
    return CheckpointNotFoundError(f"{found}{meant_path(name)}") if isinstance(found, FileNotFoundError) else found


def _explained(
    error: Exception, name: str, revision: str | None, token: str | bool | None, again: str
) -> AirstreamError:
    causes = list(_causes(error))
    of = f"{name!r} (revision {revision or 'main'})"
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return CheckpointNotFoundError(f"{of} is gated: accept its terms at {_page(name)} {_then(token)}")
        if isinstance(cause, RevisionNotFoundError):
            return CheckpointNotFoundError(f"{name!r} has no revision {revision!r}: {_page(name)} lists its branches")
        if isinstance(cause, RepositoryNotFoundError):
            return CheckpointNotFoundError(
                f"the hub has no {of}, or does not show it to you, and there is no such folder. Check the name; if "
                f"the model is private, {_log_in(token)}"
            )
        if isinstance(cause, HFValidationError):
            return CheckpointNotFoundError(f"{name!r} is neither a local folder nor a hub id: {first_line(cause)}")
        if isinstance(cause, OfflineModeIsEnabled):
            return CheckpointNotFoundError(f"{name!r} {OFFLINE}")
        if isinstance(cause, HfHubHTTPError):
            return CheckpointNotFoundError(_of_status(cause, name, again))
        if isinstance(cause, OSError) and cause.errno in FULL:
            return DiskSpaceError(
                f"downloading {name!r} failed: {first_line(cause)}. {remedy_for(cause.errno or 0, MAKE_ROOM)}"
            )
    if isinstance(error, LocalEntryNotFoundError) and len(causes) == 1:
        return CheckpointNotFoundError(f"{name!r} {OFFLINE}")
    return CheckpointNotFoundError(
        f"there is no folder {name!r} here, and downloading {name!r} failed: {_of_network(causes)} "
        f"({first_line(causes[-1])}). {again}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, as far as that goes."""
    while error is not None:
        yield error
        error = error.__cause__


def _again(name: str, cache_dir: Folder | None) -> str:
    """What to do once the network is there: what has been begun goes on."""
    blobs = Path(cache_dir or constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "blobs")
    return "Try again: it resumes" if any(blobs.glob("*")) else "Try again later"


def _of_status(error: HfHubHTTPError, name: str, again: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not accept the token: make a new one, and pass it as token=... ({first_line(error)})"
    if status == 403:
        return f"the token may not read {name!r}: give it the right to, at the hub ({first_line(error)})"
    if status == 429:
        return f"the hub has had too many requests from here: wait, or pass token=... ({first_line(error)})"
    if status is not None and status >= 500:
        return f"downloading {name!r} failed: the hub is down or busy ({first_line(error)}). Try again later"
    return f"downloading {name!r} failed: {first_line(error)}. {again}"


def _of_network(causes: list[BaseException]) -> str:
    said = " ".join(f"{type(cause).__name__} {cause}" for cause in causes[1:] or causes).lower()
    for words, meaning in CONNECTION:
        if any(word in said for word in words):
            return f"{constants.ENDPOINT}: {meaning}"
    return f"{constants.ENDPOINT} cannot be reached"


def _page(name: str) -> str:
    return f"{constants.ENDPOINT}/{name}"


def _has_token(token: str | bool | None) -> bool:
    return isinstance(token, str) or (token is not False and get_token() is not None)


def _log_in(token: str | bool | None) -> str:
    if _has_token(token):
        return "the account of your token needs access to it"
    return "pass token=..., or log in with `hf auth login`"


def _then(token: str | bool | None) -> str:
    if _has_token(token):
        return "with the account of your token, and wait if its owners have to agree"
    return f"with your account, and {_log_in(token)}"
