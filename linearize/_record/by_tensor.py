"""What is known of tensors, as long as they are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class ByTensor(Generic[T]):
    """Something for each of some tensors, told apart as objects and not kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], T]] = {}

    def __setitem__(self, t: torch.Tensor, value: T) -> None:
        self._known[id(t)] = weakref.ref(t), value

    def __contains__(self, t: object) -> bool:
        ref, _ = self._known.get(id(t), (None, None))
        return ref is not None and ref() is t

    def __getitem__(self, t: torch.Tensor) -> T:
        return self._known[id(t)][1]

    def get(self, t: object) -> T | None:
        """Return what is known of a tensor; None if nothing is."""
        ref, value = self._known.get(id(t), (None, None))
        return value if ref is not None and ref() is t else None

    def pop(self, t: torch.Tensor) -> T:
        """Forget a tensor; return what was known of it."""
        return self._known.pop(id(t))[1]

    def sharing(self, targets: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors that lie on the storages of some."""
        storages = {t.untyped_storage().data_ptr() for t in targets}
        found = []
        for key, (ref, _) in list(self._known.items()):
            t = ref()
            if t is None:
                del self._known[key]
            elif t.untyped_storage().data_ptr() in storages:
                found.append(t)
        return found
