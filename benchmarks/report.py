"""Tables for the terminal and for the documentation, and the plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import DENSE, ENGINES, LIMIT, OURS
from benchmarks.figures import Figure, figures

Result = dict[str, Any]

BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"


def all_figures(results: Iterable[Result]) -> list[Figure]:
    """Return the figures of all cases."""
    return [figure for result in results for figure in figures(result)]


def _cell(entry: Result, key: str, unit: float) -> str:
    if key in entry:
        return f"{entry[key] / unit:.3g}"
    if "fails" in entry:
        return "fails"
    if "wrong" in entry:
        return "wrong"
    return "not installed" if entry.get("missing") == "not installed" else "–"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _megabytes(entry: Result, key: str) -> str:
    return _number(entry[key] / 1e6) if key in entry else _cell(entry, key, 1.0)


# -- rows of tables, for terminal and page alike ------------------------------------------


def products(results: Sequence[Result], which: str) -> Iterator[list[str]]:
    """Yield a table of steady products in forwards without autograd."""
    yield ["case", "forward, ms", *ENGINES]
    for r in results:
        entries = [r["engines"].get(name, {}) for name in ENGINES]
        if not any(which in e for e in entries):
            continue
        cells = [_cell(e, which, r["forward"]) + _form(e, which) for e in entries]
        yield [r["case"], _number(r["forward"] * 1e3), *cells]


def _form(entry: Result, which: str) -> str:
    """Return a mark for a product that has become one with a matrix."""
    asked = entry.get("operations", {}).get(which, {})
    return " (matrix)" if "mv" in asked and which in entry else ""


def setups(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield a table of set-ups in forwards under autograd, and of runs of f."""
    names = [n for n in ENGINES if n not in (LIMIT, DENSE)]
    yield ["case", "autograd, ms", *names, "linearize, cold", "linearize, met", "linearize again"]
    for r in results:
        own = r["engines"].get(OURS, {})
        cells = []
        for name in names:
            entry = r["engines"].get(name, {})
            text = _cell(entry, "setup", r["autograd"])
            cells.append(f"{text} ({entry['runs']})" if "setup" in entry else text)
        more = [_cell(own, key, r["autograd"]) for key in ("cold", "met", "relinearize")]
        yield [r["case"], _number(r["autograd"] * 1e3), *cells, *more]


def memory(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield a table of retained and peak megabytes."""
    names = [n for n in ENGINES if not n.startswith("jax") and n != DENSE]
    yield ["case", "autograd graph", *names]
    for r in results:
        if r["opaque"]:
            continue
        cells = []
        for name in names:
            entry = r["engines"].get(name, {})
            kept, peak = (_megabytes(entry, k) for k in ("retained_bytes", "peak_bytes"))
            cells.append(kept if kept == peak else f"{kept} / {peak}")
        yield [r["case"], _number(r["graph_bytes"] / 1e6), *cells]


def targets(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield one row for each figure: how often its target is met, and the worst of all."""
    yield ["figure", "targets", "met", "worst", "where"]
    groups: dict[str, list[Figure]] = {}
    for figure in all_figures(results):
        groups.setdefault(figure.name, []).append(figure)
    for name, group in groups.items():
        judged = [f for f in group if f.target is not None]
        if not judged:
            continue
        worst = max(judged, key=lambda f: f.value / (f.target or 1))
        wanted = ", ".join(f"{t:.3g}" for t in sorted({f.target or 0 for f in judged}))
        met = f"{sum(f.met is True for f in judged)} of {len(judged)}"
        where = f"{worst.case} ({worst.detail})" if worst.detail else worst.case
        yield [name, f"≤ {wanted}", met, f"{_number(worst.value)} {worst.unit}".strip(), where]


def by_case(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield every figure of every case, those that miss their target marked."""
    found = all_figures(results)
    names = list(dict.fromkeys(f.name for f in found))
    yield ["case", *names]
    for r in results:
        cells = []
        for name in names:
            here = [f for f in found if f.case == r["case"] and f.name == name]
            marks = {True: "", False: " ✗", None: " ·"}
            cells.append(", ".join(f"{_number(f.value)}{marks[f.met]}" for f in here) or "–")
        yield [r["case"], *cells]


def operations(results: Sequence[Result]) -> Iterator[list[str]]:
    """Yield what a steady product of ours asks PyTorch to do and the limit does not."""
    yield ["case", "product", "over limit", "operations", "beyond the limit", "saved"]
    for r in results:
        own, limit = (r["engines"].get(n, {}) for n in (OURS, LIMIT))
        for which in own.get("operations", {}):
            if which not in limit.get("operations", {}):
                continue
            a, b = (Counter(e["operations"][which]) for e in (own, limit))
            more, fewer = (_counts(c) for c in (a - b, b - a))
            count = f"{sum(a.values())} / {sum(b.values())}"
            yield [r["case"], which, _number(own[which] / limit[which]), count, more, fewer]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counter.most_common()) or "–"


# -- how they are written --------------------------------------------------------------------


def text(rows: Iterable[list[str]]) -> str:
    """Return a table in columns."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def markdown(rows: Iterable[list[str]]) -> str:
    """Return a table for the documentation."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal(results: Sequence[Result]) -> str:
    """Return everything that is worth seeing at once."""
    parts = [
        ("Steady J·v, in forwards without autograd", products(results, "jvp")),
        ("Steady Jᵀ·u, in forwards without autograd", products(results, "vjp")),
        ("Set-up, in forwards under autograd (runs of f)", setups(results)),
        ("Megabytes retained / at most", memory(results)),
        ("Figures by case (✗ misses its target, · has none)", by_case(results)),
        ("Targets", targets(results)),
    ]
    return "\n\n".join(f"{title}\n\n{text(rows)}" for title, rows in parts)


def page(results: Sequence[Result], about: Result, command: str) -> str:
    """Return the generated part of the documentation's page."""
    failures = [
        f"- {r['case']}, {name}: {e['fails'] if 'fails' in e else _off(e)}"
        for r in results
        for name, e in r["engines"].items()
        if "fails" in e or "wrong" in e
    ]
    parts = [
        f"Written by `{command}` with {about['with']}, in one thread; {len(results)} cases.",
        "## Targets",
        "How often each target is met, and where it is missed by most.",
        markdown(targets(results)),
        "![Time of a product over the limit](_static/benchmarks.svg)",
        "## Steady J·v",
        "In runs of f without autograd.",
        markdown(products(results, "jvp")),
        "## Steady Jᵀ·u",
        "In runs of f without autograd.",
        markdown(products(results, "vjp")),
        "## Set-up",
        "At + first J·v + first Jᵀ·u, less one steady J·v and Jᵀ·u, in runs of f under autograd; "
        "in brackets, how often f ran.",
        markdown(setups(results)),
        "## Memory",
        "Megabytes retained, and the most at any time until products are steady.",
        markdown(memory(results)),
        "## Every figure",
        "✗ misses its target, · has none. Two numbers are those of J·v and of Jᵀ·u.",
        markdown(by_case(results)),
        "## What is run beyond the limit",
        "Operations that a steady product asks PyTorch for, ours / the limit's, and their "
        "difference.",
        markdown(operations(results)),
        "## What fails",
        "\n".join(failures) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def _off(entry: Result) -> str:
    return f"wrong {entry['direction']}, off by {entry['wrong']:.2g} of the largest entry"


def rewrite(path: Path, generated: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace the generated part of a page."""
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n\n{generated}\n{end}{tail}", encoding="utf-8")


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw each engine's products over the limit's, case by case."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    shown = [n for n in ENGINES if n not in (LIMIT, DENSE)]
    figure, axes = plt.subplots(
        1, 2, sharey=True, figsize=(11, 0.27 * len(results) + 1.6), layout="constrained"
    )
    for axis, which, title in zip(axes, ("jvp", "vjp"), ("J·v", "Jᵀ·u"), strict=True):
        for name, marker in zip(shown, "Dovs^<>", strict=True):
            points = [
                (e[which] / r["engines"][LIMIT][which], i)
                for i, r in enumerate(results)
                if which in (e := r["engines"].get(name, {}))
                and which in r["engines"].get(LIMIT, {})
            ]
            own = name == OURS
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker,
                label=name,
                markersize=7 if own else 5,
                alpha=1.0 if own else 0.7,
                color="black" if own else None,
                zorder=3 if own else 2,
            )
        axis.axvline(1, color="gray", linewidth=1)
        axis.set(xscale="log", xlabel="time over the limit's", title=f"steady {title}")
        axis.set_xlim(left=0.3)
        axis.grid(axis="both", linewidth=0.3)
    axes[0].set_yticks(range(len(results)), [r["case"] for r in results], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
