"""A single matrix product: nothing to gain, so nothing should be lost."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.case import Case, Limit, Problem, numpy, randn


def problem(n: int, dtype: torch.dtype) -> Problem:
    x, w = randn(n, n, dtype=dtype), randn(n, n, dtype=dtype, seed=3)

    def limit() -> Limit:
        turned = w.T
        return Limit(lambda v: v @ w, lambda u: u @ turned)

    def jax() -> Any:
        weight = numpy(w)
        return lambda x: x @ weight, (numpy(x),)

    return Problem(lambda x: x @ w, (x,), limit, jax=jax)


CASES = (Case("one matrix product, n = 16", "small", lambda d: problem(16, d), kind="matmul"),)
