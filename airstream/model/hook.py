"""A hook is what a module calls before or after it runs.

It knows one function. It refuses to know what that does, and what kind of hook it is registered as.
"""

from __future__ import annotations

from collections.abc import Callable


class Hook:
    """Calls `function`; in a copy of the module, pickled or not, which has weights of its own, nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: object) -> None:
        if self._function is not None:
            self._function(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()
