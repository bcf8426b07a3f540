"""Do the ten jobs of `examples/jobs`, each in every way, and write down what each way took.

    python examples/ten_jobs.py --docs docs/jobs.md

Ways whose packages (curvlinops, lineax with JAX) are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gallery import table
from jobs.job import Row, measured
from jobs.notebook import session
from threadpoolctl import threadpool_limits

#: The eighth job, sparse Jacobians, has two parts.
NAMES = (
    "c_library",
    "calibration",
    "cnn_curvature",
    "ggn_diagonal",
    "equilibrium",
    "mri",
    "optimizers",
    "stiff",
    "power_flow",
    "kernel",
)
NOTEBOOK = "notebook"
BEGIN, END = "<!-- begin jobs -->", "<!-- end jobs -->"
HEADER = ("way", "lines", "runs of f", "first, s", "again, s", "error")


def rows(name: str, quick: bool) -> list[Row]:
    """Return what each way of a job took."""
    job = importlib.import_module(f"jobs.{name}").JOB
    problem = job.make(quick)
    return [measured(job, problem, way) for way in job.ways]


def cells(row: Row) -> list[str]:
    """Return one line of the table."""
    if row.missing:
        return [row.way, str(row.lines), f"needs {row.missing}", "", "", ""]
    runs = str(row.runs) if row.runs else "–"
    wrong = "" if row.right else " (wrong)"
    return [
        row.way,
        str(row.lines),
        runs,
        f"{row.first:.2f}",
        f"{row.again:.3f}",
        f"{row.error:.0e}{wrong}",
    ]


def section(name: str, found: Sequence[Row]) -> str:
    """Return the part of the page about a job."""
    module = importlib.import_module(f"jobs.{name}")
    job = module.JOB
    lines = [f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER))]
    lines += [f"| {' | '.join(cells(row))} |" for row in found if not row.missing]
    lines += [f"| {way} | | {why} | | | |" for way, why in job.refused.items()]
    ours = next(iter(job.ways.values())).__name__
    code = f"```{{literalinclude}} ../examples/jobs/{name}.py\n:pyobject: {ours}\n```"
    return "\n\n".join(
        (f"## {job.title}", _below_title(module, job.title), code, "\n".join(lines))
    )


def _below_title(module: Any, title: str) -> str:
    """Return the text of a module; what its first sentence says beyond the title."""
    text: str = module.__doc__.strip().removeprefix(title).lstrip(".,: \n")
    return text[:1].upper() + text[1:]


def notebook() -> str:
    """Return the part of the page about the notebook."""
    module = importlib.import_module(f"jobs.{NOTEBOOK}")
    parts = ["## A notebook", _below_title(module, "A notebook")]
    for number, cell in enumerate(session({"__name__": "__main__"}), 1):
        shown = "" if cell.value is None else f"\n\n{cell.value}"
        parts.append(f"```text\n[{number}] {_hanging(cell.code)}{shown}\n```")
    return "\n\n".join(parts)


def setting(quick: bool) -> str:
    """Return what the numbers depend on."""
    sizes = "the small problems of the tests (`--quick`)" if quick else "problems of full size"
    return f"The numbers are for {sizes}, with PyTorch {torch.__version__} in one thread."


def _hanging(code: str) -> str:
    return code.replace("\n", "\n    ").replace("\n    \n", "\n\n")


def write(page: Path, parts: Sequence[str]) -> None:
    """Write the generated part of the page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text("\n\n".join((head + BEGIN, *parts, END + tail)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all jobs; return 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small versions, in seconds")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the page")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.simplefilter("ignore")
    parts, right = [setting(given.quick)], True
    for name in given.only:
        found = rows(name, given.quick)
        right = right and all(row.right for row in found)
        parts.append(section(name, found))
        print(f"\n{name}\n{table(HEADER, [cells(row) for row in found])}", flush=True)
    parts.append(notebook())
    if given.docs is not None:
        write(given.docs, parts)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
