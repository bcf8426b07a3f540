"""Floor 6: drop-in functions with the contracts of `torch.func`.

Changing `from torch.func import jvp, vjp, linearize` to `from linearize.func import ...` is
enough. f runs once, and custom Functions of every style are called directly. As in
`torch.func`, results are differentiable with respect to primals, tangents and closed-over
tensors that require grad. Inside another `torch.func` transform (`vmap`, `grad`, ...) the
calls are handed on to `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._capture import Capture, capture, other_leaves
from ._linearity import close
from ._space import TensorSpec, differentiable
from ._torch import batched_or_wrapped, functorch_active, has_forward_tangent, pytree
from .errors import NotLinearError, StructureError
from .linearization import Linearization
from .products import Product

__all__ = ["jvp", "linear_transpose", "linearize", "vjp"]


class _History:
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
        ctx: Any, history: _History, numbers: Sequence[torch.Tensor], *originals: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.history = history
        ctx.save_for_backward(*originals)
        return tuple(t.detach() for t in numbers)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        history: _History = ctx.history
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
                behind = _History(
                    lambda: present, [*history.leaves, *us], [*ctx.saved_tensors, *cotangents]
                )
                attached = iter(behind.attach(present))
                grads = tuple(None if g is None else next(attached) for g in grads)
        return (None, None, *grads)


class _Live:
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
        return _History(lambda: self.outputs, self.leaves, self.originals).attach(numbers)

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
        history = _History(lambda: graph(own), [*self.leaves, *own], [*self.originals, *arguments])
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


class _Point:
    """A linearization whose value and products keep their history where there is one."""

    def __init__(self, f: Callable[..., Any], primals: Any, has_aux: bool) -> None:
        captured = capture(f, primals, {}, range(len(primals)), has_aux=has_aux)
        self.here = Linearization(captured)
        self.aux = captured.aux
        self.value = self.here.value
        self.live = _Live(captured, primals) if torch.is_grad_enabled() else None
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


def _handed_on(*trees: Any) -> bool:
    """Whether a call must go to `torch.func`, because it runs inside one of its transforms."""
    return functorch_active() or any(has_forward_tangent(t) for t in pytree.tree_leaves(trees))


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """Return `(func(*primals), J·tangents)`, and aux with `has_aux`.

    The contract of `torch.func.jvp`; for a single product that function is cheaper.

    Parameters
    ----------
    func
        The function; returns tensors or a pytree of them.
    primals, tangents
        Tuples of the same structure.
    strict
        Whether an output that does not depend on the primals is an error.
    has_aux
        Whether func returns `(output, aux)`.

    Raises
    ------
    StructureError, SpaceError
        If primals or tangents are not tuples, or the tangents do not fit.
    """
    if _handed_on(primals, tangents):
        return torch.func.jvp(func, primals, tangents, strict=strict, has_aux=has_aux)
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise StructureError(
            f"jvp: primals and tangents must be tuples, got {type(primals).__name__} and "
            f"{type(tangents).__name__}"
        )
    point = _Point(func, primals, has_aux)
    if strict and any(v is None for v in point.here.jvp_fn.program.outputs):
        raise StructureError("jvp: strict=True, and an output does not depend on the primals")
    out = point.jvp(tangents)
    return (point.value, out, point.aux) if has_aux else (point.value, out)


def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Return `(func(*primals), vjp_fn)`, and aux with `has_aux`.

    The contract of `torch.func.vjp`: `vjp_fn(cotangents)` returns a tuple with the cotangent of
    each primal.

    Parameters
    ----------
    func
        The function; returns tensors or a pytree of them.
    *primals
        Its arguments.
    has_aux
        Whether func returns `(output, aux)`.

    Raises
    ------
    StructureError
        If no primal is differentiable, or func returns something that is not a tensor.
    """
    if _handed_on(primals):
        return torch.func.vjp(func, *primals, has_aux=has_aux)
    point = _Point(func, primals, has_aux)

    def vjp_fn(
        cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None
    ) -> Any:
        with torch.set_grad_enabled(
            torch.is_grad_enabled() if create_graph is None else create_graph
        ):
            return point.vjp(cotangents)

    return (point.value, vjp_fn, point.aux) if has_aux else (point.value, vjp_fn)


def linearize(func: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Return `(func(*primals), jvp_fn)`.

    The contract of `torch.func.linearize`: `jvp_fn(*tangents)` is J·v. Here func runs once,
    need not be traceable, and the products go with that one run.

    Parameters
    ----------
    func
        The function; returns tensors or a pytree of them.
    *primals
        Its arguments.

    Raises
    ------
    StructureError
        If no primal is differentiable, or func returns something that is not a tensor.
    """
    if _handed_on(primals):
        # `torch.func.linearize` itself is wrong inside other transforms.
        value = func(*primals)
        return value, lambda *tangents: torch.func.jvp(func, primals, tangents)[1]
    point = _Point(func, primals, has_aux=False)

    def jvp_fn(*tangents: Any) -> Any:
        return point.jvp(tangents)

    return point.value, jvp_fn


def linear_transpose(func: Callable[..., Any], *primals: Any) -> Callable[..., Any]:
    """Return the transpose of a linear function.

    The contract of `jax.linear_transpose`: the result maps a cotangent, structured like
    func's output, to a tuple with one entry per primal. It is the plain transpose, without
    conjugation: for complex numbers Jᵀ, not the Jᴴ of `vjp`.

    Parameters
    ----------
    func
        A linear function. It runs once at `primals`, and once at a random point to see that it
        is linear.
    *primals
        Give structure, shapes, dtypes and devices.

    Raises
    ------
    NotLinearError
        If func at the random point is not its Jacobian at `primals` times that point.
    """
    point = Linearization(capture(func, primals, {}, range(len(primals))))
    generator = torch.Generator().manual_seed(7_919)
    elsewhere = pytree.tree_map(
        lambda x: TensorSpec.of(x).random(generator) if differentiable(x) else x, primals
    )
    image = point.jvp_fn(*(pytree.tree_map(_tangent, p) for p in elsewhere))
    with torch.no_grad():
        value = func(*elsewhere)
    for got, want in zip(pytree.tree_leaves(image), pytree.tree_leaves(value), strict=True):
        if got is not None and not close(got, want):
            raise NotLinearError(
                "linear_transpose: func is not linear: at a random point it differs from its "
                "Jacobian at the primals times that point"
            )

    def transposed(cotangent: Any) -> Any:
        result = point.vjp_fn(pytree.tree_map(_conjugate, cotangent))
        return pytree.tree_map(_conjugate, result)

    return transposed


def _tangent(x: Any) -> Any:
    return x.detach() if differentiable(x) else None


def _conjugate(x: Any) -> Any:
    return x.conj() if isinstance(x, torch.Tensor) and x.is_complex() else x
