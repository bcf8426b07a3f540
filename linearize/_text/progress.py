"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(steps: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Return `steps` with a progress bar where tqdm is installed; short work shows none."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, desc=what, delay=1.0, leave=False)


def ticking(total: int, what: str) -> Callable[[], object]:
    """Return what moves a progress bar by a step of at most `total`, each time it is called."""
    steps = iter(progress(range(total), total, what))
    return lambda: next(steps, None)
