"""A terminal that remembers what is on its screen, for tests of what is drawn there."""

from __future__ import annotations

import io

CODES = ("\x1b7", "\x1b8", "\x1bD", "\x1b[A", "\x1b[B", "\x1b[J", "\x1b[2m", "\x1b[0m", "\r", "\n")


class Terminal(io.StringIO):
    """A screen, as far as the codes go that a status line is drawn with. What is on it: `lines()`."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        rows: list[list[str]] = [[]]
        row = column = 0
        saved = (0, 0)
        text = self.getvalue()
        position = 0
        while position < len(text):
            for code in CODES:
                if text.startswith(code, position):
                    break
            else:
                code = ""
            if not code:
                rows[row].extend(" " * (column + 1 - len(rows[row])))
                rows[row][column] = text[position]
                column += 1
            elif code == "\x1b7":
                saved = (row, column)
            elif code == "\x1b8":
                row, column = saved
            elif code in ("\x1bD", "\x1b[B", "\n"):
                row += 1
                rows.extend([] for _ in range(row + 1 - len(rows)))
                column = 0 if code == "\n" else column
            elif code == "\x1b[A":
                row -= 1
            elif code == "\x1b[J":
                rows[row] = rows[row][:column]
                rows[row + 1 :] = [[] for _ in rows[row + 1 :]]
            elif code == "\r":
                column = 0
            position += len(code) or 1
        return ["".join(line).rstrip() for line in rows]


def screen(text: str) -> list[str]:
    """What is on a screen after `text` has been written to it, without empty lines at the end."""
    terminal = Terminal()
    terminal.write(text.replace("\r\n", "\n"))
    lines = terminal.lines()
    while lines and not lines[-1]:
        lines.pop()
    return lines
