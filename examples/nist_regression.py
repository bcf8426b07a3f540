"""Fit the NIST StRD nonlinear regression problems; the model runs once per point.

Run it with ``make demo``, or ``python examples/nist_regression.py --help``. It fits every problem
in ``examples/data/nist`` from both starting points, prints what that took and how many digits of
the certified parameters came out, and saves a plot of the fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from nist.data import load, problem_names
from nist.fit import Fit, fit
from nist.plot import save_plot
from nist.report import summary, table
from tqdm import tqdm

DEFAULT_PLOT = Path(__file__).resolve().parent / "out" / "nist_fits.png"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--problems",
        nargs="+",
        metavar="NAME",
        choices=problem_names(),
        help=f"fit only these (all by default): {', '.join(problem_names())}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_PLOT,
        metavar="PNG",
        help="where the plot goes (default: out/nist_fits.png beside this script)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar and no table, only the summary"
    )
    return parser.parse_args(arguments)


def run(names: Sequence[str] | None, quiet: bool) -> list[Fit]:
    """Fit the named problems from both starts, with a progress bar unless quiet."""
    tasks = [(problem, start) for problem in load(names) for start in (1, 2)]
    fits = []
    with tqdm(tasks, unit="fit", disable=quiet, leave=False) as bar:
        for problem, start in bar:
            bar.set_description(f"{problem.name:8s} from start {start}")
            fits.append(fit(problem, start))
    return fits


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, report, plot; return 1 if a model ran more or less than once at a point."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the problems are tiny
    fits = run(options.problems, options.quiet)
    if not options.quiet:
        print(table(fits), end="\n\n")
    print(summary(fits))
    save_plot(fits, options.out)
    print(f"Plot: {options.out}")

    wrong = [fit for fit in fits if fit.counts.runs != fit.points]
    for bad in wrong:
        print(
            f"{bad.problem.name} from start {bad.start}: the model ran {bad.counts.runs} times "
            f"at {bad.points} distinct points",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
