"""Values and products that keep their autograd history.

A linearization gives numbers. Where `torch.func` gives results that can be differentiated
again, with respect to primals, tangents and closed-over tensors, its drop-ins here attach the
history of the one run to these numbers; it is used only if somebody differentiates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._capture.capture import Capture, capture
from .._capture.graph import other_leaves
from .._points.linearization import Linearization
from .._points.product import Product
from .._spaces.space import differentiable
from .._torch.modes import functorch_active
from .._torch.names import batched_or_wrapped, has_forward_tangent, pytree


class History:
    """Some results with the private graph that they have on some leaves.

    Parameters
    ----------
    make
        Returns the results; called when somebody differentiates them.
    leaves
        What they depend on in the private graph.
    originals
        The tensors outside that the leaves stand for.
    """

    def __init__(
        self,
        make: Callable[[], Sequence[torch.Tensor]],
        leaves: Sequence[torch.Tensor],
        originals: Sequence[torch.Tensor],
    ) -> None:
        self.make = make
        self.leaves = list(leaves)
        self.originals = list(originals)

    def attach(self, numbers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return `numbers`, the values of the results, as functions of the originals."""
        return list(_Attached.apply(self, numbers, *self.originals))  # type: ignore[no-untyped-call]


class _Attached(torch.autograd.Function):
    """Results of a private graph, differentiable to any order with respect to the originals."""

    @staticmethod
    def forward(
        ctx: Any, history: History, numbers: Sequence[torch.Tensor], *originals: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.history = history
        ctx.save_for_backward(*originals)
        return tuple(t.detach() for t in numbers)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        history: History = ctx.history
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            results = history.make()
            us = [u.detach().requires_grad_() if higher else u for u in cotangents]
            used = [(y, u) for y, u in zip(results, us, strict=True) if y.requires_grad]
            if not used:
                return (None, None, *(None for _ in history.leaves))
            grads = torch.autograd.grad(
                [y for y, _ in used],
                history.leaves,
                [u for _, u in used],
                create_graph=higher,
                retain_graph=True,
                allow_unused=True,
            )
            if higher:
                present = [g for g in grads if g is not None]
                behind = History(
                    lambda: present, [*history.leaves, *us], [*ctx.saved_tensors, *cotangents]
                )
                attached = iter(behind.attach(present))
                grads = tuple(None if g is None else next(attached) for g in grads)
        return (None, None, *grads)


class Live:
    """The autograd graph of one run, for derivatives of products at the point itself."""

    def __init__(self, captured: Capture, primals: Any) -> None:
        self.outputs = captured.outputs
        self.aliases = [t for t, _ in captured.leaves]
        outer = other_leaves(captured.edges, [node for _, node in captured.leaves])
        given = [t for t in pytree.tree_leaves(primals) if differentiable(t)]
        #: What value and products depend on: primals that require grad, and closed-over tensors.
        pairs = [(a, x) for a, x in zip(self.aliases, given, strict=True) if x.requires_grad]
        self.leaves = [*(a for a, _ in pairs), *outer]
        self.originals = [*(x for _, x in pairs), *outer]

    def value(self) -> list[torch.Tensor]:
        """Return the outputs with their history."""
        numbers = [y.detach() for y in self.outputs]
        return History(lambda: self.outputs, self.leaves, self.originals).attach(numbers)

    def product(
        self,
        numbers: Sequence[torch.Tensor],
        graph: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
        arguments: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return a product with its history.

        The numbers come from the recorded program. Only if somebody differentiates them is
        the product formed anew in the graph of the run.
        """
        own = [t.detach().requires_grad_() for t in arguments]
        history = History(lambda: graph(own), [*self.leaves, *own], [*self.originals, *arguments])
        return history.attach(numbers)

    def pullback(self, cotangents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return Jᵀ·u with its history."""
        return _gradients(self.outputs, self.aliases, cotangents)

    def pushforward(self, tangents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return J·v with its history: the derivative of Jᵀ·u with respect to u."""
        at = [torch.zeros_like(y, requires_grad=True) for y in self.outputs]
        return _gradients(self.pullback(at), at, tangents)


def _gradients(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], cotangents: Any
) -> Sequence[torch.Tensor]:
    used = [(y, u) for y, u in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not used:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        [y for y, _ in used],
        inputs,
        [u for _, u in used],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


class Point:
    """A linearization whose value and products keep their history where there is one."""

    def __init__(self, f: Callable[..., Any], primals: Any, has_aux: bool) -> None:
        captured = capture(f, primals, {}, range(len(primals)), has_aux=has_aux)
        self.here = Linearization(captured)
        self.aux = captured.aux
        self.value = self.here.value
        self.live = Live(captured, primals) if torch.is_grad_enabled() else None
        if self.live is not None and not self.live.leaves:
            self.live = None
        if self.live is not None:
            outputs = iter(self.live.value())
            self.value = pytree.tree_map(
                lambda t: next(outputs) if differentiable(t) else t, self.here.value
            )

    def jvp(self, tangents: Any) -> Any:
        """Return J·v; integer outputs have a zero of their own dtype, as in `torch.func`."""
        here = self.here
        flat = [
            spec.zeros() if t is None else t
            for t, spec in zip(here.in_space.flatten(tangents), here.in_space.tensors, strict=True)
        ]
        results = self._product(here.jvp_fn, "pushforward", flat)
        others = [
            torch.zeros_like(t) if isinstance(t, torch.Tensor) else None
            for t in pytree.tree_leaves(here.value)
        ]
        return here.out_space.unflatten(results, others)

    def vjp(self, cotangents: Any) -> Any:
        """Return Jᵀ·u, a tuple with one entry per primal."""
        here = self.here
        flat = [
            spec.zeros() if t is None else t
            for t, spec in zip(
                here.out_space.flatten(cotangents), here.out_space.tensors, strict=True
            )
        ]
        return here.in_space.unflatten(self._product(here.vjp_fn, "pullback", flat))

    def _product(
        self, product: Product, name: str, flat: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        if self.live is None or not torch.is_grad_enabled() or any(map(batched_or_wrapped, flat)):
            return product._apply(flat)
        numbers = product._apply([t.detach() for t in flat])
        return self.live.product(numbers, getattr(self.live, name), flat)


def handed_on(*trees: Any) -> bool:
    """Whether a call must go to `torch.func`, because it runs inside one of its transforms."""
    return functorch_active() or any(has_forward_tangent(t) for t in pytree.tree_leaves(trees))
