"""Recording with the parts of DTensors that are on this rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .._capture.conversions import check_alike, is_conversion
from .._programs.origins import Origin
from .._programs.residuals import Residual
from .._programs.values import Var
from .._spaces.sharding import Layout
from .._torch.graphs import Node
from .._torch.sharded import copies_taken, is_sharded, local_of
from .node_programs import Gradient
from .recorder import Recorder


def opened(recorder: Recorder, var: Var, layout: Layout, seed: int, factor: float) -> torch.Tensor:
    """Return what a root receives, recorded, where a program is given `var`.

    `layout` is how that lies on the ranks; all copies get random numbers of one seed and factor.
    """
    numbers = var.spec.random(torch.Generator().manual_seed(seed)) * factor
    recorder.recording.define(numbers, var)
    with recorder:
        return layout.given(numbers)


def closed(recorder: Recorder, number: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return what a program gives, recorded, where `number` arrived at a leaf."""
    with recorder:
        part = layout.lying(number)
    check_alike(part, layout.groups, "the gradient of a primal")
    with recorder:
        return layout.scaled(part)


def parts(
    saved: Iterable[tuple[torch.Tensor, Origin | None]], known: dict[int, Residual]
) -> list[tuple[torch.Tensor, Origin | None]]:
    """Return the parts of what a node saved; note what counts their changes in place."""
    found = []
    for t, origin in saved:
        part = local_of(t)
        if part is not t:
            known[part.untyped_storage().data_ptr()] = Residual(t)
        found.append((part, origin))
    return found


def takes_sharded(node: Node, received: Iterable[Gradient]) -> bool:
    """Whether a node takes or gives DTensors.

    Raises
    ------
    UnsupportedError
        If ranks go on with what `to_local` gave, each in another way.
    """
    numbers = [g.tensor for g in received if g.tensor is not None]
    if not is_conversion(node):
        return any(map(is_sharded, numbers))
    for t in numbers:
        check_alike(t, copies_taken(node) or (), "the gradient of what to_local() gave")
    return True
