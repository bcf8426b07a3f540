"""Curvature of scalar functions, as operators: Hessian, Gauss–Newton, Fisher.

>>> import torch, linearize as lz, linearize.curvature
>>> x = torch.tensor([2.0, 3.0])
>>> H = lz.curvature.hessian(torch.prod, x)
>>> H @ torch.tensor([1.0, 0.0])
tensor([0., 1.])
>>> H.value, H.gradient
(tensor(6.), tensor([3., 2.]))

The function runs once for each batch of data; products run neither it nor its backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ._capture.dependence import derivative
from ._derivatives.gradient import gradient_and_value
from ._points.jacobian import run
from ._points.linearization import Linearization
from ._points.linearizer import Linearizer
from ._points.product import Product
from ._programs.program import total_bytes
from ._spaces.compare import close
from ._spaces.flat import Parts, zeros
from ._spaces.operators import SelfAdjoint
from ._spaces.space import Space
from ._text.progress import progress
from ._torch.modes import eagerly
from ._torch.names import pytree
from .errors import LinearizeError, OptionError, StructureError

__all__ = ["Curvature", "fisher", "gauss_newton", "hessian"]


def __dir__() -> list[str]:
    return __all__


Reduction = Literal["sum", "mean"]

_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "poisson_nll": F.poisson_nll_loss,
}


@dataclasses.dataclass(slots=True)
class _Point:
    """What one batch contributes: its products one after another, value and gradient."""

    products: tuple[Product, ...]
    value: torch.Tensor
    gradient: Callable[[], Parts]
    space: Space


@dataclasses.dataclass(slots=True)
class _Batch:
    """One batch: linearized and kept, or linearized anew when it is needed."""

    make: Callable[[], _Point]
    weight: float
    value: torch.Tensor
    kept: _Point | None
    random_state: list[torch.Tensor]

    def point(self) -> _Point:
        """Return the linearized batch, made of the same random draws as the first time."""
        if self.kept is not None:
            return self.kept
        with torch.random.fork_rng(devices=_random_devices()):
            _set_random_state(self.random_state)
            point = self.make()
        if not close(point.value, self.value):
            raise LinearizeError(
                "a batch beyond max_bytes was linearized again and gave another value "
                f"({float(point.value):.6g}, at first {float(self.value):.6g}): the function or "
                "the parameters have changed, or it keeps a state (running statistics); make the "
                "operator anew, or give it more memory"
            )
        return point


class Curvature(SelfAdjoint):
    """A curvature matrix, summed over batches of data. It is its own adjoint.

    Made by `hessian`, `gauss_newton` and `fisher`.

    Attributes
    ----------
    value : torch.Tensor
        The scalar function at the point, from the same runs.
    batches : int
        How many there are.
    """

    def __init__(
        self,
        batches: Sequence[_Batch],
        space: Space,
        name: str,
        own: set[int],
        max_bytes: int | None,
    ) -> None:
        super().__init__(space, self._summed, peak=self._largest, name=name)
        self._batches = batches
        self._own = own
        self._max_bytes = max_bytes
        self.batches = len(batches)
        self.value = sum(
            (b.weight * b.value for b in batches[1:]), batches[0].weight * batches[0].value
        )
        self._gradient: Any = None

    @property
    def gradient(self) -> Any:
        """The gradient at the point, structured like the parameters."""
        if self._gradient is None:
            total = zeros(self.in_space)
            for batch in self._batches:
                for t, g in zip(total, batch.point().gradient(), strict=True):
                    t.add_(g, alpha=batch.weight)
            self._gradient = self.in_space.unflatten(total)
        return self._gradient

    @property
    def batches_kept(self) -> int:
        """How many batches stay linearized; the others are linearized anew for every product."""
        return sum(b.kept is not None for b in self._batches)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the products, without the parameters' own."""
        kept = (t for b in self._batches if b.kept for p in b.kept.products for t in p._kept())
        return total_bytes(kept, excluding=self._own)

    def _summed(self, parts: Parts, *, stacked: bool) -> Parts:
        total: Parts | None = None
        for batch in self._batches:
            images = parts
            for product in batch.point().products:
                images = run(product, images, stacked=stacked)
            if batch.weight != 1:
                images = [batch.weight * t for t in images]
            total = (
                images if total is None else [a + b for a, b in zip(total, images, strict=True)]
            )
        assert total is not None
        self._trim()
        return total

    def _trim(self) -> None:
        """Let go of batches whose programs have grown beyond the budget when simplified."""
        if self._max_bytes is None:
            return
        for batch in reversed(self._batches):
            if self.nbytes <= self._max_bytes:
                return
            batch.kept = None

    def _largest(self) -> int:
        kept = self._batches[0].point()
        return max(product.program.peak_bytes() for product in kept.products)


@eagerly
def hessian(
    f: Callable[..., torch.Tensor],
    params: Any,
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction = "sum",
    max_bytes: int | None = None,
) -> Curvature:
    """Return the Hessian of a scalar function as an operator.

    Parameters
    ----------
    f
        `f(params)`, or with batches `f(params, *batch)`; returns one real number as a tensor.
    params
        A pytree of real tensors.
    batches
        The data in pieces, each a tuple (or one tensor); gone through once.
    reduction
        How batches add up: "sum" adds what f returns; "mean" takes the average, weighted by
        the lengths of the batches' first tensors.
    max_bytes
        The most bytes that linearized batches may keep. Those that do not fit are linearized
        anew for every product. None for no limit.

    Returns
    -------
    Curvature
        Of shape (n, n) for n parameters.

    Raises
    ------
    StructureError
        If f does not return one real number, or there is no batch.
    UnsupportedError
        In products, if something in f has no second derivative.
    """

    @derivative
    def gradient_of(p: Any, *batch: Any) -> Any:
        return gradient_and_value(lambda q: f(q, *batch))(p)

    # One for all batches: those of one structure share their programs.
    gradients = Linearizer(gradient_of, argnums=0, has_aux=True, maxsize=0)

    def linearized(batch: tuple[Any, ...]) -> _Point:
        here = gradients.at(params, *batch)
        here._check_whole("curvature")
        gradient = [t.detach() for t in _tensors(here)]
        return _Point((here.vjp_fn,), here.aux, lambda: gradient, here.in_space.unpacked())

    return _over_batches(linearized, params, batches, reduction, max_bytes, "Hessian")


@eagerly
def gauss_newton(
    model: Callable[..., Any],
    params: Any,
    loss: str | Callable[..., torch.Tensor],
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction = "sum",
    max_bytes: int | None = None,
) -> Curvature:
    """Return the generalised Gauss–Newton matrix Jᵀ·H·J as an operator.

    J is the Jacobian of the model, H the Hessian of the loss at the model's output. For convex
    losses the matrix is positive semidefinite; that a loss is convex is not checked.

    Parameters
    ----------
    model
        `model(params)`, or with batches `model(params, inputs)`.
    params
        A pytree of real tensors, the dictionary of a module's parameters for instance.
    loss
        `loss(outputs)`, or with batches `loss(outputs, targets)`; returns one real number. Or
        the name of one of PyTorch's losses with its default options: "mse", "cross_entropy",
        "bce_with_logits" or "poisson_nll" (of the logarithm of the rate).
    batches
        Pairs `(inputs, targets)`; gone through once.
    reduction, max_bytes
        As for `hessian`.

    Returns
    -------
    Curvature
        Of shape (n, n) for n parameters.

    Raises
    ------
    StructureError
        If the loss does not return one real number, or there is no batch.
    OptionError
        If there is no loss of that name.

    Notes
    -----
    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14, 2002.
    """
    criterion = _loss(loss)

    @derivative
    def loss_gradient(y: Any, *targets: Any) -> Any:
        return gradient_and_value(lambda z: criterion(z, *targets))(y)

    # One for all batches: those of one structure share their programs.
    models = Linearizer(model, argnums=0, maxsize=0)
    losses = Linearizer(loss_gradient, argnums=0, has_aux=True, maxsize=0)

    def linearized(batch: tuple[Any, ...]) -> _Point:
        if batch and len(batch) != 2:
            raise StructureError(
                f"gauss_newton: expected batches (inputs, targets), got one of {len(batch)} items"
            )
        inputs, targets = batch[:1], batch[1:]
        here = models.at(params, *inputs)
        here._check_whole("curvature")
        outer = losses.at(here.value, *targets)
        products = here.jvp_fn, outer.vjp_fn, here.vjp_fn
        slope = _tensors(outer)
        return _Point(
            products, outer.aux, lambda: here.vjp_fn._apply(slope), here.in_space.unpacked()
        )

    return _over_batches(linearized, params, batches, reduction, max_bytes, "GaussNewton")


@eagerly
def fisher(
    model: Callable[..., Any],
    params: Any,
    loss: str,
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction = "sum",
    max_bytes: int | None = None,
) -> Curvature:
    """Return the Fisher information matrix of the model's likelihood as an operator.

    The usual losses are negative log-likelihoods whose parameters are the natural ones; for
    these the Fisher matrix is the Gauss–Newton matrix (J. Martens, "New insights and
    perspectives on the natural gradient method", JMLR 21, 2020, section 9.2), without sampling.

    Parameters
    ----------
    model, params
        As for `gauss_newton`.
    loss
        The name of the loss: "mse" (a normal distribution of fixed variance), "cross_entropy",
        "bce_with_logits" or "poisson_nll".
    batches, reduction, max_bytes
        As for `gauss_newton`.

    Returns
    -------
    Curvature
        Of shape (n, n) for n parameters.

    Raises
    ------
    OptionError
        If there is no loss of that name, or a function is given: its distribution is unknown.
    """
    if not isinstance(loss, str):
        raise OptionError(
            "fisher: the distribution behind a loss given as a function is not known; name one of "
            f"{', '.join(sorted(_LOSSES))}, or use gauss_newton"
        )
    return gauss_newton(model, params, loss, batches, reduction=reduction, max_bytes=max_bytes)


def _loss(loss: str | Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    if callable(loss):
        return loss
    if loss not in _LOSSES:
        raise OptionError(f"loss must be a function or one of {sorted(_LOSSES)}, got {loss!r}")
    return _LOSSES[loss]


def _tensors(here: Linearization) -> Parts:
    return [t for t in here.out_space.flatten(here.value) if t is not None]


def _over_batches(
    linearized: Callable[[tuple[Any, ...]], _Point],
    params: Any,
    batches: Iterable[Any] | None,
    reduction: str,
    max_bytes: int | None,
    name: str,
) -> Curvature:
    if reduction not in ("sum", "mean"):
        raise OptionError(f'reduction must be "sum" or "mean", got {reduction!r}')
    if max_bytes is not None and max_bytes < 0:
        raise OptionError(f"max_bytes must not be negative, got {max_bytes}")
    given: Iterable[Any] = [()] if batches is None else batches
    size = len(given) if isinstance(given, Sequence) else 0
    own = {
        t.untyped_storage().data_ptr() for t in pytree.tree_leaves(params) if torch.is_tensor(t)
    }
    made: list[_Batch] = []
    lengths: list[int] = []
    space: Space | None = None
    used, full = 0, False
    for batch in progress(given, size, "batches") if size > 1 else given:
        data = batch if isinstance(batch, (tuple, list)) else (batch,)
        make = functools.partial(linearized, tuple(data))
        state = _random_state()
        point = make()
        space = point.space
        keep: _Point | None = point
        if max_bytes is not None:
            used += _bytes(point, own)
            full = full or used > max_bytes
            keep = None if full else point
        lengths.append(_length(data) if batches is not None else 1)
        made.append(_Batch(make, 1.0, point.value, keep, state))
    if space is None:
        raise StructureError(f"{name}: expected at least one batch, got none")
    if reduction == "mean":
        for b, length in zip(made, lengths, strict=True):
            b.weight = length / sum(lengths)
    return Curvature(made, space, name, own, max_bytes)


def _bytes(point: _Point, own: set[int]) -> int:
    """Return what a linearized batch keeps. The program is recorded for that."""
    for product in point.products:
        _ = product.program
    kept = (t for product in point.products for t in product._kept())
    return total_bytes(kept, excluding=own)


def _length(batch: Sequence[Any]) -> int:
    for t in pytree.tree_leaves(batch):
        if isinstance(t, torch.Tensor) and t.dim():
            return t.shape[0]
    return 1


def _random_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def _random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in _random_devices())]


def _set_random_state(state: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for i, s in zip(_random_devices(), state[1:], strict=True):
        torch.cuda.set_rng_state(s, i)
