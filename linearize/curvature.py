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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch

from ._capture.dependence import derivative
from ._derivatives.chains import diagonal_by_columns, diagonal_by_rows
from ._derivatives.gradient import gradient_and_value
from ._derivatives.modules import LOSSES, Reduction, arguments, loss_function
from ._points.jacobian import run
from ._points.linearizer import Linearizer
from ._points.product import Product
from ._spaces.compare import close
from ._spaces.flat import Parts, zeros
from ._spaces.maps import ChunkSize, check_chunk_size
from ._spaces.memory import total_bytes
from ._spaces.operators import SelfAdjoint
from ._spaces.space import Space
from ._text.progress import progress
from ._torch.modes import eagerly
from ._torch.names import pytree
from ._torch.randomness import drawing_from, random_state
from .errors import LinearizeError, OptionError, StalenessError, StructureError

__all__ = ["Curvature", "fisher", "gauss_newton", "hessian"]


def __dir__() -> list[str]:
    return __all__


@dataclasses.dataclass(slots=True)
class _Point:
    """What one batch contributes: its products one after another, value and gradient."""

    products: tuple[Product, ...]
    value: torch.Tensor
    gradient: Callable[[], Parts]


@dataclasses.dataclass(slots=True)
class _Batch:
    """One batch: linearized and kept, or linearized anew when it is needed."""

    make: Callable[[], _Point]
    weight: float
    value: torch.Tensor
    kept: _Point | None
    random_state: list[torch.Tensor]
    stamps: list[tuple[torch.Tensor, int]]

    def point(self) -> _Point:
        """Return the linearized batch, made of the same random draws as the first time."""
        if self.kept is not None:
            return self.kept
        if any(t._version != version for t, version in self.stamps):
            raise StalenessError(
                "the parameters, or a batch beyond max_bytes, were changed in place since the "
                "operator was made, so that the batch cannot be linearized again; make the "
                "operator anew, or give it copies"
            )
        with drawing_from(self.random_state):
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
        super().__init__(
            space, self._summed, at_once=self._fewest, diagonal=self._sooner, name=name
        )
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
            for batch in self._shown():
                for t, g in zip(total, batch.point().gradient(), strict=True):
                    t.add_(g, alpha=batch.weight)
            self._gradient = self.in_space.element_of(total)
        return self._gradient

    @property
    def flat_gradient(self) -> torch.Tensor:
        """The gradient at the point as a flat vector, shape (n,)."""
        return self.in_space.ravel(self.gradient)

    @property
    def batches_kept(self) -> int:
        """How many batches stay linearized; the others are linearized anew for every product."""
        return sum(b.kept is not None for b in self._batches)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the products, without the parameters' own."""
        kept = (t for b in self._batches if b.kept for p in b.kept.products for t in p._kept())
        return total_bytes(kept, excluding=self._own)

    def _chains(self) -> Iterator[tuple[Product, ...]]:
        """Yield for each batch the products that are applied one after another."""
        for batch in self._batches:
            yield batch.point().products

    def _summed(self, parts: Parts, *, stacked: bool) -> Parts:
        total: Parts | None = None
        for batch in self._shown():
            images = parts
            for product in batch.point().products:
                images = run(product, images, stacked=stacked)
            if total is None:
                total = [batch.weight * t for t in images]
            else:  # what was made here is added to: large memory takes time to come by
                for t, image in zip(total, images, strict=True):
                    t.add_(image, alpha=batch.weight)
        assert total is not None
        self._trim()
        return total

    def _shown(self) -> Iterable[_Batch]:
        """Return the batches, with a progress bar if some are linearized anew on the way."""
        if all(batch.kept is not None for batch in self._batches):
            return self._batches
        return progress(self._batches, self.batches, "batches")

    def _sooner(self, chunk_size: ChunkSize) -> torch.Tensor | None:
        """Return the diagonal, if each batch is Jᵀ·H·J, by the rows of J or by its columns."""
        check_chunk_size(chunk_size)
        space, n = self.in_space, self.shape[1]
        if space.is_complex:
            return None
        total = space.ravel(None)
        for batch in progress(self._batches, self.batches, "batches"):
            chain = batch.point().products
            if len(chain) != 3:
                return None
            outputs = chain[1]._arguments.size
            few = 2 * outputs < n
            chunk = self._chunk(chunk_size, outputs if few else n)
            diagonal = diagonal_by_rows if few else diagonal_by_columns
            total += batch.weight * diagonal(chain, chunk)
        return total

    def _trim(self) -> None:
        """Let go of batches whose programs have grown beyond the budget when simplified."""
        if self._max_bytes is None:
            return
        for batch in reversed(self._batches):
            if self.nbytes <= self._max_bytes:
                return
            batch.kept = None

    def _fewest(self, adjoint: bool) -> int:
        return min(p.at_once() for p in self._batches[0].point().products)


@eagerly
def hessian(
    f: Callable[..., torch.Tensor] | torch.nn.Module,
    params: Any,
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction | None = None,
    max_bytes: int | None = None,
) -> Curvature:
    """Return the Hessian of a scalar function as an operator.

    `hessian(f, params, batches)`, or, of a module's loss, `hessian(net, loss, loader)`.

    Parameters
    ----------
    f
        `f(params)`, or with batches `f(params, *batch)`; returns one real number as a tensor.
        Or a module.
    params
        A pytree of real tensors. For a module, the loss in its place, as for `gauss_newton`;
        the parameters are those of the module that require grad.
    batches
        The data in pieces, each a tuple (or one tensor); gone through once, now. Products are
        those of the data and parameters of now: a later change in place is noticed where they
        are read again. For a module, pairs `(inputs, targets)`.
    reduction
        How batches add up: "sum" adds what f returns; "mean" takes the average, weighted by
        the lengths of the batches' first tensors. None for "sum", and for a module for what its
        loss does with samples.
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
    if isinstance(f, torch.nn.Module):
        model, params, loss, batches, how = arguments("hessian", f, params, batches, None)
        reduction = reduction or how
        criterion = loss_function(loss)

        def scalar(q: Any, inputs: Any, *targets: Any) -> torch.Tensor:
            return criterion(model(q, inputs), *targets)

    else:
        scalar = f

    @derivative
    def gradient_of(p: Any, *batch: Any) -> Any:
        return gradient_and_value(lambda q: scalar(q, *batch))(p)

    # One for all batches: those of one structure share their programs.
    gradients = Linearizer(gradient_of, argnums=0, has_aux=True, maxsize=0)

    def linearized(batch: tuple[Any, ...]) -> _Point:
        here = gradients.at(params, *batch)
        here._check_whole("curvature")
        gradient = [t.detach() for t in here.out_space.filled(here.value)]
        return _Point((here.vjp_fn,), here.aux, lambda: gradient)

    return _over_batches(linearized, params, batches, reduction or "sum", max_bytes, "Hessian")


@overload
def gauss_newton(
    model: torch.nn.Module,
    params: str | Callable[..., torch.Tensor],
    loss: Iterable[Any],
    *,
    reduction: Reduction | None = None,
    max_bytes: int | None = None,
) -> Curvature: ...
@overload
def gauss_newton(
    model: Callable[..., Any],
    params: Any,
    loss: str | Callable[..., torch.Tensor],
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction | None = None,
    max_bytes: int | None = None,
) -> Curvature: ...
@eagerly
def gauss_newton(
    model: Callable[..., Any],
    params: Any,
    loss: Any,
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction | None = None,
    max_bytes: int | None = None,
) -> Curvature:
    """Return the generalised Gauss–Newton matrix Jᵀ·H·J as an operator.

    `gauss_newton(model, params, loss, batches)`, or `gauss_newton(net, loss, loader)` for a
    module and all of its parameters that require grad.

    J is the Jacobian of the model, H the Hessian of the loss at the model's output. For convex
    losses the matrix is positive semidefinite; that a loss is convex is not checked.

    Parameters
    ----------
    model
        `model(params)`, or with batches `model(params, inputs)`. Or a module, which is called
        with the inputs.
    params
        A pytree of real tensors. For a module a dictionary by the names of its parameters, or a
        sequence of them; may be left out.
    loss
        `loss(outputs)`, or with batches `loss(outputs, targets)`; returns one real number. Or
        the name of one of PyTorch's losses with its default options: "mse", "cross_entropy",
        "bce_with_logits" or "poisson_nll" (of the logarithm of the rate).
    batches
        Pairs `(inputs, targets)`, a `DataLoader` for instance; gone through once.
    reduction, max_bytes
        As for `hessian`.

    Returns
    -------
    Curvature
        Of shape (n, n) for n parameters.

    Raises
    ------
    StructureError
        If the loss does not return one real number, or there is no batch, or what is given as
        parameters is not the module's.
    OptionError
        If there is no loss of that name.

    Notes
    -----
    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14, 2002.
    """
    model, params, loss, batches, how = arguments("gauss_newton", model, params, loss, batches)
    criterion = loss_function(loss)

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
        slope = outer.out_space.filled(outer.value)
        return _Point(products, outer.aux, lambda: here.vjp_fn._apply(slope))

    chosen = reduction or how
    return _over_batches(linearized, params, batches, chosen, max_bytes, "GaussNewton")


@eagerly
def fisher(
    model: Callable[..., Any],
    params: Any,
    loss: Any,
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction | None = None,
    max_bytes: int | None = None,
) -> Curvature:
    """Return the Fisher information matrix of the model's likelihood as an operator.

    The usual losses are negative log-likelihoods whose parameters are the natural ones; for
    these the Fisher matrix is the Gauss–Newton matrix (J. Martens, "New insights and
    perspectives on the natural gradient method", JMLR 21, 2020, section 9.2), without sampling.
    Like `gauss_newton`, it takes a module: `fisher(net, "cross_entropy", loader)`.

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
    model, params, loss, batches, how = arguments("fisher", model, params, loss, batches)
    if not isinstance(loss, str):
        raise OptionError(
            "fisher: the distribution behind a loss given as a function is not known; name one of "
            f"{', '.join(sorted(LOSSES))}, or use gauss_newton"
        )
    chosen = reduction or how
    return gauss_newton(model, params, loss, batches, reduction=chosen, max_bytes=max_bytes)


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
        state = random_state()
        point = make()
        space = point.products[-1]._results.unpacked()
        keep: _Point | None = point
        if max_bytes is not None:
            used += _bytes(point, own)
            full = full or used > max_bytes
            keep = None if full else point
        lengths.append(_length(data) if batches is not None else 1)
        made.append(_Batch(make, 1.0, point.value, keep, state, _stamps((params, data))))
    if space is None:
        raise StructureError(f"{name}: expected at least one batch, got none")
    if reduction == "mean":
        for b, length in zip(made, lengths, strict=True):
            b.weight = length / sum(lengths)
    return Curvature(made, space, name, own, max_bytes)


def _stamps(tree: Any) -> list[tuple[torch.Tensor, int]]:
    """Return the tensors of a tree with their versions."""
    tensors = (t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor))
    return [(t, t._version) for t in tensors if not t.is_inference()]


def _bytes(point: _Point, own: set[int]) -> int:
    """Return what a linearized batch keeps. The program is recorded for that."""
    for product in point.products:
        _ = product.program
    return total_bytes((t for p in point.products for t in p._kept()), excluding=own)


def _length(batch: Sequence[Any]) -> int:
    for t in pytree.tree_leaves(batch):
        if isinstance(t, torch.Tensor) and t.dim():
            return t.shape[0]
    return 1
