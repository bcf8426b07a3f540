"""The constants of linear programs.

A `Residual` is a tensor kept from the forward run, or computed of such ones, which knows how it
came about and whether it was changed since.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._text.labels import joined
from ..errors import StalenessError
from .origins import Literal, Origin
from .recipes import Recipe, recipe


class Residual:
    """A tensor kept from the forward run, with the version that it had then.

    Both directions share one `Residual` for one tensor.

    Attributes
    ----------
    origin
        How it is computed from what the graph saved; None if that is not known.
    """

    __slots__ = (
        "__weakref__",
        "_hollow",
        "_recipe",
        "origin",
        "size",
        "source",
        "tensor",
        "version",
    )

    def __init__(
        self, tensor: torch.Tensor, source: str = "", origin: Origin | None = None
    ) -> None:
        self.tensor = tensor
        self.source = source
        self.origin = origin
        self.version = None if tensor.is_inference() else tensor._version
        self.size = _storage_bytes(tensor)
        self._recipe: Recipe | None = None
        self._hollow: Residual | None = None

    @property
    def recipe(self) -> Recipe:
        """How it was computed from other residuals; of its own if it was not."""
        if self._recipe is None:
            self._recipe = Recipe()
        return self._recipe

    def blank(self) -> Residual:
        """Return one that stands for the same tensor of any point, and has none itself."""
        r = Residual.__new__(Residual)
        r.source, r.origin = self.source, self.origin
        r.version, r.size = None, 0
        r._recipe = r._hollow = None
        return r

    def without_memory(self) -> Residual:
        """Return one that notices changes in place as this one does, but keeps no numbers."""
        if not _is_plain(self.tensor):
            return self
        if self._hollow is not None:
            return self._hollow
        t = self.tensor.detach()
        hollow = torch.empty((), dtype=t.dtype, device=t.device).expand(t.shape)
        hollow.untyped_storage().resize_(0)
        t.data = hollow  # leaves the tensor its version, which is that of the memory before
        self._hollow = Residual(t, self.source)
        self._hollow.version = self.version
        return self._hollow

    def changed(self) -> bool:
        """Whether the tensor was changed in place."""
        return self.version is not None and self.tensor._version != self.version

    def check(self) -> None:
        """Raise `StalenessError` if the tensor was changed in place."""
        if self.changed():
            raise StalenessError(
                f"a residual {TensorSpec.of(self.tensor)} kept for {self.source or 'a product'} "
                f"was changed in place after the linearization (version {self.version}, now "
                f"{self.tensor._version}); linearize anew with at(...), or change a copy"
            )

    def check_memory(self) -> None:
        """Raise `StalenessError` if the tensor's memory was freed: to read it would crash."""
        if _storage_bytes(self.tensor) != self.size:
            raise StalenessError(
                f"the memory of a residual {TensorSpec.of(self.tensor)} kept for "
                f"{self.source or 'a product'} was freed after the linearization (by a custom "
                "Function?); linearize anew with at(...)"
            )


def first_freed(residuals: Iterable[Residual]) -> Residual | None:
    """Return the first residual whose memory was freed, None if there is none."""
    for r in residuals:  # at each call of user code: as `check_memory`, in one go
        try:
            size = r.tensor.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):
            size = 0
        if size != r.size:
            return r
    return None


def _is_plain(t: torch.Tensor) -> bool:
    return type(t) is torch.Tensor and t.layout == torch.strided and not t.is_inference()


def _storage_bytes(t: torch.Tensor) -> int:
    try:
        return t.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one of torch.func
        return 0


def zero_residual(spec: TensorSpec) -> Residual:
    """Return zeros of a shape, expanded from one zero: they take no memory."""
    t = torch.zeros((), dtype=spec.dtype, device=spec.device).expand(spec.shape)
    return Residual(t, "zeros", Literal(t))


def evaluated(op: Callable[..., Any], *args: Any, source: str, **kwargs: Any) -> Residual:
    """Apply an operation to residuals, now; the result knows how it came about.

    What was computed in the same way before is taken as long as somebody keeps it.

    Parameters
    ----------
    op
        An operation with one result that is a tensor.
    *args, **kwargs
        May contain `Residual` leaves.
    source
        What the result is kept for.
    """
    used = [x for x in leaves((args, kwargs)) if isinstance(x, Residual)]
    label = joined(source, [x.source for x in used])
    given = map_leaves(_recipe_of, args), map_leaves(_recipe_of, kwargs)
    made_by = recipe(op, *given, [x.recipe for x in used], label)
    before: Residual | None = made_by.result() if used else None
    if before is not None and not before.changed():
        return before
    numbers = map_leaves(_tensor_of, args), map_leaves(_tensor_of, kwargs)
    known = all(x.origin is not None for x in used)
    origin = Origin(op, map_leaves(_origin_of, args), map_leaves(_origin_of, kwargs))
    result = Residual(op(*numbers[0], **numbers[1]), label, origin if known else None)
    result._recipe = made_by
    made_by.result = weakref.ref(result)
    return result


def viewed(view: Callable[..., Any], r: Residual, *args: Any) -> Residual:
    """Return a residual that is a view of another, with the version that the other has."""
    made = evaluated(view, r, *args, source=r.source)
    made.version = r.version
    return made


def _tensor_of(x: Any) -> Any:
    return x.tensor if isinstance(x, Residual) else x


def _recipe_of(x: Any) -> Any:
    return x.recipe if isinstance(x, Residual) else x


def _origin_of(x: Any) -> Any:
    return x.origin if isinstance(x, Residual) else x


#: The source of residuals made here.
FOLDED = "folded diagonals"


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor holds an infinite number or NaN; denied too if a sum overflows.

    One pass over each tensor, and the host waits for the device once.
    """
    sums = [t.sum() for t in tensors]
    groups: dict[Any, list[torch.Tensor]] = {}
    for t in sums:
        groups.setdefault((t.dtype, t.device), []).append(t)
    return all(bool(torch.isfinite(torch.stack(group)).all()) for group in groups.values())
