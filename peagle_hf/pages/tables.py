"""Tables of reports, for a terminal, for an HTML page and for a Markdown page."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_SHORT, _LONG = 24, 40
"""Up to how many characters a cell of a page stays in one line, and from how many on it may break anywhere."""
_PHONE = 40
"""Up to how many characters a row of a page's table fits a phone; page.html makes wider tables lists there."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title: heading above the table; may be empty.
        head: names of the columns; if all are empty, no head is shown.
        rows: each as long as the head.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """The table for a terminal: its title, and aligned columns."""
        rows = [self.head, *self.rows] if any(self.head) else self.rows
        widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
        lines = [
            "   ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])

    def html(self) -> Markup:
        """The table for a page, with its title as a heading; columns of numbers are aligned to the right."""
        is_number = [
            any(column) and all(re.match(r"[-+]?\d[\d.,]*\s?%?$", cell) for cell in column if cell)
            for column in zip(*self.rows, strict=True)
        ] or [False] * len(self.head)

        columns = list(zip(self.head, *self.rows, strict=True))
        is_wide = any(self.head) and sum(2 + max(map(_width, column)) for column in columns) > _PHONE

        def cells(tag: str, row: Sequence[str]) -> str:
            labels = [f' data-label="{escape(name)}"' if is_wide and tag == "td" else "" for name in self.head]
            return "".join(
                f'<{tag} class="{"number " if number else ""}{_length(cell)}"{label}>{escape(cell)}</{tag}>'
                for number, cell, label in zip(is_number, row, labels, strict=True)
            )

        title = f"<h2>{escape(self.title)}</h2>\n" if self.title else ""
        head = f"<thead><tr>{cells('th', self.head)}</tr></thead>\n" if any(self.head) else ""
        rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        kind = ' class="wide"' if is_wide else ""
        return Markup(f'{title}<div class="table">\n<table{kind}>\n{head}<tbody>\n{rows}\n</tbody>\n</table>\n</div>')

    def markdown(self) -> str:
        """The table for a Markdown page; cells are taken for Markdown, so escape what may hold anything."""
        texts = ([" ".join(cell.split()) for cell in row] for row in (self.head, *self.rows))
        head, *lines = ["| " + " | ".join(cells) + " |" for cells in texts]
        return "\n".join([head, "| " + " | ".join(["---"] * len(self.head)) + " |", *lines])


def escape_markdown(text: str) -> str:
    """Text in one line, so that a Markdown page shows it as it is: no tag, link, emphasis, code or end of a cell."""
    line = re.sub(r"[\\`*\[\]|~]|^#|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(text).split()))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _length(cell: str) -> str:
    """The class of a cell by its number of characters."""
    return "short" if len(cell) <= _SHORT else "long" if len(cell) > _LONG else "middle"


def _width(line: str) -> int:
    """Columns in a terminal: East Asian characters and emoji take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)
    return len(line) + wide - sum(unicodedata.category(letter) in ("Mn", "Me", "Cf") for letter in line)
