"""The diagonal of Jᵀ·H·J, one batch's curvature, without its columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._points.jacobian import run
from .._points.product import Product
from .._spaces.flat import units


def diagonal_by_rows(chain: Sequence[Product], chunk: int) -> torch.Tensor:
    """Return it as Σₖ Jₖᵢ·(H·J)ₖᵢ: two pullbacks for each output, none pushed forward."""
    _, inner, back = chain
    space = back._results
    total = space.ravel(None)
    for _, parts in units(inner._arguments, chunk, "outputs"):
        rows = run(back, parts, stacked=True)
        weighed = run(back, run(inner, parts, stacked=True), stacked=True)
        total += (space.join(rows, stacked=True) * space.join(weighed, stacked=True)).sum(0)
    return total


def diagonal_by_columns(chain: Sequence[Product], chunk: int) -> torch.Tensor:
    """Return it as (J·eᵢ)ᵀ·H·(J·eᵢ): one product with J for each parameter, none pulled back."""
    forward, inner, _ = chain
    space = inner._arguments
    found: list[torch.Tensor] = []
    for _, parts in units(forward._arguments, chunk, "columns"):
        images = run(forward, parts, stacked=True)
        weighed = run(inner, images, stacked=True)
        found.append((space.join(images, stacked=True) * space.join(weighed, stacked=True)).sum(1))
    return torch.cat(found)
