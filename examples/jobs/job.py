"""What a job is: a problem, several ways to solve it, and what is right."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Counted", "Job", "Row", "lines", "measured"]


class Counted:
    """Counts the runs of a function."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.f(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Job:
    """A problem and the ways to solve it.

    Attributes
    ----------
    make
        Returns the problem, a small one if asked for. Its function `f` is `Counted`.
    error
        How far an answer is from one that was found independently.
    tolerance
        What is right.
    ways
        What a user of each tool writes: functions of the problem that return the answer. The
        first is ours.
    loose
        Ways that are less accurate by their nature, and their tolerances.
    refused
        Ways that cannot do it, and why.
    """

    title: str
    make: Callable[[bool], Any]
    error: Callable[[Any, Any], float]
    tolerance: float
    ways: Mapping[str, Callable[[Any], Any]]
    loose: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """What one way took; `missing` names a package that is not installed."""

    way: str
    lines: int
    runs: int = 0
    first: float = 0.0
    again: float = 0.0
    error: float = 0.0
    right: bool = True
    missing: str = ""


def lines(way: Callable[..., Any]) -> int:
    """Return how many lines of code a function's body has: no docstring, comments or imports."""
    source = textwrap.dedent(inspect.getsource(way))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[ast.get_docstring(function) is not None :]
    body = [s for s in body if not isinstance(s, (ast.Import, ast.ImportFrom))]
    text = source.splitlines()
    used = [text[n - 1].strip() for s in body for n in range(s.lineno, (s.end_lineno or 0) + 1)]
    return sum(bool(line) and not line.startswith("#") for line in used)


def measured(job: Job, problem: Any, way: str) -> Row:
    """Solve the problem twice in one way: with all that is compiled and recorded, and again."""
    solve = job.ways[way]
    row = Row(way, lines(solve))
    tolerance = job.loose.get(way, job.tolerance)
    for which in ("first", "again"):
        problem.f.runs = 0
        began = time.process_time()
        try:
            answer = solve(problem)
        except ImportError as error:
            return dataclasses.replace(row, missing=str(error.name).partition(".")[0])
        setattr(row, which, time.process_time() - began)
        row.runs = problem.f.runs
        row.error = max(row.error, float(job.error(problem, answer)))
    row.right = row.error <= tolerance
    return row
