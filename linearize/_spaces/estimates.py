"""What random vectors tell of a matrix, with the error that is to be expected."""

from __future__ import annotations

import dataclasses

import torch

from .flat import Parts
from .space import Space


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """A number or vector that was estimated from samples.

    Attributes
    ----------
    value : torch.Tensor
        The mean of the samples.
    error : torch.Tensor
        Its standard error: the value is off by less in two cases of three, by less than twice
        as much in nineteen of twenty.
    samples : int
        How many products it took.
    """

    value: torch.Tensor
    error: torch.Tensor
    samples: int


class Mean:
    """Mean and standard error of samples that come in stacks, without keeping them.

    Notes
    -----
    T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance",
    The American Statistician 37, 1983: the pairwise update.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def add(self, samples: torch.Tensor) -> None:
        """Take in samples, stacked along the first dimension."""
        count, mean = len(samples), samples.mean(0)
        squares = (samples - mean).abs().square().sum(0)
        if self._mean is not None and self._squares is not None:
            total, apart = self._count + count, mean - self._mean
            squares = (
                self._squares + squares + apart.abs().square() * (self._count * count / total)
            )
            mean = self._mean + apart * (count / total)
        self._count, self._mean, self._squares = self._count + count, mean, squares

    def estimate(self) -> Estimate:
        """Return what was found."""
        assert self._mean is not None
        assert self._squares is not None
        variance = self._squares / (self._count - 1)
        return Estimate(self._mean, (variance / self._count).sqrt(), self._count)


def signs(space: Space, count: int, generator: torch.Generator | None) -> Parts:
    """Return that many stacked elements whose entries are 1 or -1, each as likely."""
    source = torch.default_generator if generator is None else generator
    return [
        torch.randint(2, (count, *leaf.shape), generator=source)
        .mul_(2)
        .sub_(1)
        .to(dtype=leaf.dtype, device=leaf.device)
        for leaf in space.tensors
    ]
