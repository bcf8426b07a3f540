"""A direction that is not recorded, turned around by PyTorch: it is differentiated once more.

A pullback u ↦ Jᴴ·u is linear, so its derivative by u is the map itself, and what PyTorch's
engine makes of that is J·v. It is believed after tests only: a second derivative of PyTorch's may
lack terms without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch

from .._capture.graph import Graph
from .._programs.program import Equation, Operation, Program
from .._programs.values import Var
from .._record.calls import unpacked
from .._spaces.balance import Balance, Tensors
from .._spaces.compare import agree, magnitudes, tolerance
from .._spaces.space import TensorSpec
from .._torch.graphs import Node, gradient_edge
from ..errors import LinearizeError, StalenessError, UnsupportedError

#: A linear map, differentiable in grad mode.
Direction: TypeAlias = Callable[..., Tensors]


class TwiceDifferentiated(Operation):
    """The transpose of a linear map, by PyTorch's derivative of it.

    `name` is whose it is, and `note` what a user is told. `arguments` is at what the map was
    differentiated, `results` what it gave there.
    """

    __slots__ = ("_lock", "arguments", "name", "note", "results")
    may_return_none = True
    may_alias = False

    def __init__(self, fn: Direction, ins: Sequence[TensorSpec], name: str, note: str) -> None:
        self.name, self.note = name, note
        self._lock = threading.RLock()
        generator = torch.Generator().manual_seed(7)
        with torch.inference_mode(False), torch.enable_grad():
            self.arguments = [spec.random(generator).requires_grad_() for spec in ins]
            self.results = list(fn(*self.arguments))

    def __call__(self, *directions: torch.Tensor | None) -> Tensors:
        """Apply the transpose: one for each result of the map, None for zero."""
        return unpacked(self.name, lambda: self._transposed(*directions), UnsupportedError)

    def bytes_kept(self) -> Iterable[torch.Tensor]:
        """Return the tensors that the graph of the map keeps."""
        edges = [gradient_edge(w) for w in self._used()]
        ends: list[Node] = [gradient_edge(u).node for u in self.arguments]
        return Graph([(e.node, e.output_nr) for e in edges], ends).saved_tensors()

    def _used(self) -> list[torch.Tensor]:
        return [w for w in self.results if w is not None and w.requires_grad]

    def _transposed(self, *directions: torch.Tensor | None) -> Tensors:
        pairs = [
            (w, t)
            for w, t in zip(self.results, directions, strict=True)
            if w is not None and w.requires_grad and t is not None
        ]
        if not pairs:
            return [None] * len(self.arguments)
        with self._lock, torch.inference_mode(False):
            return torch.autograd.grad(
                [w for w, _ in pairs],
                self.arguments,
                [t for _, t in pairs],
                retain_graph=True,
                allow_unused=True,
            )


def twice_differentiated(
    fn: Direction,
    ins: Sequence[TensorSpec],
    outs: Sequence[TensorSpec],
    present: Sequence[bool],
    wanted: Sequence[bool],
    name: str,
    method: str,
) -> tuple[Program | None, str]:
    """Return the transpose of the linear map `fn` by PyTorch; None, and why, if it has none.

    All but `method`, which is whose map it is, as of `dense_transpose`.
    """
    try:
        note = f"PyTorch's second derivative (the derivative of its {method})"
        op = TwiceDifferentiated(fn, ins, f"transposed {name}", note)
        fault = _fault(op, fn, outs)
    except StalenessError:
        raise
    except Exception as error:  # the code of a user, which may raise anything in grad mode
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        return None, _words(error)
    if fault:
        return None, fault
    args = [Var(s) if here else None for s, here in zip(outs, present, strict=True)]
    results = [Var(s) if want else None for s, want in zip(ins, wanted, strict=True)]
    equation = Equation(op, tuple(args), {}, tuple(results), f"{name}.{method}")
    inputs = [v for v in args if v is not None]
    return Program(inputs, [equation], results, list(ins), f"transpose of {name}.{method}"), ""


def _words(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, LinearizeError) else f"{type(error).__name__}: {text}"


def _fault(op: TwiceDifferentiated, fn: Direction, outs: Sequence[TensorSpec]) -> str:
    """Return why a map must not be transposed by its derivative; empty if it may be."""

    def at(arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            results = fn(*[u.clone() for u in arguments])
        return [s.or_zeros(w) for w, s in zip(results, outs, strict=True)]

    generator = torch.Generator().manual_seed(11)
    u = [t.detach() for t in op.arguments]
    w = at(u)
    if not agree(op.results, w, outs):
        return "it gives something else where gradients are recorded"
    other = [TensorSpec.of(t).random(generator) for t in u]
    more = at(other)
    if not agree(at(_added(u, other)), _added(w, more), outs):
        return "it is not linear"
    for factor in magnitudes(*(t.dtype for t in (*u, *w))):
        if not agree(at([factor * a for a in u]), [factor * b for b in w], outs, factor):
            return f"it is not linear: {factor:g} times its argument gives something else"
    limit = max(tolerance(t.dtype) for t in (*u, *w))
    for _ in range(2):
        v = [s.random(generator) for s in outs]
        balance = Balance()
        balance.add(1, other, op(*v))
        balance.add(-1, v, more)
        if not balance.holds(limit):
            return "PyTorch's derivative of it lacks terms"
    return ""


def _added(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]
