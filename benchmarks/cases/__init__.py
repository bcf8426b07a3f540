"""What is measured, one family of cases for each module."""

from __future__ import annotations

from benchmarks.case import Case

from . import (
    alexnet,
    bundle,
    burgers,
    chain,
    convnet,
    curvature,
    matmul,
    mlp,
    opaque,
    solve,
    transformer,
)

CASES: tuple[Case, ...] = tuple(
    sorted(
        (
            *chain.CASES,
            *matmul.CASES,
            *mlp.CASES,
            *transformer.CASES,
            *convnet.CASES,
            *burgers.CASES,
            *solve.CASES,
            *opaque.CASES,
            *bundle.CASES,
            *curvature.CASES,
            *alexnet.CASES,
        ),
        key=lambda case: ("small", "medium", "large").index(case.size),
    )
)
