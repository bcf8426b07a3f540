"""The same products by PyTorch's own means, and by finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .comparing import Tensors, inner
from .database import Problem

#: What PyTorch raises where it has no derivative.
Refusals = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AssertionError)
STEP = 1e-5
#: Relative and absolute tolerance of finite differences.
FINITE = (2e-5, 2e-6)


class Graph:
    """One ordinary run of a sample, with its graph."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.primals = [p.detach().requires_grad_() for p in problem.primals]
        self.value = problem.run(*self.primals)
        self.live = [t.requires_grad for t in self.value]

    def _alive(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [t for t, alive in zip(tensors, self.live, strict=True) if alive]

    def gradient(self, u: Sequence[torch.Tensor]) -> Tensors:
        """Return Jᵀ·u by `torch.autograd.grad`."""
        return torch.autograd.grad(
            self._alive(self.value), self.primals, self._alive(u), True, allow_unused=True
        )

    def twice(self, u: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> Tensors | None:
        """Return J·v by the double-backward trick, None where PyTorch cannot."""
        try:
            dual = [t.clone().requires_grad_() for t in self._alive(u)]
            outer = torch.autograd.grad(
                self._alive(self.value), self.primals, dual, create_graph=True, allow_unused=True
            )
            pairs = [(g, t) for g, t in zip(outer, v, strict=True) if g is not None]
            pairs = [(g, t) for g, t in pairs if g.requires_grad]
            if not pairs:
                return None
            grads, tangents = zip(*pairs, strict=True)
            results = iter(torch.autograd.grad(grads, dual, tangents, allow_unused=True))
        except Refusals:
            return None
        return [next(results) if alive else None for alive in self.live]


def forward(problem: Problem, v: Sequence[torch.Tensor]) -> Tensors | None:
    """Return J·v by native forward-mode AD, None where PyTorch cannot."""
    try:
        run = lambda *primals: tuple(problem.run(*primals))  # noqa: E731
        return torch.func.jvp(run, tuple(problem.primals), tuple(v))[1]
    except Refusals:
        return None


def differences(problem: Problem, v: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return J·v by central differences of fourth order."""

    def at(factor: float) -> list[torch.Tensor]:
        with torch.no_grad():
            pairs = zip(problem.primals, v, strict=True)
            return problem.run(*(p + factor * STEP * t.to(p.dtype) for p, t in pairs))

    return [
        (8 * (a - b) - (c - d)) / (12 * STEP)
        for a, b, c, d in zip(at(1), at(-1), at(2), at(-2), strict=True)
    ]


def differences_confirm(
    problem: Problem,
    u: Sequence[torch.Tensor],
    gradient: Sequence[torch.Tensor],
    limits: tuple[float, float],
) -> bool:
    """Whether finite differences along several directions side with a gradient."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        v = random_like(problem.primals, generator)
        expected, got = inner(u, differences(problem, v)), inner(gradient, v)
        if not abs(expected - got) <= limits[0] * (abs(expected) + abs(got)) + limits[1]:
            return False
    return True


def random_like(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Return normally distributed directions."""
    return [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]
