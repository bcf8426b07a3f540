"""Values and products that keep their autograd history.

A linearization gives numbers. Where `torch.func` gives results that can be differentiated
again, with respect to primals, tangents and closed-over tensors, its drop-ins here attach the
history of the one run to these numbers; it is used only if somebody differentiates them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._capture.capture import Capture, capture
from .._capture.dependence import derivative, is_derivative
from .._capture.graph import between, other_leaves
from .._points.linearization import Linearization
from .._points.product import Product
from .._spaces.space import differentiable
from .._spaces.trees import tangent_leaves
from .._text.labels import function_name
from .._torch.graphs import gradient_edge
from .._torch.modes import being_traced, functorch_active
from .._torch.names import batched_or_wrapped, has_forward_tangent, pytree
from .sight import Sight, seen


@dataclasses.dataclass(eq=False, slots=True)
class History:
    """Some results with the private graph that they have on some leaves.

    They are made when somebody differentiates them. The originals are the tensors outside that the
    leaves stand for.
    """

    make: Callable[[], Sequence[torch.Tensor]]
    leaves: list[torch.Tensor]
    originals: list[torch.Tensor]
    sight: Sight

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
            arguments = [y for y, _ in used], history.leaves, [u for _, u in used]
            if higher:
                grads = history.sight.gradients(*arguments)
                present = [g for g in grads if g is not None]
                behind = History(
                    lambda: present,
                    [*history.leaves, *us],
                    [*ctx.saved_tensors, *cotangents],
                    history.sight,
                )
                attached = iter(behind.attach(present))
                grads = tuple(None if g is None else next(attached) for g in grads)
            else:
                grads = torch.autograd.grad(*arguments, retain_graph=True, allow_unused=True)
        return (None, None, *grads)


class Live:
    """The autograd graph of one run, for derivatives of products at the point itself."""

    def __init__(
        self, captured: Capture, primals: Any, sight: Sight, aux: Sequence[torch.Tensor] = ()
    ) -> None:
        self.outputs = captured.outputs
        self.sight = sight
        self.aliases = captured.leaves
        beside = [gradient_edge(t) for t in aux]
        edges = [*captured.edges, *((e.node, e.output_nr) for e in beside)]
        outer = other_leaves(edges, captured.nodes())
        given = tangent_leaves(primals)
        #: What value and products depend on: primals that require grad, and closed-over tensors.
        pairs = [(a, x) for a, x in zip(self.aliases, given, strict=True) if x.requires_grad]
        self.leaves = [*(a for a, _ in pairs), *outer]
        self.originals = [*(x for _, x in pairs), *outer]

    def attached(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return results of the run with their history on the originals."""
        return self.attach([y.detach() for y in results], lambda: results)

    def attach(
        self,
        numbers: Sequence[torch.Tensor],
        make: Callable[[], Sequence[torch.Tensor]],
        own: Sequence[torch.Tensor] = (),
        arguments: Sequence[torch.Tensor] = (),
    ) -> list[torch.Tensor]:
        """Return numbers with the history of results that `make` forms in the graph of the run.

        They depend on `own` too, leaves that stand for `arguments`.
        """
        leaves, originals = [*self.leaves, *own], [*self.originals, *arguments]
        return History(make, leaves, originals, self.sight).attach(numbers)

    def pullback(self, cotangents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return Jᵀ·u with its history."""
        return self._gradients(self.outputs, self.aliases, cotangents)

    def pushforward(self, tangents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return J·v with its history: the derivative of Jᵀ·u with respect to u."""
        at = [torch.zeros_like(y, requires_grad=True) for y in self.outputs]
        return self._gradients(self.pullback(at), at, tangents)

    def _gradients(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        cotangents: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        used = [(y, u) for y, u in zip(outputs, cotangents, strict=True) if y.requires_grad]
        if not used:
            return [torch.zeros_like(x) for x in inputs]
        return self.sight.gradients(
            [y for y, _ in used], inputs, [u for _, u in used], materialize_grads=True
        )


class Point:
    """A linearization whose value and products keep their history where there is one.

    Parameters
    ----------
    forward
        The name of a function whose counterpart in PyTorch differentiates through `no_grad`.
    keep
        Whether to keep what `dependence` and `constant_inputs` need.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        primals: Any,
        has_aux: bool,
        *,
        forward: str = "",
        keep: bool = False,
    ) -> None:
        results: list[Any] = []
        sights: list[Sight] = []

        def watched(*args: Any) -> Any:
            result, sight = seen(f, args, through=bool(forward))
            if forward:
                sight.check_regions(result[0] if has_aux else result, forward)
            results.append(result)
            sights.append(sight)
            return result

        if is_derivative(f):
            derivative(watched)
        captured = capture(watched, primals, {}, range(len(primals)), has_aux=has_aux)
        captured.name = function_name(f)
        #: Kept on demand only: it keeps the graph.
        self._captured = captured if keep else None
        self.here = Linearization(captured)
        self.aux = captured.aux
        self.value = self.here.value
        self.live: Live | None = None
        if torch.is_grad_enabled():
            self._attach(captured, primals, results.pop()[1] if has_aux else None, sights.pop())

    def _attach(self, captured: Capture, primals: Any, aux: Any, sight: Sight) -> None:
        """Give value and aux the history that they have on tensors outside."""
        beside = [t for t in tangent_leaves(aux) if t.requires_grad]
        live = Live(captured, primals, sight, beside)
        if not live.leaves:
            return
        self.live = live
        outputs = iter(live.attached(live.outputs))
        self.value = pytree.tree_map(
            lambda t: next(outputs) if differentiable(t) else t, self.here.value
        )
        if beside:
            known = dict(zip(map(id, beside), live.attached(beside), strict=True))
            self.aux = pytree.tree_map(lambda t, own: known.get(id(t), own), aux, self.aux)

    def dependence(self) -> list[list[bool]]:
        """Return for each output whether it depends on each primal, as far as the graph tells."""
        assert self._captured is not None
        nodes = self._captured.nodes()
        rows = []
        for edge in self._captured.edges:
            reached = set(between([] if edge is None else [edge[0]], nodes))
            rows.append([node in reached for node in nodes])
        return rows

    def constant_inputs(self, first: int, last: int | None = None) -> list[int]:
        """Return the numbers of primals by which the derivative of none of some outputs varies."""
        assert self._captured is not None
        outputs = self._captured.outputs[first:last]
        grads = torch.autograd.grad(
            outputs,
            self._captured.leaves,
            [torch.ones_like(y) for y in outputs],
            create_graph=True,
            allow_unused=True,
        )
        return [j for j, g in enumerate(grads) if g is None or not g.requires_grad]

    def jvp(self, tangents: Any) -> Any:
        """Return J·v; integer outputs have a zero of their own dtype, as in `torch.func`."""
        here = self.here
        results = self._product(here.jvp_fn, "pushforward", here.in_space.filled(tangents))
        others = [
            torch.zeros_like(t) if isinstance(t, torch.Tensor) else None
            for t in pytree.tree_leaves(here.value)
        ]
        return here.out_space.element_of(results, others)

    def vjp(self, cotangents: Any) -> Any:
        """Return Jᵀ·u, a tuple with one entry per primal."""
        here = self.here
        results = self._product(here.vjp_fn, "pullback", here.out_space.filled(cotangents))
        return here.in_space.element_of(results)

    def _product(
        self, product: Product, name: str, flat: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        if self.live is None or not torch.is_grad_enabled() or any(map(batched_or_wrapped, flat)):
            return product._apply(flat)
        numbers = product._apply([t.detach() for t in flat])
        own = [t.detach().requires_grad_() for t in flat]
        formed = getattr(self.live, name)
        # Only if somebody differentiates the numbers is the product formed in the run's graph.
        return self.live.attach(numbers, lambda: formed(own), own, flat)


def handed_on(*trees: Any) -> bool:
    """Whether a call must go to PyTorch: inside one of its transforms, or in a trace."""
    return (
        being_traced()
        or functorch_active()
        or any(has_forward_tangent(t) for t in pytree.tree_leaves(trees))
    )
