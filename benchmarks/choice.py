"""Which form to choose in an outer loop, from the committed results.

`python -m benchmarks.choice` reads the outer loops in `docs/benchmarks.md`, which
`python -m benchmarks.outer --docs docs/benchmarks.md` writes, and writes the table of
`docs/when.md`: the form that costs least, by function and number of products, and after how many
points it has paid to have functions and products compiled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from benchmarks.break_even import number
from benchmarks.outer_page import read
from benchmarks.report import markdown, rewrite
from benchmarks.steps import COMPILED, COMPILED_F, DOUBLE, FORWARD, OURS

Row: TypeAlias = dict[str, str]
DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = "benchmarks.md", "when.md"
BEGIN, END = "<!-- begin choice -->", "<!-- end choice -->"
#: What a user of PyTorch chooses from.
FORMS = (OURS, COMPILED_F, COMPILED, FORWARD, DOUBLE)
#: Within this of the least, the simplest of ours counts as the best: compiling has its price.
NEAR = 1.1


def best(row: Row) -> str:
    """Return the form that costs least; the first of those that are as good; a dash if none is."""
    costs = {form: number(row[form]) for form in FORMS}
    known = {form: cost for form, cost in costs.items() if not math.isnan(cost)}
    if not known:
        return "–"
    least = min(known.values())
    return next(form for form, cost in known.items() if cost <= NEAR * least)


def gain(row: Row, form: str) -> float:
    """Return how many times less than the best of PyTorch's own a form of ours costs."""
    rivals = [number(row[f]) for f in FORMS if f not in (OURS, COMPILED_F, COMPILED)]
    known = [cost for cost in rivals if not math.isnan(cost)]
    return min(known) / number(row[form]) if known else math.nan


def repaid(first: Row, later: Row) -> float:
    """Return after how many points what is compiled has cost less in all; infinite if never."""
    points = []
    for form in (COMPILED_F, COMPILED):
        dearer = number(first[form]) - number(first[OURS])
        saved = number(later[OURS]) - number(later[form])
        if saved > 0 and not math.isnan(dearer):
            points.append(1 + max(0, math.ceil(dearer / saved)))
    return min(points, default=math.inf)


def rows(page: str) -> Iterator[list[str]]:
    """Yield the table: one row for each function."""
    later, first = read(page), {row["case"]: row for row in read(page, first=True)}
    counts = sorted({int(row["K"]) for row in later})
    yield ["case", *(f"K = {k}" for k in counts), "points until compiling is repaid"]
    for case in first:
        mine = {int(row["K"]): row for row in later if row["case"] == case}
        ends = [repaid(first[case], row) for row in mine.values()]
        cells = [_named(mine[k]) if k in mine else "–" for k in counts]
        yield [case, *cells, _points(ends)]


def _named(row: Row) -> str:
    form = best(row)
    ratio = gain(row, form) if form in FORMS else math.nan
    return f"{form} ({ratio:.2g})" if ratio > 1 else form


def _points(ends: Sequence[float]) -> str:
    """Return the range of points, of all numbers of products."""
    known = sorted(e for e in ends if not math.isinf(e))
    if not known:
        return "never"
    low, high = (_rounded(known[0]), _rounded(known[-1]))
    text = low if low == high else f"{low} to {high}"
    return text if len(known) == len(ends) else f"{text}, or never"


def _rounded(value: float) -> str:
    digits = 10 ** max(0, len(str(int(value))) - 2)
    return f"{math.ceil(value / digits) * digits:,}"


def sentence(page: str) -> str:
    """Return what the table says in all."""
    by_count: dict[int, Counter[bool]] = {}
    for row in read(page):
        ours = best(row) in (OURS, COMPILED_F, COMPILED)
        by_count.setdefault(int(row["K"]), Counter())[ours] += 1
    parts = [
        f"with K = {k} in {found[True]} of {found.total()} cases"
        for k, found in sorted(by_count.items())
    ]
    return f"A `Linearizer` costs least {', '.join(parts)}."


def generated(page: str) -> str:
    """Return the generated part of the page, from that with the results."""
    return f"{sentence(page)}\n\n{markdown(rows(page))}"


def main(docs: Path = DOCS) -> None:
    """Write the page."""
    results = (docs / RESULTS).read_text(encoding="utf-8")
    rewrite(docs / PAGE, generated(results), BEGIN, END)


if __name__ == "__main__":
    main()
    print(f"Written to {DOCS / PAGE}")
