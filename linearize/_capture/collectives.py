"""Collectives inside f: linear maps between the ranks, each with its transpose.

What all ranks hand to a collective is one vector, and what all get is another; the map between
the two is linear, and its transpose is a collective too. `CollectiveNode` stands for a call of
`torch.distributed.nn.functional` or of a functional collective in a graph, and `Collective` for
one direction of it in a program. Every rank runs it in every product, be its own argument zero or
its result of no use here: the others wait for it.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from .._programs.program import Operation
from .._spaces.space import TensorSpec
from .._torch.graphs import forward_class, input_metadata
from .._torch.ranks import collective_kind, group_of
from ..errors import UnsupportedError
from .contexts import ContextRecord
from .custom import CustomNode

Tensors: TypeAlias = Sequence[torch.Tensor]
#: From what a rank hands in to what it gets.
Exchange: TypeAlias = Callable[[Tensors], Tensors]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A collective and its transpose: names, and what a rank does with contiguous tensors."""

    names: tuple[str, str]
    forth: Exchange
    back: Exchange

    def turned(self, factor: float = 1.0) -> Pair:
        """Return the transpose, times a number."""
        return Pair(self.names[::-1], _scaled(self.back, factor), _scaled(self.forth, factor))


# -- what is done -----------------------------------------------------------------------------


def _all_reduce(t: torch.Tensor, group: Any) -> torch.Tensor:
    t = t.clone()
    dist.all_reduce(t, group=group)
    return t


def _broadcast(t: torch.Tensor, source: int, group: Any) -> torch.Tensor:
    t = t.clone()
    dist.broadcast(t, source, group=group)
    return t


def _reduce(t: torch.Tensor, target: int, group: Any) -> torch.Tensor:
    t = t.clone()
    dist.reduce(t, target, group=group)
    return t if dist.get_rank() == target else torch.zeros_like(t)


def _all_gather(t: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, t, group=group)
    return parts


def _reduce_scatter(parts: Tensors, group: Any) -> torch.Tensor:
    result = torch.empty_like(parts[0])
    dist.reduce_scatter(result, list(parts), group=group)
    return result


def _gather(t: torch.Tensor, target: int, group: Any) -> list[torch.Tensor]:
    parts = [torch.zeros_like(t) for _ in range(dist.get_world_size(group))]
    dist.gather(t, parts if dist.get_rank() == target else None, target, group=group)
    return parts


def _scatter(parts: Tensors, source: int, group: Any) -> torch.Tensor:
    result = torch.empty_like(parts[0])
    given = list(parts) if dist.get_rank() == source else None
    dist.scatter(result, given, source, group=group)
    return result


def _all_to_all(parts: Tensors, like: Sequence[Sequence[int]], group: Any) -> list[torch.Tensor]:
    """Send a part to each rank; `like` are the shapes of those that come back."""
    sizes = [math.prod(shape) for shape in like]
    flat = torch.cat([p.reshape(-1) for p in parts])
    result = flat.new_empty(sum(sizes))
    dist.all_to_all_single(result, flat, sizes, [p.numel() for p in parts], group=group)
    return [t.reshape(shape) for t, shape in zip(result.split(sizes), like, strict=True)]


# -- what PyTorch calls it --------------------------------------------------------------------


def _summed(op: Any, name: str, group: Any) -> float:
    """Return the factor of a sum or an average."""
    text = str(getattr(op, "op", op)).rpartition(".")[2].lower()
    if text in ("sum", "avg"):
        return 1.0 if text == "sum" else 1.0 / dist.get_world_size(group)
    raise UnsupportedError(
        f"{name}: a reduction by {text} inside f is not supported, as PyTorch's own backward of "
        "it is not its derivative: gather the numbers and reduce them in f, or detach the "
        "argument if nothing depends on it"
    )


def _scaled(exchange: Exchange, factor: float) -> Exchange:
    return exchange if factor == 1 else lambda ts: [t * factor for t in exchange(ts)]


def _pair_all_reduce(ctx: Any, group: Any) -> Pair:
    op = ctx.op if hasattr(ctx, "op") else ctx.reduce_op
    factor = _summed(op, "all_reduce", group)
    both = _scaled(lambda ts: [_all_reduce(ts[0], group)], factor)
    return Pair(("all_reduce", "all_reduce"), both, both)


def _pair_broadcast(ctx: Any, group: Any) -> Pair:
    source = ctx.src
    return Pair(
        ("broadcast", "reduce"),
        lambda ts: [_broadcast(ts[0], source, group)],
        lambda ts: [_reduce(ts[0], source, group)],
    )


def _pair_reduce(ctx: Any, group: Any, factor: float) -> Pair:
    return _pair_broadcast(ctx, group).turned(factor)  # PyTorch calls its target `src` too


def _between_one_and_all(root: int, group: Any) -> Pair:
    return Pair(
        ("scatter", "gather"),
        lambda ts: [_scatter(ts, root, group)],
        lambda ts: _gather(ts[0], root, group),
    )


def _pair_gather(ctx: Any, group: Any) -> Pair:
    return _between_one_and_all(ctx.dst, group).turned()


def _pair_scatter(ctx: Any, group: Any) -> Pair:
    return _between_one_and_all(ctx.src, group)


def _pair_all_gather(ctx: Any, group: Any) -> Pair:
    return Pair(
        ("all_gather", "reduce_scatter"),
        lambda ts: _all_gather(ts[0], group),
        lambda ts: [_reduce_scatter(ts, group)],
    )


def _pair_reduce_scatter(ctx: Any, group: Any, factor: float) -> Pair:
    return _pair_all_gather(ctx, group).turned(factor)


def _pair_gathered_tensor(ctx: Any, group: Any) -> Pair:
    return Pair(
        ("all_gather", "reduce_scatter"),
        lambda ts: [torch.cat(_all_gather(ts[0], group))],
        lambda ts: [_reduce_scatter(_chunks(ts[0], group), group)],
    )


def _pair_scattered_tensor(ctx: Any, group: Any) -> Pair:
    factor = _summed(ctx.reduce_op, "reduce_scatter", group)
    return _pair_gathered_tensor(ctx, group).turned(factor)


def _pair_wait(ctx: Any, group: Any) -> Pair:
    return Pair(("wait", "wait"), lambda ts: [ts[0].clone()], lambda ts: [ts[0].clone()])


def _chunks(t: torch.Tensor, group: Any) -> list[torch.Tensor]:
    return [c.contiguous() for c in t.chunk(dist.get_world_size(group))]


def _pair_all_to_all(takes: Sequence[TensorSpec], gives: Sequence[TensorSpec], group: Any) -> Pair:
    def sized(specs: Sequence[TensorSpec], ts: Tensors, own: Sequence[TensorSpec]) -> Any:
        more = ts[0].shape[len(own[0].shape) :]  # several elements at once stand last
        return [(*s.shape, *more) for s in specs]

    return Pair(
        ("all_to_all", "all_to_all"),
        lambda ts: _all_to_all(ts, sized(gives, ts, takes), group),
        lambda ts: _all_to_all(ts, sized(takes, ts, gives), group),
    )


def _pair_all_to_all_single(ctx: Any, group: Any, takes: TensorSpec, gives: TensorSpec) -> Pair:
    count = dist.get_world_size(group)

    def sizes(given: Any, spec: TensorSpec) -> list[int]:
        return list(given) if given else [spec.shape[0] // count] * count

    swapped = collective_kind(forward_class(ctx)) == "_AlltoAllSingle"  # it keeps them so
    first, second = ctx.input_split_sizes, ctx.output_split_sizes
    sent, received = (second, first) if swapped else (first, second)
    sent, received = sizes(sent, takes), sizes(received, gives)

    def exchanged(t: torch.Tensor, out: list[int], into: list[int]) -> list[torch.Tensor]:
        result = t.new_empty(sum(into), *t.shape[1:])
        dist.all_to_all_single(result, t, into, out, group=group)
        return [result]

    return Pair(
        ("all_to_all", "all_to_all"),
        lambda ts: exchanged(ts[0], sent, received),
        lambda ts: exchanged(ts[0], received, sent),
    )


#: How many arguments stand before the tensors.
_BEFORE = {
    "_AllReduce": 2,
    "_Broadcast": 2,
    "_Reduce": 3,
    "_Gather": 2,
    "_Scatter": 2,
    "_AllGather": 1,
    "_Reduce_Scatter": 3,
    "_AlltoAll": 2,
    "_AlltoAllSingle": 4,
    "_AllGatherBase": 1,
}
_PAIRS: dict[str, Callable[[Any, Any], Pair]] = {
    "_AllReduce": _pair_all_reduce,
    "_Broadcast": _pair_broadcast,
    "_Gather": _pair_gather,
    "_Scatter": _pair_scatter,
    "_AllGather": _pair_all_gather,
    "_AllGatherBase": _pair_gathered_tensor,
    "wait_tensor": _pair_wait,
    "_wrap_tensor_autograd": _pair_wait,
    "all_reduce": _pair_all_reduce,
    "all_gather_into_tensor": _pair_gathered_tensor,
    "reduce_scatter_tensor": _pair_scattered_tensor,
}
#: Those whose reduction their context does not keep, and where among the arguments it is.
_REDUCTIONS = {"_Reduce": (1, _pair_reduce), "_Reduce_Scatter": (0, _pair_reduce_scatter)}


def group_of_context(ctx: Any) -> Any:
    """Return the process group of a collective."""
    return group_of(getattr(ctx, "group_name", None) or getattr(ctx, "group", None))


# -- in graphs and programs -------------------------------------------------------------------


class CollectiveNode:
    """A collective in a graph, callable in both directions.

    Inputs are the tensors that require grad, outputs those that come back, as of a `CustomNode`.
    It keeps nothing of the graph.
    """

    __slots__ = (
        "__weakref__",
        "_where",
        "group",
        "inputs",
        "names",
        "outputs",
        "pair",
        "settings",
        "takes",
    )
    has_jvp = True
    has_backward = True
    takes_batches = False

    def __init__(self, ctx: Any, record: ContextRecord) -> None:
        kind = collective_kind(forward_class(ctx))
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        self.inputs = tuple([TensorSpec.received(input_metadata(node)[nr]) for node, nr in edges])
        self.outputs = tuple(map(TensorSpec.received, input_metadata(ctx)))
        #: All that is handed in, and where the inputs stand in it.
        self.takes = self.inputs[:1]
        self._where: tuple[int, ...] = (0,)
        before = _BEFORE.get(kind)
        if before is not None and record.inputs is not None:
            self.takes = tuple([s for s in record.inputs[before:] if s is not None])
            needs = enumerate(ctx.needs_input_grad)
            self._where = tuple([i - before for i, need in needs if need])
        self.group = group_of_context(ctx)
        self.pair = self._pair(kind, ctx, record)
        self.names = self.pair.names
        self.settings = tuple(
            (name, repr(value))
            for name, value in sorted(vars(ctx).items())
            if name not in ("group", "group_name")
        )

    def _pair(self, kind: str, ctx: Any, record: ContextRecord) -> Pair:
        group = self.group
        if kind in _REDUCTIONS:
            place, make = _REDUCTIONS[kind]
            given = None if record.settings is None else record.settings[place]
            name = kind.strip("_").lower()
            return make(ctx, group, _summed(given, name, group))
        if kind == "_AlltoAll":
            return _pair_all_to_all(self.takes, self.outputs, group)
        if kind in ("_AlltoAllSingle", "all_to_all_single"):
            return _pair_all_to_all_single(ctx, group, self.takes[0], self.outputs[0])
        make_one = _PAIRS.get(kind)
        if make_one is None:
            raise UnsupportedError(
                f"{kind}: this is not supported inside f (if it is of a DTensor, or of a module "
                "that fully_shard was applied to, compute with to_local()); use all_reduce, "
                "all_gather, reduce_scatter, all_to_all, broadcast, reduce, gather or scatter of "
                "torch.distributed.nn.functional, or a custom Function with a jvp and a backward"
            )
        return make_one(ctx, group)

    @property
    def name(self) -> str:
        """Printable name."""
        return self.names[0]

    def know_outputs(self, used: Collection[int]) -> None:
        """Do nothing: all outputs are known."""

    def unpack(self) -> None:
        """Do nothing: nothing is kept."""

    def kept(self) -> Iterable[torch.Tensor]:
        """Return no tensors."""
        return ()

    def signature(self) -> Hashable:
        """Return what of the node, besides its edges, decides what is done."""
        return (self.names, self.group.group_name, self.settings, self.takes, self._where)

    def call(
        self, given: Sequence[torch.Tensor | None], *, back: bool, more: tuple[int, ...] = ()
    ) -> list[torch.Tensor]:
        """Communicate tensors, None being zero: cotangents if this is the way back.

        With `more` there are as many elements at once, which stand in the last dimension.
        """
        _calls.count = calls_so_far() + 1
        specs = self.outputs if back else self.inputs
        tensors = [
            _zeros(s, more) if t is None else t.contiguous()
            for t, s in zip(given, specs, strict=True)
        ]
        with torch.no_grad():
            if back:
                results = self.pair.back(tensors)
                return [results[i] for i in self._where]
            whole = [_zeros(s, more) for s in self.takes]
            for i, t in zip(self._where, tensors, strict=True):
                whole[i] = t
            return list(self.pair.forth(whole))


#: What calls user code or other ranks.
OpaqueNode: TypeAlias = CustomNode | CollectiveNode

_calls = threading.local()


def calls_so_far() -> int:
    """Return how many collectives this thread has begun in products."""
    return int(getattr(_calls, "count", 0))


def _zeros(spec: TensorSpec, more: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros((*spec.shape, *more), dtype=spec.dtype, device=spec.device)


class Collective(Operation):
    """One direction of a collective: what this rank hands in to what it gets."""

    __slots__ = ("back", "name", "node")
    may_alias = False
    communicates = True

    def __init__(self, node: CollectiveNode, *, back: bool, name: str = "") -> None:
        self.node = node
        #: Whether it is the transpose of what f did.
        self.back = back
        self.name = name or node.names[back]

    def turned(self) -> Collective:
        """Return the transpose."""
        return type(self)(self.node, back=not self.back)

    def moved(self, counterpart: Callable[[Any], Any]) -> Collective:
        """Return the same with another node."""
        return Collective(counterpart(self.node), back=self.back, name=self.name)

    def __call__(self, *given: torch.Tensor | None) -> list[torch.Tensor]:
        """Communicate."""
        return self.node.call(given, back=self.back)

    def stacked(self, count: int, given: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Communicate once for several elements, which stand in the first dimension."""
        last = [None if t is None else t.movedim(0, -1) for t in given]
        results = self.node.call(last, back=self.back, more=(count,))
        return [t.movedim(-1, 0) for t in results]

    def answered(self, count: int | None) -> None:
        """Take part, with numbers that show that something failed here."""
        specs = self.node.outputs if self.back else self.node.inputs
        more = () if count is None else (count,)
        given = [_zeros(s, more).fill_(torch.nan) for s in specs]
        self.node.call(given, back=self.back, more=more)
