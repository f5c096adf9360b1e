"""This finds which field of a file is to blame, by leaving out one after the other, once what the file says has failed.

transformers says "division by zero" where a config says that there are no heads. What is left out has its default,
which may not go with the rest; a number may be 1 instead. If either mends it, the field is named. It costs nothing
where all is well, and little else: it stops after a second of work.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from airstream.compat.quiet import quiet_transformers

MAX_SECONDS = 1.0
"""Of this thread's work, after which no further field is left out: a model of hundreds of layers takes as long to build
once."""

MAX_NAMED = 3

_NAME = re.compile(r"[A-Za-z]\w+")
"""Of a field. The keys of an object of labels are numbers."""

Path = tuple[str, ...]


def names_a_field(said: str, values: Mapping[str, Any]) -> bool:
    """Whether `said` mentions a field of `values`."""
    return any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", said) for *_, key in _paths(values))


def advice(values: Mapping[str, Any], defaults: Mapping[str, Any], attempt: Callable[[dict[str, Any]], object]) -> str:
    """Words that name the fields of `values` that an error comes of; "" if none is found.

    Args:
        defaults: what the fields are if the file says nothing: a field of another type is looked at first.
        attempt: what has failed with `values`, and is to be tried with others. Whatever it raises is a failure.
    """
    named = [f"{'.'.join(path)} ({_shown(values, path)})" for path in _suspects(values, defaults, attempt)]
    return f" - which comes of {' or '.join(named)}" if named else ""


def _suspects(
    values: Mapping[str, Any], defaults: Mapping[str, Any], attempt: Callable[[dict[str, Any]], object]
) -> list[Path]:
    ends = time.thread_time() + MAX_SECONDS
    paths = sorted(_paths(values), key=lambda path: _is_likely(_at(values, path), _at(defaults, path)), reverse=True)
    found: list[Path] = []
    with quiet_transformers():
        if _works(attempt, dict(values)):
            return []  # it is not what they say that has failed
        for path in paths:
            if time.thread_time() > ends or len(found) == MAX_NAMED:
                break
            if path[:1] not in found and any(_works(attempt, others) for others in _mended(values, path)):
                found.append(path)
    return found


def _paths(values: Mapping[str, Any]) -> Iterator[Path]:
    """Every field, those within an object before it: the smallest that is to blame is named."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value if _NAME.fullmatch(inner))
        yield (key,)


def _is_likely(value: Any, default: Any) -> int:
    """How little `value` is like what is written there: of another type, or in most files not there, or a number that
    counts nothing.
    """
    alike = isinstance(value, type(default)) or value is None or default is None
    odd = isinstance(value, int | float) and not isinstance(value, bool) and not value > 0
    return 3 * (not alike) + 2 * (default is None and value is not None) + odd


def _works(attempt: Callable[[dict[str, Any]], object], values: dict[str, Any]) -> bool:
    try:
        attempt(values)
    except Exception:  # of whatever kind: another field may be wrong, too
        return False
    return True


def _at(values: Any, path: Path) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _mended(values: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """`values` without the field at `path`, or with another number in it."""
    yield _with(values, path)
    if isinstance(_at(values, path), int | float):
        yield _with(values, path, 1)


def _with(values: Mapping[str, Any], path: Path, *given: Any) -> dict[str, Any]:
    """`values` with what is `given` at `path`, if anything."""
    key, *inner = path
    others = {name: value for name, value in values.items() if name != key}
    if inner:
        return {**others, key: _with(values[key], tuple(inner), *given)}
    return {**others, **dict.fromkeys([key] if given else [], *given)}


def _shown(values: Mapping[str, Any], path: Path) -> str:
    text = repr(_at(values, path))
    return text if len(text) <= 60 else f"{text[:60]} ..."
