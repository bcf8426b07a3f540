"""The page of the documentation that a run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .disputes import DISPUTES
from .runner import Task

BEGIN, END = "<!-- written by the run: begin -->", "<!-- written by the run: end -->"
COLUMNS = ("right", "disputed", "wrong", "refused", "failed", "not comparable")
Results = Mapping[Task, Mapping[str, Any]]


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _dtypes(results: Results) -> list[str]:
    return list(dict.fromkeys(task.dtype for task in results))


def _single(result: Mapping[str, Any]) -> Mapping[str, int]:
    """Return how many samples had which outcome, batched products left aside."""
    return result.get("single", result["counts"])


def _single_outcome(result: Mapping[str, Any]) -> str:
    order = ("wrong", "failed", "refused", "disputed", "right")
    return next((o for o in order if _single(result).get(o)), "not comparable")


def _counts(results: Results) -> list[list[Any]]:
    rows = []
    for dtype in _dtypes(results):
        of = {task: r for task, r in results.items() if task.dtype == dtype}
        limits = {task.limit for task in of}
        samples = ", ".join("all" if n is None else f"first {n}" for n in limits)
        both = (
            ("", [r["outcome"] for r in of.values()], [r["counts"] for r in of.values()]),
            (
                ", single products only",
                [_single_outcome(r) for r in of.values()],
                [_single(r) for r in of.values()],
            ),
        )
        for what, outcomes, counts in both:
            rows.append(
                [dtype, f"operators{what}", len(of), *(outcomes.count(c) for c in COLUMNS)]
            )
            sums = [sum(count.get(c, 0) for count in counts) for c in COLUMNS]
            rows.append(["", f"samples ({samples}){what}", sum(sums), *sums])
    return rows


def summary(results: Results) -> str:
    """Return the counts as a table."""
    return _table(["dtype", "", "number", *COLUMNS], _counts(results))


def _share(results: Results) -> str:
    parts = []
    for dtype in _dtypes(results):
        of = [r for task, r in results.items() if task.dtype == dtype]
        comparable = sum(r["outcome"] != "not comparable" for r in of)
        right = sum(r["outcome"] == "right" for r in of)
        single = sum(_single_outcome(r) == "right" for r in of)
        share = 100 * single / max(comparable, 1)
        parts.append(f"{dtype}: {right} of {comparable}, single products {single} ({share:.1f} %)")
    return "Operators right in every sample, of those that are comparable: " + "; ".join(parts)


def _cell(text: str) -> str:
    """Escape what Markdown would take for markup."""
    text = text if len(text) <= 220 else text[:220].rsplit(" ", 1)[0] + " …"
    for mark in "\\`*_{}[]<>|$":
        text = text.replace(mark, "\\" + mark)
    return text


def _listed(results: Results, outcome: str) -> str:
    """Return the operators with this outcome, those with the same reason together."""
    found: dict[str, dict[str, list[str]]] = {}
    for task, result in results.items():
        if result["outcome"] == outcome:
            reason = DISPUTES[task.operator].reason if outcome == "disputed" else result["reason"]
            total = sum(result["counts"].values())
            share = f"{task.dtype} {result['counts'].get(outcome, 0)}/{total}"
            found.setdefault(reason, {}).setdefault(task.operator, []).append(share)
    if not found:
        return "None."
    rows = [
        [
            "; ".join(f"`{name}` ({', '.join(shares)})" for name, shares in which.items()),
            _cell(why),
        ]
        for why, which in found.items()
    ]
    return _table(["operators, and in how many of their samples", "reason"], rows)


def _means(results: Results) -> str:
    totals: dict[str, int] = {}
    for result in results.values():
        for name, count in result.get("means", {}).items():
            totals[name] = totals.get(name, 0) + count
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return _table(["reference of J·v", "samples right by it"], [list(item) for item in ranked])


def body(results: Results, version: str, command: str) -> str:
    """Return what stands between the markers."""
    parts = [
        f"Written by `{command}` with torch {version} on a CPU.",
        summary(results),
        _share(results) + ".",
        _means(results),
        "### Wrong",
        _listed(results, "wrong"),
        "### Failed",
        _listed(results, "failed"),
        "### Refused",
        _listed(results, "refused"),
        "### Disputed",
        _listed(results, "disputed"),
    ]
    return "\n\n".join(parts)


def write(page: Path, results: Results, version: str, command: str) -> None:
    """Replace what stands between the markers of the page."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{page}: the markers of the run are missing")
    written = f"{head}{BEGIN}\n\n{body(results, version, command)}\n\n{END}{tail}"
    page.write_text(written, encoding="utf-8")
