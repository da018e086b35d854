"""`html_table`: tables of reports in a notebook."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


def html_table(head: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """Return an HTML table; the text of every cell and of the note below is escaped."""

    def line(tag: str, cells: Iterable[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>{below}"
