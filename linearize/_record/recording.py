"""What is known of the tensors that are met while a backward pass is recorded.

A `Recording` says which variable of the program each tensor stands for, which constant, and
which tensors lie on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._programs.aten import schema_of
from .._programs.origins import Origin
from .._programs.program import Emitter
from .._programs.residuals import Residual
from .._programs.values import Constant, Var
from .._spaces.nested import leaves
from .._torch.names import OpOverload
from ..errors import LinearizeError
from .by_tensor import ByTensor
from .constants import Constants
from .linearity import linear_by_meaning


class OpaqueError(LinearizeError):
    """Raised inside a recording that meets code which it cannot follow."""


class SparseError(OpaqueError):
    """Raised if that is a sparse tensor made of what is recorded."""


class _Known(NamedTuple):
    """What a tensor stands for: a variable, or None for a constant.

    One that is `mixed` is linear in the cotangents in some places and constant in others.
    """

    var: Var | None
    uninitialized: bool = False
    mixed: bool = False


class Recording:
    """Which variables and constants the tensors stand for that are met."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        self._known: ByTensor[_Known] = ByTensor()
        #: The constants that are read, by their tensors, which they keep alive.
        self._read: dict[Any, tuple[torch.Tensor, Constant]] = {}
        #: How the constants that are met come about.
        self.constants = Constants(emitter)
        #: A comparison of something derived from a cotangent, if one was met.
        self.frozen = ""
        #: The DTensors that nodes saved, by where the memory of their parts begins.
        self.sharded: dict[int, Residual] = {}

    def define(
        self, t: torch.Tensor, var: Var | None, *, uninitialized: bool = False, mixed: bool = False
    ) -> None:
        """Let `t` stand for `var` from now on."""
        self._known[t] = _Known(var, uninitialized, mixed)

    def variable(self, t: Any) -> Var | None:
        """Return the variable that `t` stands for, None for a constant."""
        known = self._known.get(t)
        if known is None:
            return None
        if known.mixed:
            raise OpaqueError("writes a constant into something linear in the cotangent")
        return known.var

    def derived(self, x: Any) -> bool:
        """Whether something is a tensor that stands for a variable."""
        return self.variable(x) is not None

    def argument(self, x: Any) -> Any:
        """Return the variable or constant that an argument stands for; others as they are."""
        if not isinstance(x, torch.Tensor):
            return x
        var = self.variable(x)
        return self.constant(x) if var is None else var

    def constant(self, t: torch.Tensor, origin: Origin | None = None) -> Constant:
        """Return a constant of the program, one for each tensor; its origin may be told."""
        key = id(t), self.constants.witness  # what was met in a call belongs to it
        known = self._read.get(key)
        if known is None:
            origin = origin or self.constants.origin(t)
            known = t, self.emitter.numbers.constant(t, self.emitter.source, origin)
            whole = self.sharded.get(t.untyped_storage().data_ptr()) if self.sharded else None
            if whole is not None:
                self.emitter.numbers.residual(known[1]).part_of(whole)
            self._read[key] = known
        return known[1]

    def some(self, t: torch.Tensor, *, still: bool = False) -> bool:
        """Whether a constant has an entry that is not zero; `still`, if it is to be written to."""
        self.constants.decided_by(t, t if still else None, some=True)
        return bool(t.any())

    def vanishes(self, t: torch.Tensor) -> bool:
        """Whether a result is zero that does not descend from a variable."""
        if self.constants.witness is not None:  # it runs code of users'
            self.constants.decided_by(t, some=True)
        return not bool(t.any())

    def finish(self) -> None:
        """Detach the constants from the graph: call this outside, when nothing more follows."""
        for _, c in self._read.values():
            self.emitter.numbers.residual(c).settle()
        self._read = {}

    def judge(self, func: OpOverload, holds: list[bool], keyword: bool, given: Any) -> None:
        """Note whether a test of linearity says something about other points too."""
        constants = [
            x for x in leaves(given) if isinstance(x, torch.Tensor) and self.variable(x) is None
        ]

        def static() -> bool:
            others = (x for x in constants if x.is_floating_point() or x.is_complex())
            return all(self.constants.static(x) for x in others)

        if not keyword and linear_by_meaning(func, holds, static):
            return
        if self.constants.witness is None:
            self.constants.decided(f"linearity of {schema_of(func).name}")
        for x in constants:  # the same test says the same of the same numbers
            self.constants.decided_by(x)

    def spare_constants(self, targets: Sequence[torch.Tensor]) -> None:
        """Give constants copies of their own before their memory is overwritten."""
        written = {t.untyped_storage().data_ptr() for t in targets}
        for key, (t, c) in list(self._read.items()):
            if t.untyped_storage().data_ptr() in written:
                del self._read[key]
                self.emitter.numbers.residual(c).replace(t.clone())

    def uninitialized(self, t: torch.Tensor) -> bool:
        """Whether nothing was written to `t` yet."""
        known = self._known.get(t)
        return known is not None and known.uninitialized

    def is_mixed(self, t: Any) -> bool:
        """Whether `t` is linear in the cotangents in some places and constant in others."""
        known = self._known.get(t)
        return known is not None and known.mixed

    def initialized(self, t: torch.Tensor) -> None:
        """Note that something is written to `t`, and to what shares its memory."""
        for a in (t, *self.aliases(t)):
            if self.uninitialized(a):
                self.define(a, self._known[a].var)

    def aliases(self, t: torch.Tensor) -> list[torch.Tensor]:
        """Return the other live tensors on the same storage."""
        return [a for a in self._known.sharing([t]) if a is not t and not self._known[a].mixed]
