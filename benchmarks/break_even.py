"""From how many products on linearizing pays, computed from the committed results.

`python -m benchmarks.break_even` reads the tables of `docs/benchmarks.md` and writes
`docs/_static/break-even.svg` and the generated part of `docs/when.md`. `make bench` does so too,
after it has written the tables.

The rival is `torch.func`, which runs the function for each J·v (`jvp`) and once for all Jᵀ·u
(`vjp`). One pair of products after another, linearizing has its set-up against it and the run
of f that each J·v saves in its favour. At a further point of the same structure the programs of
the first one are used again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.report import markdown, rewrite

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE, PLOT = "benchmarks.md", "when.md", "_static/break-even.svg"
OURS, RIVAL, AGAIN = "linearize", "torch.func.jvp, vjp", "linearize again"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one engine takes at one point, in milliseconds.

    Attributes
    ----------
    setup
        Everything but the products themselves.
    pair
        One J·v and one Jᵀ·u.
    """

    setup: float
    pair: float


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """From how many pairs of products on linearizing costs less; infinite if never.

    Attributes
    ----------
    case
        Where it was measured.
    first, further
        At the first point, and at a further one of the same structure.
    gain
        How many times less a pair costs, once set up.
    """

    case: str
    first: float
    further: float
    gain: float


def pairs(ours: Costs, rival: Costs) -> float:
    """Return the least number of pairs for which the first costs less in all."""
    if ours.pair >= rival.pair:
        return 1 if ours.setup + ours.pair < rival.setup + rival.pair else math.inf
    return max(1, math.ceil((ours.setup - rival.setup) / (rival.pair - ours.pair)))


def table(page: str, heading: str) -> dict[str, dict[str, str]]:
    """Return the table below a heading, by case and column."""
    below = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in below.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    if not rows:
        raise ValueError(f"no table below {heading!r}")
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}


def number(cell: str) -> float:
    """Return the number that a cell begins with, NaN if there is none."""
    found = re.match(r"-?[\d.]+(e[+-]?\d+)?", cell)
    return float(found[0]) if found else math.nan


def break_evens(page: str) -> Iterator[BreakEven]:
    """Yield the figures of all cases that both engines can do in both directions."""
    steady = table(page, "Steady J·v"), table(page, "Steady Jᵀ·u")
    for case, row in table(page, "Set-up").items():
        products = [t.get(case, {}) for t in steady]
        rival = _costs(row, products, RIVAL, RIVAL)
        first = _costs(row, products, OURS, OURS)
        further = _costs(row, products, OURS, AGAIN)
        if not any(map(math.isnan, (rival.setup, rival.pair, first.setup, first.pair))):
            gain = rival.pair / first.pair
            yield BreakEven(case, pairs(first, rival), pairs(further, rival), gain)


def _costs(
    row: dict[str, str], products: Sequence[dict[str, str]], engine: str, setup: str
) -> Costs:
    each = (number(p.get(engine, "")) * number(p.get("forward, ms", "")) for p in products)
    return Costs(number(row[setup]) * number(row["autograd, ms"]), sum(each))


def rows(figures: Sequence[BreakEven]) -> Iterator[list[str]]:
    """Yield the table of the page."""
    yield ["case", "first point", "further points", "a pair costs"]
    for f in figures:
        yield [f.case, _count(f.first), _count(f.further), f"{1 / f.gain:.2g}"]


def _count(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"


def generated(page: str) -> str:
    """Return the generated part of the page, from that with the results."""
    figures = list(break_evens(page))
    usual = sorted(f.first for f in figures)[len(figures) // 2]
    later = sorted(f.further for f in figures)[len(figures) // 2]
    return "\n\n".join(
        (
            f"In half of the {len(figures)} cases linearizing pays from pair "
            f"{_count(usual)} on at the first point, and from pair {_count(later)} on at further "
            "points.",
            "<details><summary>The numbers</summary>",
            markdown(rows(figures)),
            "</details>",
        )
    )


def plot(figures: Sequence[BreakEven], path: Path) -> None:
    """Draw the number of pairs, case by case."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "break-even", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    ceiling = 2 * max(f.first for f in figures if not math.isinf(f.first))
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(figures) + 1.2), layout="constrained")
    for name, values, style in (
        (
            "first point",
            [f.first for f in figures],
            {"marker": "o", "markersize": 9, "markerfacecolor": "none"},
        ),
        (
            "further points",
            [f.further for f in figures],
            {"marker": "D", "markersize": 4, "color": "black"},
        ),
    ):
        shown = [min(v, ceiling) for v in values]
        axis.plot(shown, range(len(shown)), linestyle="", label=name, **style)
    axis.set_xscale("log")
    ticks = [t for t in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if t < ceiling]
    if any(math.isinf(max(f.first, f.further)) for f in figures):
        ticks = [t for t in ticks if t < 0.6 * ceiling]
        axis.set_xticks([*ticks, ceiling], [*map(str, ticks), "never"])
    else:
        axis.set_xticks(ticks, [*map(str, ticks)])
    axis.minorticks_off()
    axis.set_xlabel("pairs of products, from which on linearizing costs less")
    axis.set_yticks(range(len(figures)), [f.case for f in figures], fontsize=8)
    axis.invert_yaxis()
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(docs: Path = DOCS) -> None:
    """Write the figure and the table."""
    page = (docs / RESULTS).read_text(encoding="utf-8")
    plot(list(break_evens(page)), docs / PLOT)
    rewrite(docs / PAGE, generated(page))


if __name__ == "__main__":
    main()
    print(f"Written to {DOCS / PAGE} and {DOCS / PLOT}")
