"""This tree beside another one, in one process: a steady product, and a new point.

    git worktree add ../other REVISION
    python -m benchmarks.trees ../other

Both packages are imported, under the one name one after the other, and take turns on the same
problems. Of each case the ratios of this tree to the other one are shown, medians over the
rounds of processor time: a product in each direction when the best form has taken over, and a new
point of a known structure with two products each way.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, flat, single
from benchmarks.cases import CASES
from benchmarks.measure import MANY_CALLS, SETTLE, clock, interleaved

Work = dict[str, Callable[[], Any]]
PARTS = ("J·v", "Jᵀ·u", "new point")


def _own(name: str) -> bool:
    return name.partition(".")[0] == "linearize"


def package(tree: Path) -> Any:
    """Import the package from a tree, beside those that were imported from others."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _own(name)}
    sys.path.insert(0, str(tree))
    try:
        found = importlib.import_module("linearize")
    finally:
        sys.path.remove(str(tree))
        for name in [name for name in sys.modules if _own(name)]:
            del sys.modules[name]
        sys.modules.update(before)
    if not Path(found.__file__).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"{tree}: there is no package `linearize`")
    return found


def works(lz: Any, case: Case) -> Work:
    """Return what is timed of one tree, settled."""
    problem = case.make(case.dtype)
    lin = lz.Linearizer(problem.f, maxsize=1)
    points = [problem.primals, tuple(p * 1.0 for p in problem.primals)]
    here = lin.at(*points[0])
    v = tuple(torch.randn_like(p) for p in problem.primals)
    u = tuple(torch.randn_like(y) for y in flat(here.value))

    def pushed() -> Any:
        return here.jvp_fn(*v)

    def pulled() -> Any:
        return here.vjp_fn(single(u))

    def new_point() -> None:
        points.reverse()
        lin.clear()
        there = lin.at(*points[0])
        for _ in range(2):
            there.jvp_fn(*v)
            there.vjp_fn(single(u))

    new_point(), new_point()
    for work in (pushed, pulled):
        start, count = clock(), 0
        while count < MANY_CALLS and clock() - start < SETTLE:
            work()
            count += 1
    return dict(zip(PARTS, (pushed, pulled, new_point), strict=True))


def ratios(trees: Sequence[Any], case: Case, rounds: int) -> list[float]:
    """Return the times of the first tree over those of the second, of each part."""
    made = [works(lz, case) for lz in trees]
    found = []
    for part in PARTS:
        gc.collect()
        times = interleaved({str(i): work[part] for i, work in enumerate(made)}, rounds)
        found.append(times["0"] / times["1"])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each case, and the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trees", description=__doc__)
    parser.add_argument("tree", type=Path, help="a checkout of the other revision")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--size", choices=("small", "medium", "large"), action="append")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trees = [package(Path(__file__).parents[1]), package(chosen.tree)]
    rows = []
    print(f"{'case':36}", *(f"{part:>10}" for part in PARTS))
    for case in CASES:
        if chosen.only in case.name and case.size in (chosen.size or ("small", "medium", "large")):
            torch.manual_seed(0)
            rows.append(ratios(trees, case, chosen.rounds))
            print(
                f"{case.name + ', ' + case.size:36}", *(f"{r:10.2f}" for r in rows[-1]), flush=True
            )
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{'median':36}", *(f"{r:10.2f}" for r in medians))


if __name__ == "__main__":
    main()
