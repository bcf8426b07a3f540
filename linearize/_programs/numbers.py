"""The numbers of one point: the tensors of the constants of its programs.

A program does not hold them, so that points with the same structure share it. While programs
are made of each other their `Numbers` are at hand; afterwards each keeps what it needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._text.labels import joined
from .origins import Here, Literal, Origin
from .residuals import Residual
from .values import Constant, frozen

#: What was made in more steps is not found again: to hold them all would take as much memory as
#: the graph did.
_DEEPEST = 64


class Pool(weakref.WeakValueDictionary[Any, Any]):
    """What was computed for one point, as long as some program keeps it.

    The two directions compute constants, each when it needs them. What one has computed and
    still keeps need not be computed and kept by the other too. By operation and arguments there
    are the constants that were made, by constants their residuals, by other keys what passes
    look for in other ways. A key keeps the arguments alive.
    """


class Numbers:
    """The tensors of constants, while programs are made that read them.

    Parameters
    ----------
    pool
        What is known of the point; by default nothing, and nobody else is told.
    """

    __slots__ = ("_held", "pool")

    def __init__(self, pool: Pool | None = None) -> None:
        self.pool = Pool() if pool is None else pool
        self._held: dict[Constant, Residual] = {}

    def __len__(self) -> int:
        return len(self._held)

    def put(self, constants: Iterable[Constant], residuals: Iterable[Residual]) -> None:
        """Take in the residuals of some constants."""
        self._held.update(zip(constants, residuals, strict=True))

    def keep(self, constants: Iterable[Constant]) -> None:
        """Let go of all but the residuals of some constants."""
        self._held = {c: self._held[c] for c in constants if c in self._held}

    def residual(self, c: Constant) -> Residual:
        """Return the residual of a constant."""
        if c not in self._held and isinstance(c.origin, Literal):
            self._held[c] = Residual(c.origin.tensor, c.source)
        return self._held[c]

    def found(self, c: Constant) -> bool:
        """Whether somebody still keeps the tensor of a constant, unchanged; it is here then."""
        known: Residual | None = self._held.get(c) or self.pool.get(c)
        if known is None or known.changed():
            return False
        self._held[c] = known
        return True

    def residuals(self, constants: Iterable[Constant]) -> list[Residual]:
        """Return the residuals of some constants."""
        return [self.residual(c) for c in constants]

    def __getitem__(self, c: Constant) -> torch.Tensor:
        return self.residual(c).tensor

    def filled(self, tree: Any) -> Any:
        """Return nested arguments with tensors in place of constants."""
        return map_leaves(lambda x: self[x] if isinstance(x, Constant) else x, tree)

    def constant(
        self, tensor: torch.Tensor, source: str = "", origin: Origin | None = None
    ) -> Constant:
        """Make a constant of a tensor, with its origin if that is known."""
        made = Constant(TensorSpec.of(tensor), origin or Here(), source)
        self._held[made] = Residual(tensor, source)
        return made

    def evaluated(
        self,
        op: Callable[..., Any],
        *args: Any,
        source: str,
        folded: bool = False,
        **kwargs: Any,
    ) -> Constant:
        """Apply an operation with one result, a tensor, to constants now.

        The arguments may contain `Constant` leaves. The result knows how it came about; what was
        computed in the same way before is taken as long as somebody keeps it.
        """
        used = [x for x in leaves((args, kwargs)) if isinstance(x, Constant)]
        label = joined(source, [x.source for x in used])
        key = label, frozen(op, args, kwargs)
        made: Constant | None = self.pool.get(key)
        if made is not None and self.found(made):
            return made
        tensor = op(*self.filled(args), **self.filled(kwargs))
        if made is None:  # else the same constant again: what was made of it is still found
            origin = Origin(op, map_leaves(_origin_of, args), map_leaves(_origin_of, kwargs))
            made = Constant(TensorSpec.of(tensor), origin, label, folded=folded)
            depth = 1 + max([x.depth for x in used], default=0)
            if depth <= _DEEPEST:
                made.depth = depth
                self.pool[key] = made
        self._held[made] = self.pool[made] = Residual(tensor, label)
        return made

    def viewed(self, view: Callable[..., Any], c: Constant, *args: Any) -> Constant:
        """Return a constant that is a view of another, with the version that the other has."""
        made = self.evaluated(view, c, *args, source=c.source, folded=c.folded)
        self._held[made].part_of(self.residual(c))
        return made


def _origin_of(x: Any) -> Any:
    return x.origin if isinstance(x, Constant) else x
