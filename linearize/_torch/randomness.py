"""The state of the random number generators of all devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def random_state() -> list[torch.Tensor]:
    """Return the state that is in force, the CPU's first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in _devices())]


@contextlib.contextmanager
def drawing_from(state: Sequence[torch.Tensor]) -> Iterator[None]:
    """Draw random numbers from an earlier state inside, and go on as before after it."""
    devices = _devices()
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state[0])
        for i, s in zip(devices, state[1:], strict=True):
            torch.cuda.set_rng_state(s, i)
        yield
