"""Where the set-up of a Linearizer goes: `python -m benchmarks.stages` writes a table.

A new `Linearizer` on a function whose operations the process has met before, stage by stage, in
runs of f under autograd.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import linearize as lz
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.report import markdown, rewrite
from linearize._reuse.shared import SHARED

PAGE = Path("docs/benchmarks.md")
MARKS = "<!-- stages: begin -->", "<!-- stages: end -->"
SHOWN = (
    "pointwise chain, n = 1,000",
    "MLP 6 x 256, batch 128, w.r.t. parameters",
    "transformer layer 64, 8 x 32, w.r.t. input",
    "Burgers, 50 steps, n = 1,000",
    "bundle adjustment, 5,421 markers",
    "linalg.solve, n = 200",
    "AlexNet, batch 2, w.r.t. input",
)
STAGES = ("at", "record", "first Jᵀ·u", "transpose", "first J·v", "steady both")


def stages(case: Case, rounds: int) -> list[float]:
    """Return the medians of the stages, in runs of f under autograd."""
    problem = case.make(case.dtype)
    leaves = [p.detach().clone().requires_grad_() for p in problem.primals]
    u = lz.Linearizer(problem.f).at(*problem.primals).value

    def timed(*steps: Callable[[], Any]) -> list[float]:
        taken = []
        for step in steps:
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
        return taken

    def once() -> list[float]:
        made: list[lz.Linearization] = []
        SHARED.clear()
        lin = lz.Linearizer(problem.f)

        def both() -> Any:
            return made[0].vjp_fn(u), made[0].jvp_fn(*problem.primals)

        taken = timed(
            lambda: made.append(lin.at(*problem.primals)),
            lambda: made[0].vjp_fn.program,
            lambda: made[0].vjp_fn(u),
            lambda: made[0].jvp_fn.program,
            lambda: made[0].jvp_fn(*problem.primals),
        )
        for _ in range(6):
            both()
        return taken + timed(both)

    once()
    gc.collect()
    gc.freeze()
    try:
        base = statistics.median(timed(lambda: problem.f(*leaves))[0] for _ in range(3 * rounds))
        rows = [once() for _ in range(rounds)]
    finally:
        gc.unfreeze()
    return [statistics.median(column) / base for column in zip(*rows, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [["case", *STAGES]]
    for case in CASES:
        if case.name in SHOWN:
            cells = [f"{x:.2f}" for x in stages(case, given.rounds)]
            rows.append([case.name, *cells])
            print(*rows[-1], sep="  ", flush=True)
    rewrite(PAGE, markdown(rows), *MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
