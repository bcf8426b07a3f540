"""The pullbacks of compiled pieces, as AOTAutograd has written them down.

The value of a piece that `torch.compile` made has one graph node. Its class has the pullback as
a graph of ATen operations on what the node saved and on the cotangents. A `Reading` is that graph,
if it can be read: it says the same each time, of nothing else, and in operations that are known.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from ..errors import LinearizeError
from .names import OpOverload, aten


class UnreadableError(LinearizeError):
    """Raised where a pullback cannot be read; says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """The pullback of a compiled piece.

    `key` is what it depends on besides what the node saved; `constants` are tensors that are part
    of it, `operations` how many there are.
    """

    name: str
    key: Hashable
    constants: tuple[torch.Tensor, ...]
    operations: int
    #: Takes sizes, what the node saved, and the cotangents of the outputs at these places.
    _graph: Any
    _takes: tuple[int, ...]
    _strides: tuple[Any, ...]

    def laid_out(self, place: int, t: torch.Tensor) -> torch.Tensor:
        """Return a cotangent with the strides that the graph was made for."""
        like = self._strides[self._takes.index(place)] if place in self._takes else None
        if like is None:
            return t
        if like.memory_format is not None:
            return t.contiguous(memory_format=like.memory_format)
        if t.stride() == tuple(like.stride) or t.shape != tuple(like.size):
            return t
        own = torch.empty_strided(t.shape, like.stride, dtype=t.dtype, device=t.device)
        return own.copy_(t)

    def __call__(
        self, node: Any, grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Return what a node gives for the cotangents of its outputs; None stands for zero."""
        given = [self.laid_out(i, _or_zeros(grads[i], node, i)) for i in self._takes]
        with torch._C._DisableAutocast():
            found = self._graph(*node.symints, *saved_by_piece(node), *given)
        wanted = zip(found, node.needs_input_grad, strict=True)
        results = iter([g for g, needed in wanted if needed])
        return [None if target is None else next(results) for target, _ in node.next_functions]


def _or_zeros(grad: torch.Tensor | None, node: Any, place: int) -> torch.Tensor:
    if grad is not None:
        return grad
    meta = node._input_metadata[place]
    return torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)


#: What was read of each class, or why it could not be.
_READINGS: weakref.WeakKeyDictionary[type, Reading | UnreadableError] = weakref.WeakKeyDictionary()


def is_piece(cls: Any) -> bool:
    """Whether a Function is a piece that AOTAutograd made."""
    return hasattr(cls, "_aot_id") and hasattr(cls, "_lazy_backward_info")


def reading_of(node: Any) -> Reading | None:
    """Return the pullback of a compiled piece's node, None if it cannot be read, or is none."""
    if not isinstance(node, BackwardCFunction):
        return None
    cls: Any = node._forward_cls  # type: ignore[attr-defined]
    if not is_piece(cls):
        return None
    try:
        return read(cls, "a compiled function")
    except UnreadableError:
        return None


def read(cls: Any, name: str) -> Reading:
    """Read the pullback of a class that AOTAutograd made; `UnreadableError` if that cannot be."""
    known = _READINGS.get(cls)
    if known is None:
        try:
            known = _read(cls, name)
        except UnreadableError as error:
            known = error
        except (AttributeError, TypeError, AssertionError) as error:
            known = UnreadableError(f"AOTAutograd has other names in this PyTorch: {error}")
        _READINGS[cls] = known
    if isinstance(known, UnreadableError):
        raise known
    return known


def _read(cls: Any, name: str) -> Reading:
    info, meta = cls._lazy_backward_info, cls.metadata
    if info is None:
        raise UnreadableError("the graph of its pullback is not kept")
    if cls.maybe_subclass_metadata is not None:
        raise UnreadableError("it computes with tensor subclasses")
    if meta.is_rng_op_functionalized or meta.num_graphsafe_rng_states:
        raise UnreadableError("its pullback draws random numbers again")
    if meta.num_backward_tokens or meta.num_opaque_objects_saved_for_bw:
        raise UnreadableError("its pullback has side effects, or reads objects")
    if meta.indices_of_inputs_that_requires_grad_with_mutations_in_bw:
        raise UnreadableError("its pullback writes to its arguments")
    module = info.bw_module if hasattr(info, "bw_module") else info.bw_module_fn()
    graph, constants = _checked(module)
    takes = _taken(cls, meta)
    strides = tuple([m.memory_format for m in meta.subclass_tangent_meta])
    places = sum(n.op == "placeholder" for n in graph.nodes)
    code = sys.intern(f"{name}: {graph.python_code('self').src}")
    # Another graph with the same code has other tensors in it.
    key = (code, takes, repr(strides), places, object() if constants else None)
    called = torch.fx.GraphModule(module, graph)
    operations = sum(n.op == "call_function" for n in graph.nodes)
    return Reading(name, key, constants, operations, called, takes, strides)


def _taken(cls: Any, meta: Any) -> tuple[int, ...]:
    """Return the places of the outputs whose cotangents are taken, in the order of the graph."""
    count = meta.num_outputs + meta.num_mutated_inp_runtime_indices + meta.num_intermediate_bases
    # What stands for cotangents here is handed through as it is: it is no tensor.
    return tuple(cls._bw_prologue_fn((), [], [], list(range(count))))


def _checked(module: Any) -> tuple[torch.fx.Graph, tuple[torch.Tensor, ...]]:
    """Return a copy of the graph of a pullback, and the tensors in it."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    constants = []
    for node in list(graph.nodes):
        if node.op == "get_attr":
            t = operator.attrgetter(node.target)(module)
            if type(t) not in (torch.Tensor, torch.nn.Parameter):
                raise UnreadableError(f"its pullback has {type(t).__name__} {node.target} in it")
            constants.append(t)
        elif node.op == "call_function":
            if node.target is aten.copy.default:
                _replace_copy(node)
            else:
                _check(node.target)
        elif node.op not in ("placeholder", "output"):
            raise UnreadableError(f"its pullback calls {node.target}")
    return graph, tuple(constants)


def _replace_copy(node: Any) -> None:
    """Replace a write to all of a tensor by what was written, as it comes out there."""
    target, source = node.args[0].meta["val"], node.args[1].meta["val"]
    if (target.dtype, target.device) != (source.dtype, source.device):
        raise UnreadableError("its pullback casts in a way that is not known")
    with node.graph.inserting_before(node):
        shape = list(node.args[1].meta["val"].shape)
        whole = node.args[1]
        if shape != list(target.shape):
            whole = node.graph.call_function(aten.expand_as.default, (whole, node.args[0]))
        node.replace_all_uses_with(whole)
    node.graph.erase_node(node)


def _check(op: Any) -> None:
    """Raise if a graph that calls something cannot be read."""
    if not isinstance(op, OpOverload):
        module = getattr(op, "__module__", None)
        if module not in ("_operator", "math") and not _is_symbolic(op):
            raise UnreadableError(f"its pullback calls {getattr(op, '__name__', op)}")
        return
    if (
        op.namespace != "aten"
        or op._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in op.tags
    ):
        raise UnreadableError(f"its pullback calls {op}")


def _is_symbolic(op: Any) -> bool:
    """Whether a function computes with sizes."""
    name = getattr(op, "__name__", "")
    return name.startswith("sym_") and getattr(torch, name, None) is op


#: By the attributes of a piece's node that are saved tensors: where these lie as they were packed.
SAVED_BY_PIECES = {
    "saved_tensors": "_raw_saved_tensors",
    "_tensors_no_vc_check": "_tensors_no_vc_check",
}


def saved_by_piece(node: Any) -> list[torch.Tensor]:
    """Return the tensors that a compiled piece's node saved; `RuntimeError` if one was changed."""
    return [*node.saved_tensors, *node._tensors_no_vc_check]


def named_by_piece(node: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield the same, each with the attribute of the node and the place in it."""
    for name in SAVED_BY_PIECES:
        for i, t in enumerate(getattr(node, name)):
            yield name, i, t
