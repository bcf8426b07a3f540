"""Read the NIST StRD files for nonlinear regression.

Each file states where its parts are ("Data (lines 61 to 274)"); the parser goes by these line
numbers and checks what it finds against the counts that the file states as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["DATA_DIR", "DataFileError", "Problem", "load", "problem_names", "read_problem"]

DATA_DIR = Path(__file__).resolve().parent.parent / "data" / "nist"

_DIFFICULTIES = ("lower", "average", "higher")

# The copy of Roszman1.dat at hand garbles one certified value. The corrected value is the one
# that NIST publishes, and the only one of the two that gives the certified residual sum of
# squares of the same file. Keys: dataset, parameter number. Values: as it stands, as it must be.
_ERRATA: dict[tuple[str, int], tuple[str, float]] = {
    ("Roszman1", 1): ("1.20196866396E-0", 2.0196866396e-01),
}


class DataFileError(ValueError):
    """A file does not have the form of an StRD file, or contradicts itself."""


@dataclass(frozen=True)
class Problem:
    """One regression problem with p parameters and m observations.

    Attributes
    ----------
    name
        Name of the dataset, for example ``"Misra1a"``.
    difficulty
        ``"lower"``, ``"average"`` or ``"higher"``, as graded by NIST.
    x, y
        Predictor and response, each of shape (m,), in the units of the dataset.
    starts
        The two starting points, shape (2, p): the first far away, the second near.
    certified
        Certified least-squares estimates to eleven digits, shape (p,).
    deviations
        Certified standard deviations of the estimates, shape (p,).
    rss
        Certified residual sum of squares, in squared units of y.
    corrections
        What was put right in the file, one sentence each; usually empty.
    """

    name: str
    difficulty: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    starts: NDArray[np.float64]
    certified: NDArray[np.float64]
    deviations: NDArray[np.float64]
    rss: float
    corrections: tuple[str, ...] = ()


def problem_names(directory: Path = DATA_DIR) -> list[str]:
    """Return the names of all datasets in a directory, sorted."""
    return sorted(path.stem for path in directory.glob("*.dat"))


def load(names: Iterable[str] | None = None, directory: Path = DATA_DIR) -> list[Problem]:
    """Read several problems, all of the directory's by default.

    Raises
    ------
    KeyError
        If a name is not among the directory's datasets.
    """
    known = problem_names(directory)
    chosen = known if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise KeyError(f"no dataset {name!r}; there are {', '.join(known)}")
    return [read_problem(directory / f"{name}.dat") for name in chosen]


def read_problem(path: Path) -> Problem:
    """Read one StRD file.

    Raises
    ------
    DataFileError
        If a part is missing or a stated count differs from what is there.
    """
    lines = path.read_text(encoding="ascii").splitlines()
    text = "\n".join(lines)

    def find(pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, text, re.MULTILINE)
        if match is None:
            raise DataFileError(f"{path.name}: nothing matches {pattern!r}")
        return match.groups()

    def section(title: str) -> list[str]:
        first, last = (int(n) for n in find(rf"{title} +\(lines +(\d+) +to +(\d+)\)"))
        if not 1 <= first <= last <= len(lines):
            raise DataFileError(
                f"{path.name}: {title} is said to be in lines {first} to {last} "
                f"of a file of {len(lines)} lines"
            )
        return lines[first - 1 : last]

    (name,) = find(r"^Dataset Name: +(\w+)")
    difficulty = find(r"(\w+) Level of Difficulty")[0].lower()
    if difficulty not in _DIFFICULTIES:
        raise DataFileError(f"{path.name}: unknown level of difficulty {difficulty!r}")

    n_parameters = int(find(r"(\d+) Parameters")[0])
    rows, corrections = _parameters(name, section("Starting Values"))
    if rows.shape != (n_parameters, 4):
        raise DataFileError(
            f"{path.name}: {n_parameters} parameters are announced, the table has {len(rows)}"
        )

    n_observations = int(find(r"Number of Observations: +(\d+)")[0])
    fields = [line.split() for line in section("Data")]
    try:
        pairs = np.array(fields, dtype=np.float64)
    except ValueError as error:
        raise DataFileError(f"{path.name}: a data line is not two numbers") from error
    if pairs.shape != (n_observations, 2):
        raise DataFileError(
            f"{path.name}: {n_observations} observations (y, x) are announced, "
            f"the table has shape {pairs.shape}"
        )

    return Problem(
        name=name,
        difficulty=difficulty,
        x=pairs[:, 1].copy(),
        y=pairs[:, 0].copy(),
        starts=rows[:, :2].T.copy(),
        certified=rows[:, 2].copy(),
        deviations=rows[:, 3].copy(),
        rss=float(find(r"Residual Sum of Squares: +(\S+)")[0]),
        corrections=corrections,
    )


def _parameters(name: str, lines: list[str]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Read the lines ``b1 = start1 start2 certified deviation``; shape (p, 4)."""
    rows: list[list[float]] = []
    corrections: list[str] = []
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(rf"\s*b{number} += +(\S+) +(\S+) +(\S+) +(\S+)\s*", line)
        if match is None:
            raise DataFileError(f"{name}: no line for parameter b{number}, but {line!r}")
        row = [float(field) for field in match.groups()]
        wrong, right = _ERRATA.get((name, number), ("", 0.0))
        if match[3] == wrong:
            row[2] = right
            corrections.append(
                f"{name}: the file gives b{number} = {wrong} as certified, "
                f"which contradicts its own residual sum of squares; {right:.10E} is used"
            )
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, 4), tuple(corrections)
