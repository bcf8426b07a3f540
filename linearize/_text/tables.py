"""Tables as text and as HTML, and numbers for people."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

#: Characters that neither XML nor HTML may contain.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

#: So many sizes are listed.
_MOST_SIZES = 25
#: The style of tables, bars and notes; colours follow the reader's scheme.
STYLE = """
.lz { --lz-ink: #1f2328; --lz-faint: #59636e; --lz-line: #d1d9e0; --lz-bar: #4a82c3;
  --lz-page: #ffffff; color: var(--lz-ink); color-scheme: light dark;
  font: 14px/1.45 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; }
.lz table { border-collapse: collapse; margin: .6em 0; font-size: 13px; color: inherit;
  background: transparent; }
.lz th, .lz td { padding: .25em .8em; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--lz-line); background: transparent; color: inherit; }
.lz th { font-weight: 600; color: var(--lz-faint); white-space: nowrap; }
.lz .lz-n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.lz code, .lz pre { font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  font-size: 12px; background: transparent; color: inherit; overflow-wrap: anywhere; }
.lz .lz-bar { display: block; height: .8em; margin-top: .3em; min-width: 1px;
  background: var(--lz-bar); border-radius: 2px; }
.lz .lz-bars { display: block; width: 16em; }
.lz .lz-faint { color: var(--lz-faint); }
@media (prefers-color-scheme: dark) {
  .lz { --lz-ink: #e6edf3; --lz-faint: #9da7b3; --lz-line: #3d444d; --lz-bar: #5b97dd;
    --lz-page: #15181d; } }
""".strip()


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(text: object) -> str:
    """Return a text as it must stand in HTML and XML, attributes included."""
    if isinstance(text, Markup):
        return str(text)
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)), quote=True)


def code(text: object) -> Markup:
    """Return a text as code."""
    return Markup(f"<code>{escaped(text)}</code>" if str(text) else "")


def framed(content: str) -> str:
    """Return HTML that brings its style along, for a notebook."""
    ground = "background: var(--lz-page); padding: .6em .9em; overflow-x: auto"
    return f'<div class="lz" style="{ground}"><style>{STYLE}</style>{content}</div>'


def shortened(text: str, limit: int = 200) -> str:
    """Return a text without its middle lines, if it is long."""
    lines = text.splitlines()
    if len(lines) <= limit:
        return text
    left_out = len(lines) - limit
    return "\n".join(
        [*lines[: limit // 2], f"  … {left_out:,} more lines …", *lines[limit // 2 + left_out :]]
    )


def clipped(text: str, limit: int = 44) -> str:
    """Return one line of at most `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def size(count: int) -> str:
    """Return a number of bytes for people: exact below ten thousand."""
    if count < 10_000:
        return f"{count:,} B"
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def number(count: int) -> str:
    """Return a count for people: exact below ten thousand."""
    if count < 10_000:
        return f"{count:,}"
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def _scaled(count: float, units: Sequence[str]) -> str:
    for unit in units:
        if count < 999.5 or unit == units[-1]:
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def fewer(sizes: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the first sizes, and what the others amount to."""
    shown, rest = list(sizes[:_MOST_SIZES]), sizes[_MOST_SIZES:]
    if rest:
        shown.append((f"{len(rest):,} more", sum(n for _, n in rest)))
    return shown


def as_text(
    head: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()
) -> str:
    """Return a table with aligned columns, some of them at the right."""
    cells = [list(head), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = (
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in cells)


def as_html(
    head: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()
) -> str:
    """Return a table as HTML; parameters as of `as_text`. Cells are escaped but for `Markup`."""

    def row(cells: Sequence[object], tag: str) -> str:
        kinds = [' class="lz-n"' if i in right else "" for i in range(len(cells))]
        parts = (
            f"<{tag}{kind}>{escaped(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def bars(rows: Sequence[tuple[object, int]], head: tuple[str, str]) -> str:
    """Return a bar chart of bytes as HTML."""
    most = max((n for _, n in rows), default=0) or 1
    cells = [
        (
            label,
            size(n),
            Markup(
                f'<span class="lz-bars"><span class="lz-bar" style="width:{100 * n / most:.1f}%">'
                "</span></span>"
            ),
        )
        for label, n in rows
    ]
    return as_html((*head, ""), cells, right=(1,))
