"""A module as a function of its parameters, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.func import functional_call

from ..errors import OptionError, StructureError

Reduction = Literal["sum", "mean"]

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "poisson_nll": F.poisson_nll_loss,
}


def as_function(net: torch.nn.Module, params: Any = None) -> tuple[Callable[..., Any], Any]:
    """Return a function of parameters and inputs, and the parameters.

    These may be a dictionary by the names of `net.named_parameters()`, or a sequence of parameters
    that are the module's; None is for all that require grad. Buffers stay as they are.
    """
    names = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if params is None:
        params = names
    if isinstance(params, dict):
        every = dict(net.named_parameters())
        unknown = [name for name in params if name not in every]
        if unknown:
            raise StructureError(
                f"params: {type(net).__name__} has no parameter {unknown[0]!r}; it has "
                f"{', '.join(map(repr, every))}"
            )
        return lambda p, *inputs: functional_call(net, p, inputs), params
    order = _names(net, params)
    return (
        lambda p, *inputs: functional_call(net, dict(zip(order, p, strict=True)), inputs),
        list(params),
    )


def _names(net: torch.nn.Module, params: Any) -> list[str]:
    """Return the names of parameters, known by identity."""
    known = {id(p): name for name, p in net.named_parameters()}
    if not isinstance(params, Iterable) or isinstance(params, (torch.Tensor, str)):
        raise StructureError(
            f"params: expected a dictionary of tensors or a sequence of the parameters of "
            f"{type(net).__name__}, got {type(params).__name__}"
        )
    order = [known.get(id(p), "") for p in params]
    if "" in order:
        raise StructureError(
            f"params: entry {order.index('')} is no parameter of {type(net).__name__}; pass its "
            "own, or a dictionary of tensors by their names"
        )
    return order


def arguments(
    name: str, model: Callable[..., Any], params: Any, loss: Any, batches: Any
) -> tuple[Callable[..., Any], Any, Any, Any, Reduction]:
    """Return model, params, loss, batches and reduction, whichever way they were given."""
    if not isinstance(model, torch.nn.Module):
        return model, params, loss, batches, "sum"
    if isinstance(params, str) or callable(params):  # the parameters were left out
        if batches is not None:
            raise StructureError(
                f"{name}: of a module, expected (net, loss, loader) or (net, params, loss, "
                "loader); got a loss in the place of the parameters, and four arguments"
            )
        params, loss, batches = None, params, loss
    if isinstance(loss, str) or callable(loss):
        loss_function(loss)
    if batches is None or not (isinstance(loss, str) or callable(loss)):
        raise StructureError(
            f"{name}: of a module, expected (net, loss, loader): a loss, by name or as a function "
            f"of outputs and targets, and pairs of inputs and targets; got {type(loss).__name__} "
            f"and {type(batches).__name__}"
        )
    reduces = getattr(loss, "reduction", "mean" if isinstance(loss, str) else "sum")
    how: Reduction = "mean" if reduces == "mean" else "sum"
    return (*as_function(model, params), loss, batches, how)


def loss_function(loss: str | Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a loss that is given as a function or by name."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise OptionError(f"loss must be a function or one of {sorted(LOSSES)}, got {loss!r}")
    return LOSSES[loss]
