"""This prints text as it is generated, beside the line that says how fast it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import TextStreamer

from airstream.cli.stopping import Holding
from airstream.reporting.status import StatusLine


class Printer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Prints tokens to standard output as they come, without the prompt and without what ends the generation.

    Args:
        stops: texts that end it.
        line: what is on the terminal besides.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), line: StatusLine | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._holding = Holding(stops)
        self._line = line

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = self._holding.pass_on(text, stream_end) + ("\n" if stream_end else "")
        if self._line is not None:
            self._line.write(shown)
        else:
            sys.stdout.write(shown)
            sys.stdout.flush()
