"""The numbers with a target, computed from measurements, and whether they are met."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.engines import JAX_PEERS, LIMIT, OURS, TORCH_PEERS

Result = dict[str, Any]

TINY = 20e-6  # seconds; below, the calls themselves count


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of one case.

    Attributes
    ----------
    name
        What it is, the same for all cases.
    case
        Where it was measured.
    value, target
        The number and what it should be at most; None where the issue sets no target.
    detail
        Against whom, for example.
    unit
        For printing.
    """

    name: str
    case: str
    value: float
    target: float | None
    detail: str = ""
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        return None if self.target is None else self.value <= self.target


def _best(result: Result, names: Sequence[str], which: str) -> tuple[str, float] | None:
    found = [(e[which], n) for n, e in result["engines"].items() if n in names and which in e]
    return (min(found)[1], min(found)[0]) if found else None


def figures(result: Result) -> Iterator[Figure]:
    """Yield the figures of one case."""
    own, case = result["engines"].get(OURS, {}), result["case"]
    if "error" not in own:
        return
    yield from _products(result, own)
    weighty = result["size"] != "small"
    base = result["autograd"]
    at_most = 3.0 if weighty else None
    yield Figure("setup / forward under autograd", case, own["setup"] / base, at_most)
    if "met" in own:
        yield Figure("setup, graph met / forward under autograd", case, own["met"] / base, at_most)
    if "relinearize" in own:
        at_most = 1.3 if weighty else None
        name = "relinearize / forward under autograd"
        yield Figure(name, case, own["relinearize"] / base, at_most)
    if result["graph_bytes"] and not result["opaque"]:  # NumPy's memory is not seen
        ratio = own["retained_bytes"] / result["graph_bytes"]
        yield Figure("retained bytes / autograd graph's", case, ratio, 1.05)
    small, heavy = result["size"] == "small", result["by_blas"]
    for which in ("jvp", "vjp"):
        if f"batched_{which}" in own:
            at_most = 0.8 if heavy else 0.35 if small else None
            yield Figure("16 batched / 16 singly", case, own[f"batched_{which}"], at_most, which)


def _products(result: Result, own: Result) -> Iterator[Figure]:
    case, limit = result["case"], result["engines"].get(LIMIT, {})
    for which in ("jvp", "vjp"):
        if which not in own:
            continue
        value = own[which]
        floor = limit.get(which)
        if floor is not None and result["kind"] == "opaque":
            overhead = (value - floor) * 1e6
            at_most = 20.0 if result["size"] == "small" else None
            yield Figure("overhead on an opaque Function", case, overhead, at_most, which, "µs")
        if floor is not None:
            at_most = 2.0 if floor < TINY else 1.15 if result["size"] != "small" else None
            yield Figure("product / limit", case, value / floor, at_most, which)
        peer = _best(result, TORCH_PEERS, which)
        if peer is not None:
            name, time = peer
            room = floor is None or time > 1.1 * floor
            at_most = 0.9 if room else 1.02
            yield Figure(
                "product / best PyTorch peer", case, value / time, at_most, f"{which}, {name}"
            )
        peer = _best(result, JAX_PEERS, which)
        if peer is not None:
            name, time = peer
            at_most = 1.1 if result["by_blas"] else 1.0
            yield Figure("product / better JAX", case, value / time, at_most, f"{which}, {name}")
        traced = result["engines"].get("torch.func.linearize", {}).get(which)
        if result["kind"] == "chain" and traced is not None:
            ratio = value / traced
            yield Figure("chain / torch.func.linearize", case, ratio, 1 / 500, which)
