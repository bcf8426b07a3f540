"""Tensors that are kept for linear programs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .._spaces.space import TensorSpec
from .._torch.modes import unobserved, without_subclass
from .._torch.sharded import is_sharded, local_of
from ..errors import StalenessError


class Residual:
    """A tensor kept from the forward run, or computed of such ones, with its version then.

    Both directions share one `Residual` for one constant of theirs. Of a DTensor it has this
    rank's part; `counter` is what counts the changes, the tensor or that DTensor.
    """

    __slots__ = ("__weakref__", "_hollow", "counter", "size", "source", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, source: str = "") -> None:
        self.tensor = self.counter = tensor
        if is_sharded(tensor):  # what is done to it in place does not count its part's changes
            self.tensor, self.counter = local_of(tensor), tensor.detach()
        self.source = source
        self.version = None if tensor.is_inference() else tensor._version
        self.size = _storage_bytes(self.tensor)
        self._hollow: Residual | None = None

    def settle(self) -> Residual:
        """Have a plain tensor without history, on the same memory; return the residual.

        An unpacked output would hold the graph alive. Not inside a dispatch mode, where an
        alias does not share its version counter.
        """
        if self.tensor.requires_grad or type(self.tensor) is not torch.Tensor:
            alone = self.counter is self.tensor
            self.tensor = without_subclass(self.tensor)
            self.counter = self.tensor if alone else self.counter
        return self

    def replace(self, tensor: torch.Tensor) -> None:
        """Keep another tensor with the same numbers, as it is now."""
        self.take(Residual(tensor))

    def take(self, other: Residual) -> None:
        """Keep the tensor of another one, with the version that it had then."""
        self.tensor, self.version, self.size = other.tensor, other.version, other.size
        self.counter = other.counter

    def part_of(self, other: Residual) -> None:
        """Count changes as another one does, whose memory the tensor lies on."""
        self.version = other.version
        if other.counter is not other.tensor:
            self.counter = other.counter

    def without_memory(self) -> Residual:
        """Return one that notices changes in place as this one does, but keeps no numbers."""
        if not _is_plain(self.tensor) or self.counter is not self.tensor:
            return self
        if self._hollow is not None:
            return self._hollow
        t = self.tensor.detach()
        # Leaves the tensor its version, which is that of the memory before.
        t.data = _hollow(t.shape, t.dtype, t.device)
        self._hollow = Residual(t, self.source)
        self._hollow.version = self.version
        return self._hollow

    def changed(self) -> bool:
        """Whether the tensor was changed in place."""
        return self.version is not None and self.counter._version != self.version

    def check(self) -> None:
        """Raise `StalenessError` if the tensor was changed in place."""
        if self.changed():
            raise StalenessError(
                f"a residual {TensorSpec.of(self.tensor)} kept for {self.source or 'a product'} "
                f"was changed in place after the linearization (version {self.version}, now "
                f"{self.counter._version}); linearize anew with at(...), or change a copy"
            )


def check_memory(residuals: Iterable[Residual]) -> None:
    """Raise `StalenessError` if the memory of a residual was freed: to read it would crash."""
    for r in residuals:
        try:  # as `_storage_bytes`, in one go: it is asked at each call of user code
            size = r.tensor.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):
            size = 0
        if size != r.size:
            raise StalenessError(
                f"the memory of a residual {TensorSpec.of(r.tensor)} kept for "
                f"{r.source or 'a product'} was freed after the linearization (by a custom "
                "Function?); linearize anew with at(...)"
            )


@functools.lru_cache(maxsize=256)
def _hollow(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor without memory; all that are alike share the same nothing."""
    with torch.inference_mode(False), unobserved():  # it outlives whoever is around
        hollow = torch.empty((), dtype=dtype, device=device).expand(shape)
    hollow.untyped_storage().resize_(0)
    return hollow


def _is_plain(t: torch.Tensor) -> bool:
    return type(t) is torch.Tensor and t.layout == torch.strided and not t.is_inference()


def _storage_bytes(t: torch.Tensor) -> int:
    try:
        return t.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one of torch.func
        return 0


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor holds an infinite number or NaN; denied too if a sum overflows.

    One pass over each tensor, and the host waits for the device once. Small ones are put together
    first: most of the time of a sum is its launch.
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for t in tensors:
        part = t.reshape(-1) if t.numel() <= _SMALL else t.sum().reshape(1)
        groups.setdefault((t.dtype, t.device), []).append(part)
    return all(bool(torch.isfinite(torch.cat(group).sum())) for group in groups.values())


#: So many numbers are sooner copied than summed.
_SMALL = 1 << 12
