"""Whether a value depends on the primals, or on the very tensors behind them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .._spaces.space import differentiable
from .._torch.graphs import Node, accumulators, gradient_edge, leaf_variable, let_die_in_turn
from ..errors import IndependenceWarning, UnsupportedError
from .graph import Edge

F = TypeVar("F", bound=Callable[..., Any])

_DERIVATIVE = "_linearize_derivative"


def derivative(f: F) -> F:
    """Mark a function as the derivative of another: it may well be constant."""
    setattr(f, _DERIVATIVE, True)
    return f


def is_derivative(f: Callable[..., Any]) -> bool:
    """Whether a function is marked as a derivative."""
    return hasattr(f, _DERIVATIVE)


def check_not_behind(
    edges: Sequence[Edge | None],
    given: Sequence[Any],
    paths: Sequence[str],
    aliases: Sequence[torch.Tensor],
) -> None:
    """Raise if f reads a primal itself, from a closure or a global, and not its argument.

    The derivative by that primal would be zero. `aliases` are what f was called with in the place
    of the differentiable ones among `given`, the leaves of the primals.
    """
    if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in given):
        return
    seen, variables = _below(edges)
    primals = [(x, f"primal{path}") for x, path in zip(given, paths, strict=True)]
    chosen = [(x, name) for x, name in primals if differentiable(x)]
    for (t, name), node in zip(chosen, accumulators(aliases), strict=True):
        if not t.requires_grad or (node, 0) in seen:
            continue
        behind = id(t) in variables if t.is_leaf else _edge(t) in seen
        if behind:
            raise read_behind(name, t)


def read_behind(name: str, t: torch.Tensor) -> UnsupportedError:
    """Return the error that says so of a tensor of one name."""
    return UnsupportedError(
        f"{name} (a tensor of shape {tuple(t.shape)}): f reads this very tensor from a closure, a "
        "global or a module, and not its argument: the derivative would be zero. Compute with the "
        "argument (for a module: torch.func.functional_call(module, params, inputs)), or give f a "
        "detached copy if it is meant to be constant"
    )


def warn_independent(what: str) -> None:
    """Warn that something depends on no primal."""
    warnings.warn(
        f"{what} depends on no primal: all derivatives are zero. Perhaps f left PyTorch (NumPy, "
        ".item()), detached its argument, ran under no_grad, or reads something else. If it is "
        'meant so: warnings.filterwarnings("ignore", '
        "category=linearize.errors.IndependenceWarning)",
        IndependenceWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """Return how many frames lie between `warn_independent` and code outside of the package."""
    package = __name__.partition(".")[0] + "."
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame, count = frame.f_back, count + 1
    return count


def _edge(t: torch.Tensor) -> Edge:
    edge = gradient_edge(t)
    return edge.node, edge.output_nr


def _below(edges: Sequence[Edge | None]) -> tuple[set[Edge], set[int]]:
    """Return all edges below some, and the identities of the leaf tensors in which they end."""
    seen: set[Edge] = set()
    visited: set[Node] = set()
    variables: set[int] = set()
    todo = [edge for edge in edges if edge is not None]
    while todo:
        edge = todo.pop()
        seen.add(edge)
        node = edge[0]
        if node in visited:
            continue
        visited.add(node)
        variable = leaf_variable(node)
        if variable is not None:
            variables.add(id(variable))
        todo += [(child, nr) for child, nr in node.next_functions if child is not None]
    let_die_in_turn(visited)
    return seen, variables
