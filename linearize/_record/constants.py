"""How the constants met while recording come about.

Everything that a graph node computes without touching a cotangent is a constant of this
point. `Constants` is told of each such operation and remembers, for each tensor that is
alive, its `Origin`: what was done, down to what the node saved. Where that cannot be told,
or where the numbers of a constant decided something, the recording holds at this point only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from .._programs.aten import (
    CONSTANT,
    READS_NUMBERS,
    UNINITIALIZED,
    at_random,
    functional_variant,
    schema_of,
    unrepeatable,
)
from .._programs.origins import Literal, Number, Origin, Zeros, filled, results
from .._programs.program import Emitter
from .._programs.values import Constant
from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten, has_memory
from .by_tensor import ByTensor
from .scales import Scales
from .storage import covers_storage, geometry
from .witness import Witness


class Constants:
    """Origins of the constants of one recording.

    `fixed` of the emitter is set where the recording is found to hold at this point only.
    """

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._saved: dict[Hashable, Origin | None] = {}
        self._lasting: dict[Hashable, Origin] = {}
        #: The numbers of the node that only scale, with their marks.
        self.scales = Scales()
        #: What watches a call that does not show all that it does.
        self.witness: Witness | None = None
        self._known: ByTensor[Origin | None] = ByTensor()

    def at_node(
        self,
        saved: Iterable[tuple[torch.Tensor, Origin | None]],
        numbers: Iterable[tuple[Number, Any]] = (),
    ) -> None:
        """Begin a graph node, with the tensors that it saved and the numbers that only scale.

        Nothing constant passes from node to node: what was known of others is forgotten, so
        that a tensor that two nodes saved is told apart.
        """
        self._known = ByTensor()
        self.scales = Scales(numbers)
        self.witness = None
        self._saved = dict(self._lasting)
        for t, origin in saved:
            self._saved.setdefault(_place(t), origin)

    def given(self, constants: Iterable[Constant]) -> None:
        """Make constants known that the recorded code uses."""
        for c in constants:
            self._lasting.setdefault(_place(self._emitter.numbers[c]), c.origin)
        self._saved = dict(self._lasting)

    def decided(self, what: str) -> None:
        """Note that numbers decided something about the recording."""
        self._emitter.fixed = self._emitter.fixed or what

    def decided_by(
        self, t: torch.Tensor, before: torch.Tensor | None = None, *, some: bool = False
    ) -> None:
        """Note that the numbers of a constant decided something about the recording.

        Or what it held `before` it was overwritten. Of `some` nothing mattered but that there are
        some which are not zero.
        """
        if self.static(t) or (
            self.witness is not None and self.witness.relies(t, before, some=some)
        ):
            return
        self.decided(f"the numbers in a tensor of {self._emitter.source}")

    def static(self, t: torch.Tensor) -> bool:
        """Whether a constant is the same at every point."""
        origin = self.origin(t)
        return origin is not None and origin.static

    def masking(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note which constants are zeros that stand where a mask leaves out a variable.

        The transpose relies on that. Other zeros are numbers like any other.
        """
        witness = self.witness
        if witness is None:
            return
        for t in tensors:
            if t.dtype == torch.bool or self.static(t) or bool(t.any()):
                continue
            if witness.relies(t, some=True):
                self._known[t] = Zeros(TensorSpec.of(t))

    def origin(self, t: torch.Tensor) -> Origin | None:
        """Return how a constant came about, None if that is not known."""
        known = self._known.get(t)
        if self.witness is not None and not (known is not None and known.static):
            return self.witness.origin(t)
        if t in self._known:
            return known
        place = _place(t)
        if place not in self._saved and t.dim() == 0 and t.device.type == "cpu":
            # A number of the node's, which PyTorch wraps without telling.
            self.scales.spoil()
            return Literal(t.detach().clone())
        return self._saved.get(place)

    def seen(self, func: OpOverload, args: Any, kwargs: Any) -> Callable[[Any], None]:
        """Look at an operation before it runs; call the result with what it returns."""
        schema = schema_of(func)
        if self.witness is None:
            decided = func in READS_NUMBERS or unrepeatable(func, args)
        else:  # what was read is seen; chance has no part in a method that does the same each time
            decided = self.witness.of_method and at_random(func)
        if decided:
            self.decided(f"{schema.name} in {self._emitter.source}")
        if schema.writes:
            left, targets = self._written(func, args, kwargs), schema.targets(args, kwargs)
            return lambda out: self.overwritten(targets, left)
        if func in CONSTANT:
            return lambda out: self._define(out, _filled_like(schema.name, args, out))
        if func in UNINITIALIZED:
            watched = self.witness is not None  # it may be filled out of sight
            return lambda out: self._define(out, None if watched else filled(out.shape, 0, out))
        origin = self._computed(func, args, kwargs)
        return lambda out: self._define(out, origin)

    def _computed(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Origin | None:
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(self.origin(t) is None for t in tensors):
            return None
        return Origin(func, map_leaves(self._leaf, args), map_leaves(self._leaf, kwargs))

    def _leaf(self, x: Any) -> Any:
        return self.origin(x) if isinstance(x, torch.Tensor) else x

    def _written(self, func: OpOverload, args: Any, kwargs: Any) -> Origin | None:
        """Return the origin of what an operation leaves in its first argument."""
        schema, target = schema_of(func), args[0] if args else None
        if schema.name == "zero_" and isinstance(target, torch.Tensor):
            return filled(target.shape, 0, target)
        if schema.name == "copy_":  # whatever was there before
            return self.origin(args[1])
        variant = functional_variant(func)
        if variant is None or len(schema.writes) != 1:
            return None
        return self._computed(variant, args, schema.without_out(kwargs))

    def overwritten(self, targets: list[torch.Tensor], origin: Origin | None) -> None:
        """Tell what the targets, and all that shares their memory, hold after a write."""
        (written, *others) = targets
        exact = None if origin is None or others else _as(written, origin)
        sharing = self._known.sharing(targets)
        whole = next(
            (
                (a, known)
                for a in sharing
                if (known := self.origin(a)) is not None and a is not written and _covers(a)
            ),
            None,
        )
        flat = None if exact is None or whole is None else _scattered(*whole, written, exact)
        for a in sharing:
            same = flat is not None and a.dtype == written.dtype and not _lazy(a)
            now = Origin(aten.as_strided.default, (flat, *geometry(a))) if same else None
            self._known[a] = now
        for t in targets:
            self._known[t] = exact

    def _define(self, out: Any, origin: Origin | None) -> None:
        if isinstance(out, torch.Tensor):
            self._known[out] = origin
        elif isinstance(out, (tuple, list)):
            parts = [None] * len(out) if origin is None else results(origin, len(out))
            for t, part in zip(out, parts, strict=True):
                self._define(t, part)


def _as(t: torch.Tensor, origin: Origin) -> Origin:
    """Return the origin of a value cast and broadcast into `t`."""
    cast = Origin(aten._to_copy.default, (origin,), {"dtype": t.dtype, "device": t.device})
    whole = Origin(aten.expand.default, (cast, list(t.shape)))
    return Origin(aten.clone.default, (whole,), {"memory_format": torch.contiguous_format})


def _lazy(t: torch.Tensor) -> bool:
    return t.is_conj() or t.is_neg()


def _covers(t: torch.Tensor) -> bool:
    """Whether a tensor is its whole storage, in order."""
    return covers_storage(t) and not _lazy(t)


def _scattered(
    whole: torch.Tensor, before: Origin, part: torch.Tensor, now: Origin
) -> Origin | None:
    """Return the origin of a storage as one tensor, after a write to a part of it."""
    if whole.dtype != part.dtype or _lazy(part):
        return None
    dense = Origin(aten.clone.default, (before,), {"memory_format": torch.contiguous_format})
    return Origin(aten.as_strided_scatter.default, (dense, now, *geometry(part)))


def _filled_like(name: str, args: Any, out: torch.Tensor) -> Origin | None:
    """Return the origin of a tensor that only depends on the shape of another."""
    if "rand" in name:
        return None
    if "full" in name:
        return filled(out.shape, args[1] if name == "full_like" else args[2], out)
    return filled(out.shape, 1 if "ones" in name else 0, out)


def _place(t: torch.Tensor) -> Hashable:
    """Return what two tensors share that are the same numbers in the same memory."""
    if t.layout != torch.strided or not has_memory(t):
        return id(t)
    bits = (t.is_conj(), t.is_neg())
    memory = t.untyped_storage().data_ptr(), t.storage_offset()
    return (*memory, t.shape, t.stride(), t.dtype, *bits)
