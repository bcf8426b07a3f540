"""The picture of the front page: what an outer iteration takes, against the number of products.

`python -m benchmarks.front` reads the outer loops in `docs/benchmarks.md`, which
`python -m benchmarks.outer --docs docs/benchmarks.md` writes, and draws
`docs/_static/outer.svg`. All colours show on white and on black.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.break_even import number
from benchmarks.outer_page import read

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PICTURE = "benchmarks.md", "_static/outer.svg"
CASES = ("Bratu 128 x 128", "Burgers, 50 steps, n = 1,000", "MLP 6 x 256, batch 128")
#: By engine: what it is called, its colour, how wide the line is.
LINES = {
    "torch.func.jvp": ("torch.func.jvp", "#e07b39", 2.0),
    "jax.jit": ("jax.jit of jax.linearize", "#3c8dbc", 2.0),
    "linearize": ("linearize", "#2e9e6b", 3.5),
}
GREY = "#808080"
#: Pixels: a panel, what is left of it, above it, below it.
WIDE, HIGH, LEFT, ABOVE, BELOW = 220, 200, 52, 64, 46


@dataclasses.dataclass(frozen=True)
class Curve:
    """Milliseconds of one outer iteration, by the number of products."""

    engine: str
    points: tuple[tuple[int, float], ...]


def curves(page: str, case: str) -> list[Curve]:
    """Return what a page says of one case; engines that cannot do it have no points."""
    rows = [row for row in read(page) if row["case"] == case]
    found = []
    for engine in LINES:
        points = [(int(row["K"]), number(row[engine]) * number(row["f, ms"])) for row in rows]
        found.append(Curve(engine, tuple(p for p in points if not math.isnan(p[1]))))
    return found


def picture(page: str) -> str:
    """Return the drawing, as SVG."""
    known = {case: curves(page, case) for case in CASES}
    shown = {case: c for case, c in known.items() if any(curve.points for curve in c)}
    width, height = len(shown) * (WIDE + LEFT) + 12, ABOVE + HIGH + BELOW
    inside = [line for k, item in enumerate(shown.items()) for line in _panel(k, *item)]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="12" fill="{GREY}">',
            *_legend(),
            *inside,
            "</svg>\n",
        )
    )


def _legend() -> Iterator[str]:
    x = LEFT
    for title, colour, wide in LINES.values():
        yield f'<path d="M{x} 14h24" stroke="{colour}" stroke-width="{wide}"/>'
        yield f'<text x="{x + 30}" y="18">{title}</text>'
        x += 60 + 7 * len(title)
    yield f'<text x="{LEFT}" y="34">time of one outer iteration</text>'


def _panel(k: int, case: str, found: Sequence[Curve]) -> Iterator[str]:
    """Draw one case; both axes are logarithmic."""
    left = LEFT + k * (WIDE + LEFT)
    times = [t for curve in found for _, t in curve.points]
    counts = sorted({n for curve in found for n, _ in curve.points})
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))

    def x(n: float) -> float:
        return left + WIDE * math.log(n / counts[0]) / math.log(max(counts[-1] / counts[0], 2))

    def y(t: float) -> float:
        return ABOVE + HIGH * (high - math.log10(t)) / max(high - low, 1)

    yield f'<text x="{left}" y="{ABOVE - 14}" font-weight="bold">{html.escape(case)}</text>'
    for exponent in range(low, high + 1):
        level = y(10.0**exponent)
        yield f'<path d="M{left} {level:.1f}h{WIDE}" stroke="{GREY}" stroke-opacity="0.3"/>'
        label, low_by = _time(exponent), level + 4
        yield f'<text x="{left - 6}" y="{low_by:.1f}" text-anchor="end">{label}</text>'
    for n in counts:
        yield f'<text x="{x(n):.1f}" y="{ABOVE + HIGH + 18}" text-anchor="middle">{n}</text>'
    middle = left + WIDE / 2
    below = ABOVE + HIGH + 38
    yield f'<text x="{middle}" y="{below}" text-anchor="middle">products at each point</text>'
    for curve in found:
        _, colour, wide = LINES[curve.engine]
        at = [f"{x(n):.1f} {y(t):.1f}" for n, t in curve.points]
        if at:
            path = "L".join(at)
            yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{wide}"/>'
        for point in at:
            cx, cy = point.split()
            yield f'<circle cx="{cx}" cy="{cy}" r="{wide + 1}" fill="{colour}"/>'


def _time(exponent: int) -> str:
    """Return a power of ten of milliseconds."""
    if exponent >= 3:
        return f"{10 ** (exponent - 3)} s"
    return f"{10**exponent} ms" if exponent >= 0 else f"{10 ** (exponent + 3)} µs"


def main(docs: Path = DOCS) -> None:
    """Draw the picture."""
    page = (docs / RESULTS).read_text(encoding="utf-8")
    (docs / PICTURE).write_text(picture(page), encoding="utf-8")


if __name__ == "__main__":
    main()
    print(f"Written to {DOCS / PICTURE}")
