"""Patterns of sparse Jacobians, for every operator of PyTorch's database.

    python -m conformance.patterns                    # in tools/; all operators
    python -m conformance.patterns --only cross,fft.rfft --samples 3

Each pattern is held against the dense Jacobian. An entry that it lacks is a failure. Patterns
that hold many more are listed, with the operations that were counted as full.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import numpy as np
import torch

import linearize as lz
import linearize.sparse
from linearize.errors import LinearizeError

from .database import Problem, names, problems, seed

#: Entries of a Jacobian up to which it is looked at.
_LARGEST = 200_000
#: Patterns with so many times the entries of the matrix are listed.
_MANY = 1.5


def compared(problem: Problem) -> tuple[int, float, str] | None:
    """Return how many entries a pattern lacks, how many times it has too many, and its story.

    None if there is no Jacobian to compare with.
    """
    seed(1)
    try:
        here = lz.Linearizer(lambda *primals: tuple(problem.run(*primals))).at(*problem.primals)
        J = here.jacobian
        rows, columns = J.shape
        if rows * columns > _LARGEST:
            return None
        entries, matrix = _parts(J)
    except (LinearizeError, RuntimeError, ValueError, TypeError, IndexError):
        return None
    there = int(matrix.sum())
    lacking = int((matrix & ~entries).sum())
    return lacking, int(entries.sum()) / max(there, 1), lz.sparse.explain(J) if lacking else ""


def _parts(J: lz.operators.LinearOperator) -> tuple[np.ndarray, np.ndarray]:
    """Return pattern and matrix, complex numbers as two real ones."""
    found = lz.sparse.pattern(J).toarray()
    for axis, space in enumerate((J.out_space, J.in_space)):
        sizes = [leaf.numel for leaf in space.tensors]
        widths = np.repeat([1 + leaf.dtype.is_complex for leaf in space.tensors], sizes)
        found = np.repeat(found, widths, axis)
    matrix = J.as_real().materialize().numpy(force=True)
    # A factor that is not finite makes NaN of the zeros of unit vectors.
    return found, np.isfinite(matrix) & (matrix != 0)


def main(args: list[str]) -> int:
    """Print a line for each operator that is worth it."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--samples", type=int, default=3)
    options.add_argument("--only", default="")
    options.add_argument("--dtypes", default="float64,complex128")
    given = options.parse_args(args)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    looked_at = lacking = 0
    for dtype in (getattr(torch, name) for name in given.dtypes.split(",")):
        for name in given.only.split(",") if given.only else names(dtype):
            try:
                found = [compared(p) for p in problems(name, dtype, given.samples)]
            except (LookupError, RuntimeError, ValueError, TypeError, AssertionError):
                continue  # no samples of this dtype
            found = [x for x in found if x is not None]
            looked_at += len(found)
            lacks, many = sum(x[0] for x in found), max((x[1] for x in found), default=0)
            lacking += lacks
            if lacks or many > _MANY:
                told = "".join(f"\n{x[2]}" for x in found if x[2])
                print(f"{name} {dtype}: {lacks} lacking, {many:.1f} times{told}", flush=True)
    print(f"{looked_at} Jacobians, {lacking} entries lacking")
    return 1 if lacking or not looked_at else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
