"""One page that shows a linearization from inside."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .._execute.binding import BoundProgram
from .._simplify.passes import explain, simplify
from .._text.tables import STYLE, as_html, bars, code, escaped, fewer, shortened
from .cost import Cost, cost_of, cost_table, operations_as_html
from .drawing import draw
from .summary import Summary

#: The most residuals that are listed, and the most lines of a program that are printed.
_ROWS, _LINES = 200, 400

_PAGE_STYLE = """
html { background: #ffffff; } body { margin: 0; }
@media (prefers-color-scheme: dark) { html { background: #15181d; } }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h1 code { font-size: 1.35rem !important; }
.wide { overflow-x: auto; } .long { max-height: 32rem; overflow-y: auto; }
.drawings { display: flex; flex-wrap: wrap; align-items: flex-start; }
.drawings > div { max-width: 100%; } details { margin: .5em 0; } summary { cursor: pointer; }
pre { overflow-x: auto; white-space: pre; padding: .6em .8em; border-radius: 6px;
  border: 1px solid var(--lz-line); }
""".strip()


def page(
    summary: Summary, programs: Mapping[str, BoundProgram], limit: int, *, simplifies: bool
) -> str:
    """Return a page in HTML that refers to nothing outside.

    Of each program `limit` equations are drawn at most.
    """
    smaller = {}
    if simplifies:
        with torch.inference_mode(False), torch.no_grad():
            smaller = {k: p.made(simplify) for k, p in programs.items()}
    costs: dict[str, Cost | str] = {}
    for direction, cost in summary.costs.items():
        costs[direction] = cost
        if direction in smaller:
            costs[f"{direction}, simplified"] = cost_of(smaller[direction])
    residuals = summary.residuals
    title = f"Linearization of {summary.name}"
    parts = [
        f"<h1>Linearization of {code(summary.name)}</h1><p>{code(summary.map)}</p>",
        "<h2>What a product costs</h2>",
        _costs(costs, simplified=bool(smaller)),
        "<h2>Operations</h2>",
        _wide(operations_as_html(costs)),
        "<h2>Memory</h2>",
        summary._memory_html(),
    ]
    if residuals.traced:
        kinds = fewer(list(residuals.by_operation().items()))
        parts.append(bars([(code(kind), n) for kind, n in kinds], ("kept by", "bytes")))
    parts += ["<h2>Tensors kept</h2>", f'<div class="wide long">{residuals._html(_ROWS)}</div>']
    parts += _shown("The programs", programs, limit)
    if smaller:
        parts += _shown("The programs simplified", smaller, limit)
        told = "\n".join(explain(p) for p in programs.values())
        parts.append(f"<details><summary>What each pass did</summary><pre>{escaped(told)}</pre>")
        parts.append("</details>")
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)}</title><style>{STYLE}\n{_PAGE_STYLE}</style>"
    )
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n'
        f'<body class="lz"><main>{body}</main></body></html>\n'
    )


def _wide(content: str) -> str:
    return f'<div class="wide">{content}</div>'


def _costs(costs: Mapping[str, Cost | str], *, simplified: bool) -> str:
    (_, *head), rows = cost_table(costs)
    failed = [[k, c] for k, c in costs.items() if isinstance(c, str)]
    note = (
        "Estimated from shapes, for one product: 2mn for a product with an m×n matrix, one flop "
        "per entry for other operations; custom Functions are not estimated."
    )
    if simplified:
        note += " From its third call on a product runs the simplified program."
    without = as_html(["not to be had", "why"], failed) if failed else ""
    table = as_html(["program", *head], rows, right=range(1, 6))
    return f'{_wide(table)}{without}<p class="lz-faint">{note}</p>'


def _shown(title: str, programs: Mapping[str, BoundProgram], limit: int) -> list[str]:
    if not programs:
        return []
    drawings = "".join(_wide(draw([p], limit).svg) for p in programs.values())
    text = "\n\n".join(shortened(str(p), _LINES) for p in programs.values())
    return [
        f"<h2>{title}</h2>",
        f'<div class="drawings">{drawings}</div>',
        f"<details><summary>As text</summary><pre>{escaped(text)}</pre></details>",
    ]
