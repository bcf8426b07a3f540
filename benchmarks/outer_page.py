"""What the outer loops' results say: the tables of the page, and which targets are met."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.report import markdown
from benchmarks.steps import COMPILED, COMPILED_F, DOUBLE, ENGINES, FORWARD, JITTED, OURS, Ours

Result: TypeAlias = Mapping[str, Any]
BEGIN, END = "<!-- begin outer loops -->", "<!-- end outer loops -->"
#: Where the table of the first points begins, after that of all others.
FIRST = "The first point"
#: Fewer points than this are marked.
FEW = 15


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio that is wanted: the best of ours to a rival, at some numbers of products.

    Attributes
    ----------
    title, ours, rival, counts, limit
        What it is called, who is meant, where, and how much it may be.
    launched
        Whether only functions are meant whose operations take no longer than their calls.
    """

    title: str
    ours: Sequence[str]
    rival: str
    counts: Sequence[int]
    limit: float
    launched: bool = False

    def applies(self, result: Result) -> bool:
        """Whether a case with some products is meant."""
        return result["k"] in self.counts and (result["launched"] or not self.launched)

    def ratio(self, result: Result) -> tuple[float, str] | None:
        """Return the ratio and who of ours is the best; None if somebody cannot do it."""
        known = {n: e["later"] for n, e in result["engines"].items() if "later" in e}
        mine = [n for n in self.ours if n in known]
        if self.rival not in known or not mine:
            return None
        best = min(mine, key=known.__getitem__)
        return known[best] / known[self.rival], best


ALL, MANY, COMPILERS = (1, 2, 10, 100), (10, 100), (OURS, COMPILED_F, COMPILED)
TARGETS = (
    Target("torch.func.jvp, K = 2", (OURS,), FORWARD, (2,), 0.6),
    Target("torch.func.jvp, K ≥ 10", (OURS,), FORWARD, MANY, 0.4),
    Target("double backward, K ≥ 2", (OURS,), DOUBLE, ALL[1:], 1.0),
    Target("double backward, K ≥ 10, small operations", (OURS,), DOUBLE, MANY, 0.5, launched=True),
    Target("jax.jit, K ≥ 10, f compiled where that helps", COMPILERS, JITTED, MANY, 1.0),
    Target("jax.jit, any K, f compiled where that helps", COMPILERS, JITTED, ALL, 2.0),
)


def loops(results: Sequence[Result]) -> list[Result]:
    """Return the results that are outer loops, not whole runs."""
    return [r for r in results if "engines" in r]


# -- tables -------------------------------------------------------------------------------


def _cell(entry: Result, key: str, unit: float) -> str:
    if "fails" in entry and key not in entry:
        return str(entry["fails"])
    mark = "\\*" if key == "later" and entry.get("points", FEW) < FEW else ""
    return f"{entry[key] / unit:.3g}{mark}"


def rows(results: Sequence[Result], key: str) -> Iterator[list[str]]:
    """Yield a table, in runs of f alone; of first points there is one for each case."""
    count = [] if key == "first" else ["K"]
    yield ["case", *count, "f, ms", *ENGINES]
    seen = set()
    for r in loops(results):
        if key == "first" and r["case"] in seen:
            continue
        seen.add(r["case"])
        cells = [_cell(r["engines"].get(n, {"fails": "–"}), key, r["f"]) for n in ENGINES]
        k = [str(r["k"]) for _ in count]
        yield [r["case"], *k, f"{r['f'] * 1e3:.3g}", *cells]


def targets(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield which targets are met."""
    yield ["ratio to", "wanted at most", "met", "worst", "where"]
    for target in TARGETS:
        meant = [(target.ratio(r), r) for r in loops(results) if target.applies(r)]
        found = [(at[0], f"{r['case']}, K = {r['k']}") for at, r in meant if at is not None]
        if found:
            met = f"{sum(ratio <= target.limit for ratio, _ in found)} of {len(found)}"
            worst, where = max(found)
            yield [target.title, f"{target.limit}", met, f"{worst:.2f}", where]


def missed(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield where the time goes in the loops that miss a target, in runs of f alone."""
    yield ["case", "K", "engine", "ratio to", *Ours.PARTS, "processor time by place"]
    for r in loops(results):
        over: dict[str, list[str]] = {}
        for target in TARGETS:
            at = target.ratio(r) if target.applies(r) else None
            if at is not None and at[0] > target.limit:
                over.setdefault(at[1], []).append(f"{target.rival} {at[0]:.2g} > {target.limit}")
        for engine, texts in over.items():
            parts = r["parts"].get(engine)
            if parts is not None:
                times = [f"{parts['times'][p] / r['f']:.2f}" for p in Ours.PARTS]
                places = ", ".join(
                    f"{n} {share:.0%}" for n, share in list(parts["rooms"].items())[:5]
                )
                yield [r["case"], str(r["k"]), engine, "; ".join(texts), *times, places]


def whole(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield the whole runs, in seconds, the first one of each engine in brackets."""
    yield ["case", "products", *(n for n in ENGINES if n != "torch.func.linearize")]
    for r in results:
        if "run" in r:
            cells = []
            for name in ENGINES:
                entry = r["run"].get(name)
                if entry is not None:
                    cells.append(
                        entry["fails"]
                        if "fails" in entry
                        else f"{entry['later']:.3g} ({entry['first']:.3g})"
                    )
            yield [r["case"], str(r["k"]), *cells]


def tables(results: Sequence[Result]) -> Iterator[list[list[str]]]:
    """Yield all tables that have rows."""
    for table in (
        rows(results, "later"),
        rows(results, "first"),
        targets(results),
        missed(results),
        whole(results),
    ):
        found = list(table)
        if len(found) > 1:
            yield found


def read(page: str, *, first: bool = False) -> list[dict[str, str]]:
    """Return the rows of a page's first table, by column; or those of the first points."""
    section = page.partition(BEGIN)[2].partition(END)[0]
    parts = section.partition(FIRST)
    text = parts[2].partition("\n\n")[2].partition("\n\n")[0] if first else parts[0]
    table = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("| ---")
    ]
    if not table:
        raise ValueError("no results: run python -m benchmarks.outer --docs docs/benchmarks.md")
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def page(results: Sequence[Result]) -> str:
    """Return the generated part of the page."""
    pieces = (
        (
            "Time of one outer iteration, in runs of f alone without autograd; later points. "
            f"Those marked \\* are means over fewer than {FEW} points.",
            rows(results, "later"),
        ),
        (f"{FIRST}, with everything that is recorded and compiled there:", rows(results, "first")),
        ("Targets:", targets(results)),
        (
            "Where the time of an iteration goes if a target is missed, in runs of f alone, and "
            "who takes it, by the rooms of the package; *C++* is PyTorch's operations, called "
            "from anywhere, *written out* what was generated:",
            missed(results),
        ),
        (
            "Whole runs of Levenberg–Marquardt, in seconds; in brackets the first one, with "
            "everything that is recorded and compiled in it:",
            whole(results),
        ),
    )
    texts = []
    for title, table in pieces:
        found = list(table)
        if len(found) > 1:
            texts += [title, markdown(found)]
    return "\n\n".join(texts)
