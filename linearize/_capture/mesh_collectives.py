"""Collectives that operations on DTensors run, as those of f.

The backward of such an operation is recorded with this rank's parts, and what it communicates
with them. That is no node of f's graph, and the same at all points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._spaces.space import TensorSpec
from .._torch.ranks import group_of
from .._torch.sharded import exchanged_dims
from ..errors import UnsupportedError
from .collectives import (
    Collective,
    CollectiveNode,
    Pair,
    all_reducing,
    gathering_whole,
    scattering_whole,
    summed,
)


class MeshCollective(CollectiveNode):
    """A collective of the backward of an operation on DTensors, callable in both directions.

    It is no node of a graph, and the same at all points. What f itself does on DTensors is its
    transpose.

    Attributes
    ----------
    factor
        Of an all-reduce that sums what it takes: what it is multiplied by, of others 0.
    """

    def __init__(
        self, kind: str, args: Sequence[Any], takes: TensorSpec, gives: TensorSpec
    ) -> None:
        self.inputs = self.takes = (takes,)
        self.outputs = (gives,)
        self._where = (0,)
        self.factor = 0.0
        more = args[1:]
        self.group = group_of(more[-1])
        self.pair = self._told(kind, more)
        self.names = self.pair.names
        self.settings = tuple([("", repr(value)) for value in more[:-1]])

    def _told(self, kind: str, more: Sequence[Any]) -> Pair:
        group = self.group
        if kind == "all_reduce":
            self.factor = summed(more[0], kind, group)
            return all_reducing(more[0], group)
        if kind == "all_gather_into_tensor":
            return gathering_whole(group)
        if kind == "reduce_scatter_tensor":
            return scattering_whole(more[0], group)
        if kind == "shard_dim_alltoall":
            gathered, cut = more[:2]
            return Pair(
                ("all_to_all", "all_to_all"),
                lambda ts: [exchanged_dims(ts[0], gathered, cut, group)],
                lambda ts: [exchanged_dims(ts[0], cut, gathered, group)],
            )
        raise UnsupportedError(
            f"{kind}: this collective, run by an operation on DTensors, is not supported inside "
            "f; redistribute the tensor before that operation"
        )


class OnMesh(Collective):
    """One direction of such a collective."""

    __slots__ = ()

    def moved(self, counterpart: Callable[[Any], Any]) -> Collective:
        """Return itself: it belongs to no graph."""
        return self


def summed_over_ranks(spec: TensorSpec, group: Any) -> OnMesh:
    """Return the sum over a group, of tensors of one shape and dtype."""
    return OnMesh(MeshCollective("all_reduce", (None, "sum", group), spec, spec), back=False)
