"""Put fits into words: the table and the summary."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean

from .fit import LRE_SOLVED, Fit
from .models import MODELS

__all__ = ["summary", "table"]

_HEADER = (
    *("problem", "level", "model", "start", "iterations", "asked", "runs of f"),
    *("jvps", "vjps", "LRE"),
)
_TEXT_COLUMNS = 3
_WIDTH = 99


def table(fits: Sequence[Fit]) -> str:
    """Return one line per fit under a header, with a line of totals.

    "iterations" counts the trust region's steps plus those of the refinement; "asked", how often
    a residual, a Jacobian or a gradient was wanted.
    """
    rows = [_row(fit) for fit in fits]
    totals = [sum(column) for column in zip(*map(_costs, fits), strict=True)]
    mean = f"{fmean(fit.lre for fit in fits):.1f}"
    rows.append(["all", "", "", "", "", *map(str, totals), mean])
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = [_line(row, widths) for row in (_HEADER, *rows)]
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(fits: Sequence[Fit]) -> str:
    """Return the closing sentences: what was solved, how accurately, at what cost."""
    runs = len(fits)
    problems = len({fit.problem.name for fit in fits})
    unsolved = [f"{fit.problem.name} from start {fit.start}" for fit in fits if not fit.solved]
    lre = fmean(fit.lre for fit in fits)
    trust_region_lre = fmean(fit.trust_region_lre for fit in fits)
    requests, model_runs, jvps, vjps = (
        sum(column) for column in zip(*map(_costs, fits), strict=True)
    )
    points = sum(fit.points for fit in fits)
    corrections = dict.fromkeys(note for fit in fits for note in fit.problem.corrections)
    paragraphs = [
        f"Solved (LRE of {LRE_SOLVED:.0f} or more): {runs - len(unsolved)} of {runs} runs. "
        f"Not solved: {', '.join(unsolved) or 'none'}.",
        f"Average LRE: {lre:.1f} over {runs} runs of {problems} problems "
        f"(after the trust region alone: {trust_region_lre:.1f}).",
        "Published averages: MINPACK 4.4, HBN 6.8 (Mondragon & Borchers 2005), Ceres Solver 9.4; "
        "they are over all 54 runs of 27 problems, nine of which are not here: the sets differ.",
        f"A residual, a Jacobian or a gradient was asked for {requests} times, "
        f"at {points} distinct points. The models ran {model_runs} times; {jvps} products J·v "
        f"and {vjps} products Jᵀ·u came from these runs.",
        *(f"Note on {note}." for note in corrections),
    ]
    return "\n".join(textwrap.fill(paragraph, _WIDTH) for paragraph in paragraphs)


def _costs(fit: Fit) -> tuple[int, int, int, int]:
    counts = fit.counts
    return counts.requests, counts.runs, counts.jvps, counts.vjps


def _row(fit: Fit) -> list[str]:
    return [
        fit.problem.name,
        fit.problem.difficulty,
        MODELS[fit.problem.name].kind,
        str(fit.start),
        f"{fit.trust_region_steps}+{fit.gradient_steps}",
        *map(str, _costs(fit)),
        f"{fit.lre:.1f}" + ("" if fit.solved else " (not solved)"),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()
