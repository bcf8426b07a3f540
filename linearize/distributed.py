"""Operators and vectors that are spread over the ranks of `torch.distributed`.

Where f itself communicates, each rank linearizes its own f, and its vectors are parts of larger
ones: `dot` and `norm` are those of the whole vectors, and `gathered` has a solver that knows
nothing of ranks work with them.

Where f does not, `jacobian` and `total` spread data. Every rank has the whole of x and its own
share of the data, so its own rows of the Jacobian. J·v needs no communication and gives the
rank's own part; Jᵀ·u and JᵀJ·v are summed over the ranks, and every rank has the same result. A
solver for the normal equations, conjugate gradients for instance, runs unchanged on every rank.

Every rank must ask for the same products in the same order. If a rank fails inside of one, every
rank raises `DistributedError` with the reason; if a rank dies, the others raise it as soon as
the process group notices, at the latest at its timeout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ._points import ranks
from ._points.linearization import Linearization
from ._points.linearizer import Linearizer
from ._spaces.between import alike
from ._spaces.flat import Parts, check_flat, zeros
from ._spaces.operators import (
    Apply,
    ChunkSize,
    Direction,
    LinearOperator,
    SelfAdjoint,
    operator_between,
)
from ._spaces.space import Space, check_no_layouts
from ._torch.ranks import fail_if_told
from .errors import DistributedError, LinearizeError, UnsupportedError

__all__ = ["RowJacobian", "dot", "gathered", "jacobian", "norm", "parted", "total"]


def __dir__() -> list[str]:
    return __all__


Group = Any
T = TypeVar("T")


def jacobian(f: Callable[..., Any], *primals: Any, group: Group = None) -> RowJacobian:
    """Linearize f on every rank, and return the Jacobian of all ranks' results together.

    Parameters
    ----------
    f
        This rank's function: of the same primals, with this rank's data.
    *primals
        The same on every rank.
    group
        The process group; None for the default one.

    Returns
    -------
    RowJacobian
        Its `shape` is that of this rank's rows.

    Raises
    ------
    DistributedError
        On every rank, if f fails on one of them, or the primals differ in shape or dtype.
    """
    here = _together(lambda: Linearizer(f, maxsize=0).at(*primals), group, "the run of f")
    return RowJacobian(here, group)


def total(make: Callable[[], LinearOperator], group: Group = None) -> SelfAdjoint:
    """Return the sum over all ranks of a self-adjoint operator of each rank.

    Parameters
    ----------
    make
        Makes this rank's operator: `lambda: gauss_newton(model, params, loss, own_batches)`.
    group
        The process group; None for the default one.

    Returns
    -------
    SelfAdjoint
        The same on every rank.

    Raises
    ------
    UnsupportedError
        If a rank's operator is not self-adjoint; as the reason of a `DistributedError`.
    DistributedError
        On every rank, if `make` fails on one of them, or the operators differ in size.
    """

    def checked() -> LinearOperator:
        operator = make()
        if not isinstance(operator, SelfAdjoint):
            raise UnsupportedError(
                "total: expected a self-adjoint operator (a curvature, a gram()), got "
                f"{operator!r}"
            )
        return operator

    own = _together(checked, group, "the operator")
    _check_same(own, group)
    reduced = _reduced(own._apply, own.in_space, group, repr(own))
    return SelfAdjoint(own.in_space, reduced, at_once=alike, name=f"total of {own._name}")


class RowJacobian(LinearOperator):
    """A Jacobian whose rows are spread over ranks; made by `jacobian`.

    `in_space` is the same on every rank, `out_space` this rank's own part, and `shape` that of
    this rank's rows. `J @ v` is local, and so is `J.materialize()`, of this rank's rows.
    `J.T @ u` takes this rank's part of u and returns the sum over all ranks. `J.gram()` is the
    same on every rank.

    Parameters
    ----------
    here
        This rank's own linearization.
    group
        The process group; None for the default one.

    Attributes
    ----------
    here : Linearization
        This rank's own linearization.
    """

    def __init__(self, here: Linearization, group: Group = None) -> None:
        check_no_layouts(here.in_space, "jacobian")
        self.here = here
        self._own = here.jacobian
        _check_same(self._own, group)
        self._group = group
        adjoint = _reduced(self._own._apply_adjoint, self._own.in_space, group, "Jᵀ·u")
        super().__init__(
            self._own.in_space,
            self._own.out_space.parts_of(dist.group.WORLD if group is None else group),
            self._own._apply,
            adjoint,
            at_once=alike,
            name="RowJacobian",
        )

    def gram(self) -> LinearOperator:
        """Return Jᵀ·J of all ranks' rows: one sum over the ranks for each product."""
        own = self._own.gram()
        reduced = _reduced(own._apply, own.in_space, self._group, "JᵀJ·v")
        return SelfAdjoint(own.in_space, reduced, at_once=alike, name="RowJacobian.gram()")

    def _matrix(self, chunk_size: ChunkSize, direction: Direction) -> torch.Tensor:
        return self._own._matrix(chunk_size, direction)


# -- vectors of parts -------------------------------------------------------------------------


def dot(space: Space, a: Any, b: Any) -> torch.Tensor:
    """Return the inner product ⟨a, b⟩ of two whole vectors, conjugating a.

    Parameters
    ----------
    space
        The `in_space` or `out_space` of a linearization or an operator. If its elements are
        parts, every rank calls this, and has the same result.
    a, b
        This rank's parts: elements of the space, or flat vectors of shape (n,).

    Returns
    -------
    torch.Tensor
        A number.

    Raises
    ------
    StructureError, SpaceError
        If a part does not fit.
    DistributedError
        If a rank cannot be reached.
    """
    if space.group is None:
        return torch.vdot(_flat(space, a), _flat(space, b))
    failure: LinearizeError | None = None
    spec = space.vector
    # One sum carries the number, and whether a part did not fit.
    sums = torch.zeros(2, dtype=spec.dtype, device=spec.device)
    try:
        sums[0] = torch.vdot(_flat(space, a), _flat(space, b))
    except LinearizeError as error:
        failure = error
        sums[1] = 1
    _reduce(sums, dist.ReduceOp.SUM, space.group, "an inner product")
    if sums[1].real > 0:
        _raise(failure, space.group, "an inner product")
    return sums[0]


def norm(space: Space, a: Any) -> torch.Tensor:
    """Return the norm of a whole vector.

    Parameters
    ----------
    space, a
        As for `dot`.

    Returns
    -------
    torch.Tensor
        A real number.
    """
    return dot(space, a, a).abs().sqrt()


def _flat(space: Space, a: Any) -> torch.Tensor:
    if isinstance(a, torch.Tensor) and tuple(a.shape) == (space.size,) and not space.layouts:
        check_flat(space, a, "dot")
        return a.detach()
    return space.join([t.detach() for t in space.filled(a)])


def parted(operator: LinearOperator, group: Group = None) -> LinearOperator:
    """Return an operator whose vectors are parts of larger ones.

    That those of an f with collectives are is known. It is not where custom Functions communicate
    by methods of their own.

    Parameters
    ----------
    operator
        Maps this rank's part of one vector to its part of another.
    group
        The process group over which the parts are spread; None for the default one.

    Returns
    -------
    LinearOperator
        The same map. `dot` and `norm` of its spaces are those of whole vectors.
    """
    group = dist.group.WORLD if group is None else group
    return operator_between(
        operator.in_space.parts_of(group),
        operator.out_space.parts_of(group),
        operator._apply,
        operator._apply_adjoint,
        self_adjoint=isinstance(operator, SelfAdjoint),
        at_once=alike,
        name=operator._name,
    )


def gathered(operator: LinearOperator) -> LinearOperator:
    """Return an operator between whole flat vectors, which are the same on every rank.

    Every rank calls this, and then all products together. A solver that runs the same steps on
    every rank, as SciPy's do, needs to know nothing of ranks then.

    Parameters
    ----------
    operator
        On this rank's parts: the Jacobian of an f that communicates, a `RowJacobian`, and what
        is made of them.

    Returns
    -------
    LinearOperator
        On vectors that are the parts of all ranks, one after the other. Each product gathers the
        parts of the result once. An operator of whole vectors is returned as it is.

    Raises
    ------
    DistributedError
        On every rank, in products, if one of them fails.
    """
    sides = operator.in_space, operator.out_space
    if all(space.group is None for space in sides):
        return operator
    for space in sides:
        check_no_layouts(space, "gathered")
    first, second = (_Whole(space) for space in sides)
    return operator_between(
        first.space,
        second.space,
        functools.partial(_whole_product, operator, first, second),
        functools.partial(_whole_product, operator.H, second, first),
        self_adjoint=isinstance(operator, SelfAdjoint),
        at_once=alike,
        name=f"gathered {operator!r}",
    )


class _Whole:
    """A space of whole vectors beside that of a rank's parts."""

    def __init__(self, parts: Space) -> None:
        self.parts = parts
        self.group = parts.group
        self.sizes = [parts.size]
        self.place = 0
        if self.group is not None:
            self.sizes = ranks.gathered("the sizes of the parts", parts.size, self.group)
            self.place = dist.get_rank(self.group)
        spec = parts.vector
        like = torch.empty((), dtype=spec.dtype, device=spec.device).expand(sum(self.sizes))
        self.space = Space.of_tree(like, parts.word, parts.of)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a vector, or of several."""
        parts: tuple[torch.Tensor, ...] = whole.split(self.sizes, -1)
        return parts[self.place]

    def joined(self, part: torch.Tensor, failure: Exception | None, what: str) -> torch.Tensor:
        """Return the whole vector; a rank that has failed says so in the same message."""
        if self.group is None:
            if failure is not None:
                raise failure
            return part
        padded = part.new_zeros((*part.shape[:-1], max(self.sizes) + 1))
        padded[..., : part.shape[-1]] = part
        padded[..., -1] = float(failure is not None)
        pieces = [torch.empty_like(padded) for _ in self.sizes]
        with ranks.reaching(what):
            dist.all_gather(pieces, padded, group=self.group)
        if any(bool(p[..., -1].any()) for p in pieces):
            _raise(failure, self.group, what)
        kept = [p[..., :n] for p, n in zip(pieces, self.sizes, strict=True)]
        return torch.cat(kept, -1)


def _whole_product(
    operator: LinearOperator, first: _Whole, second: _Whole, parts: Parts, *, stacked: bool
) -> Parts:
    """Apply an operator to this rank's part of a whole vector, and gather the result."""
    (whole,) = parts
    failure: Exception | None = None
    try:
        given = first.parts.split(first.own(whole).contiguous())
        result = second.parts.join(
            operator._apply(given, stacked=stacked), stacked=stacked
        ).detach()
    except Exception as error:
        failure = error
        result = whole.new_zeros((*whole.shape[:-1], second.parts.size)).to(
            second.parts.vector.dtype
        )
    return [second.joined(result, failure, f"a product with {operator!r}")]


# -- messages ---------------------------------------------------------------------------------


def _reduced(apply: Apply, space: Space, group: Group, what: str) -> Apply:
    """Return a map whose results are summed over the ranks, errors included."""

    def reduced(parts: Parts, *, stacked: bool) -> Parts:
        count = len(parts[0]) if stacked else 1
        failure: BaseException | None = None
        try:
            fail_if_told()
            results = apply(parts, stacked=stacked)
        except Exception as error:
            failure = error
            results = zeros(space, count if stacked else None)
        flat = space.join(results, stacked=stacked).detach()
        # One sum carries the numbers, whether a rank failed, and whether all sent as many.
        if stacked:
            counts = torch.tensor([count, -count], device=flat.device)
            _reduce(counts, dist.ReduceOp.MAX, group, what)
            if int(counts[0]) != -int(counts[1]):
                raise DistributedError(
                    f"{what}: the ranks passed different numbers of vectors, from "
                    f"{-int(counts[1])} to {int(counts[0])}"
                )
        flag = flat.new_tensor([0.0 if failure is None else 1.0])
        buffer = torch.cat([flat.reshape(-1), flag])
        _reduce(buffer, dist.ReduceOp.SUM, group, what)
        if buffer[-1].real > 0:
            _raise(failure, group, what)
        return space.split(buffer[:-1].reshape(flat.shape))

    return reduced


def _together(work: Callable[[], T], group: Group, what: str) -> T:
    """Do something on every rank; if one fails, raise on all of them."""
    failure: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    _raise(failure, group, what)
    assert result is not None
    return result


def _raise(failure: BaseException | None, group: Group, what: str) -> None:
    """Tell the ranks of each other's failures, and raise on all if there is one."""
    own = None if failure is None else f"{type(failure).__name__}: {failure}"
    messages = ranks.gathered(what, own, group)
    if isinstance(failure, DistributedError) and None not in messages:
        raise failure  # the same on all ranks
    if any(messages):
        raise ranks.parted(what, {rank: (what, m) for rank, m in enumerate(messages)}) from failure


def _check_same(operator: LinearOperator, group: Group) -> None:
    spec = operator.in_space.vector
    own = (spec.shape, str(spec.dtype), [leaf.shape for leaf in operator.in_space.tensors])
    given = ranks.gathered("the input side", own, group)
    if any(other != given[0] for other in given):
        raise DistributedError(f"the input sides of the ranks' operators differ: {given}")


def _reduce(t: torch.Tensor, operation: Any, group: Group, what: str) -> None:
    with ranks.reaching(what):
        dist.all_reduce(t, operation, group=group)
