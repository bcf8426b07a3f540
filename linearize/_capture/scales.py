"""Which numbers of graph nodes do nothing but scale.

Of these a derivative depends as it does on the numbers in tensors: they are no part of the
structure. All other numbers are: exponents, bounds, numbers that decide a shape or a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .._programs.origins import Number
from .._torch.graphs import Node, unpacked
from .._torch.names import is_wrapped_number

#: For each attribute of a kind of node, the arguments of the node whose gradients it scales.
Scaling: TypeAlias = Mapping[str, tuple[int, ...]]

_PRODUCT: Scaling = {"_saved_alpha": (1, 2), "_saved_beta": (0,)}
_SCALING: dict[str, Scaling] = {
    "MulBackward0": {"_saved_other": (0,), "_saved_self": (1,)},
    "MulBackward1": {"_saved_other": (0,)},
    "DivBackward0": {"_saved_other": (0,), "_saved_self": (1,)},
    "DivBackward1": {"_saved_other": (0,)},
    "AddBackward0": {"_saved_alpha": (1,)},
    "SubBackward0": {"_saved_alpha": (1,)},
    "RsubBackward0": {"_saved_alpha": (0,)},
    "RsubBackward1": {"_saved_alpha": (0,)},
    "AddbmmBackward0": _PRODUCT,
    "AddmmBackward0": _PRODUCT,
    "AddmvBackward0": _PRODUCT,
    "AddrBackward0": _PRODUCT,
    "BaddbmmBackward0": _PRODUCT,
    "AddcdivBackward0": {"_saved_value": (1, 2)},
    "AddcmulBackward0": {"_saved_value": (1, 2)},
    "LeakyReluBackward0": {"_saved_negative_slope": (0,)},
    "LerpBackward0": {"_saved_weight": (0, 1)},
}
#: Kinds that scale by 1 - the number too.
_WITH_REST = frozenset({"LerpBackward0"})
_NONE: Scaling = {}
_KINDS = frozenset((float, int, complex))


def scaling(kind: type) -> Scaling:
    """Return which attributes of a kind of node may be numbers that only scale."""
    return _SCALING.get(kind.__name__, _NONE)


def scales(
    known: Scaling, wanted: Sequence[bool], read: Callable[[str], Any]
) -> list[tuple[str, Any]]:
    """Return the numbers of a node that only scale, by their attributes, which `read` reads.

    `known` are those that may in nodes of its kind; `wanted` says which arguments have a gradient.
    """
    found = []
    for name, arguments in known.items():
        if any(wanted[i] for i in arguments):
            value = read(name)
            if isinstance(value, torch.Tensor):
                value = value.item() if not value.shape and is_wrapped_number(value) else None
            # PyTorch's formulas leave out a factor of one.
            one = value == 1 and name in _PRODUCT
            if type(value) in _KINDS and not one:
                found.append((name, value))
    return found


def scales_at(node: Node, place: int) -> list[tuple[Number, Any]]:
    """Return the numbers of a built-in node that only scale, with the names of their places."""
    known = scaling(type(node))
    wanted = [target is not None for target, _ in node.next_functions]

    def read(name: str) -> Any:
        raw = f"_raw{name}"  # what a hook has packed may be unpacked once only
        return unpacked(node, name, raw) if hasattr(type(node), raw) else getattr(node, name)

    try:
        found = scales(known, wanted, read) if known else ()
    except RuntimeError:
        return []
    numbers = [(Number(place, name), value) for name, value in found]
    if node.name() in _WITH_REST:
        numbers += [(Number(place, name, rest=True), 1 - value) for name, value in found]
    return numbers
