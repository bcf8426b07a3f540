"""Calling PyTorch's own nodes, with words for what goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from .._torch.graphs import Node
from ..errors import LinearizeError, StalenessError, UnsupportedError
from .node_formulas import mended

T = TypeVar("T")


class NotRecordedError(UnsupportedError):
    """A node was not written down, but PyTorch's engine may serve it."""


class SpreadError(LinearizeError):
    """A gradient between nodes is no dense tensor: these belong to one part.

    Attributes
    ----------
    nodes
        What must not be taken apart.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        super().__init__()
        self.nodes = frozenset(nodes)


def called(
    node: Node, grads: list[torch.Tensor | None], label: str
) -> Sequence[torch.Tensor | None]:
    """Call a built-in node.

    Raises
    ------
    UnsupportedError
        If it has no derivative.
    """
    if "NotImplemented" in label:
        raise UnsupportedError(
            f"{label}: this operation has no derivative registered (for a torch.library "
            "operator, call register_autograd)"
        )
    return unpacked(label, lambda: mended(node)(grads))


def unpacked(
    label: str, do: Callable[[], T], refused: type[UnsupportedError] = NotRecordedError
) -> T:
    """Do something that unpacks what a graph has saved; an error says what it concerns.

    A `StalenessError` if that was changed in place, `refused` if PyTorch cannot do it.
    """
    try:
        return do()
    except LinearizeError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "modified by an inplace operation" in text or "modified in-place" in text:
            raise StalenessError(
                f"{label}: a tensor that it needs was changed in place, inside f after it "
                f"was used or since the linearization ({_what_changed(text)}); linearize anew "
                "with at(...), or change a copy"
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if "Sparse" in text:
            raise refused(
                f"{label}: a sparse tensor that depends on the primals is not supported (a "
                "constant one is); compute with its values by index_select and index_add, or "
                "put the operation into a custom Function"
            ) from error
        # PyTorch goes on with a table of all backends.
        raise refused(
            f"{label}: PyTorch cannot apply its derivative: {text.partition(chr(10))[0]}"
        ) from error


def as_it_is(
    node: Node, numbers: Sequence[torch.Tensor | None], error: NotRecordedError, *, helped: bool
) -> str:
    """Call a node that cannot be recorded; return why it cannot, if it can be called.

    Raises
    ------
    SpreadError
        If it returns something that is not dense.
    NotRecordedError
        If it cannot be called, or not be `helped`.
    """
    if not helped:
        raise error
    try:
        result = mended(node)([None if t is None else t.clone() for t in numbers])
    except RuntimeError:
        raise error from error.__cause__
    check_dense([node], node.next_functions, result)
    return str(error)


def check_dense(
    nodes: Sequence[Node],
    edges: Iterable[tuple[Node | None, int]],
    result: Sequence[torch.Tensor | None],
) -> None:
    """Raise if nodes and those that they hand something on to must not be taken apart."""
    sparse = [
        target
        for (target, _), g in zip(edges, result, strict=False)
        if g is not None and g.layout != torch.strided and target is not None
    ]
    if sparse:
        raise SpreadError([*nodes, *sparse])


def _what_changed(text: str) -> str:
    """Return what PyTorch's message says of the tensor, without its advice."""
    found = re.search(r"\[[^\]]*\[[\d, ]*\]\].*?version \d+(; expected version \d+)?", text)
    return found.group().replace("; ", ", ") if found else text.partition(chr(10))[0]
