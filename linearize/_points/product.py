"""A linear map as a function: what the two products of a linearization have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._check.adjoint import check_built_in
from .._execute.binding import BoundProgram
from .._forms.plan import Plan
from .._programs.numbers import Pool
from .._spaces.space import Space
from .._torch.modes import functorch_active, set_grad_mode
from .._transpose.copies import among_ranks
from .._transpose.transpose import transpose
from ..errors import StructureError, UnsupportedError
from .differentiable import DifferentiableProduct, DifferentiableStack, wants_history
from .planned import Planned


class Product(Planned):
    """A linear map as a function: the common part of `jvp_fn` and `vjp_fn`.

    A product may be called from several threads, under `torch.no_grad` and in inference mode.
    If an argument requires grad, the result is differentiable with respect to the argument.
    """

    _turned: Product | None

    def _batched(
        self, tensors: Sequence[torch.Tensor | None], chunk_size: int | None
    ) -> list[torch.Tensor]:
        """Apply the map to stacks of arguments, along their first dimension."""
        given = [t for t in tensors if t is not None]
        grad, transformed = torch.is_grad_enabled(), functorch_active()
        if grad and not transformed and wants_history(given):
            return list(DifferentiableStack.apply(self, chunk_size, *tensors))  # type: ignore[no-untyped-call]
        present = self._whole
        if len(given) < len(tensors):
            present = tuple([t is not None for t in tensors])
        if transformed or not len(given[0]):
            self._check_untransformed(transformed)
            pieces_of = chunk_size if len(given[0]) else None
            return list(torch.vmap(self._one(present), chunk_size=pieces_of)(*given))
        ranks = self._lifetime.ranks
        if ranks is not None and not ranks.inside:
            count = len(given[0])
            step = chunk_size or count
            sizes = [min(step, count - i) for i in range(0, count, step)]
            return ranks.run(
                f"{self._called} of {sizes} vectors at once",
                lambda: self._prepared(present),
                lambda: self._batched(tensors, chunk_size),
                sizes,
            )
        if self._lifetime.closed:
            self._check_open()
        if self._first is not None:
            self._first()
        plan = self._plans.get(present) or self._plan(present)
        if not chunk_size or chunk_size >= len(given[0]):
            return self._stack(plan, present, given)
        pieces = zip(*(t.split(chunk_size) for t in given), strict=True)
        chunks = [self._stack(plan, present, parts) for parts in pieces]
        return [torch.cat(c) for c in zip(*chunks, strict=True)]

    @property
    def _called(self) -> str:
        """The product's name among the ranks'."""
        return self._direction or self._name

    def _prepared(self, present: tuple[bool, ...]) -> Plan:
        """Do all that can fail before a product is run."""
        self._check_open()
        if self._first is not None:
            self._first()
        plan = self._plans.get(present) or self._plan(present)
        plan.binding.check()
        return plan

    def _check_untransformed(self, transformed: bool) -> None:
        if transformed and self._lifetime.ranks is not None:
            raise UnsupportedError(
                f"{self._called}: f communicates, and its products cannot be mapped inside of "
                "other transforms; stack the vectors and call batched() outside of them"
            )

    def _stacked(self, tree: Any, chunk_size: int | None) -> Any:
        """Apply the map to a tree of stacks, together with the ranks that f communicates with."""

        def work() -> Any:
            self._check_open()
            flat = self._arguments.tensors_of(tree, stacked=True)
            stack_sizes(self._arguments, flat)
            return self._results.element_of(self._batched(flat, chunk_size))

        ranks = self._lifetime.ranks
        return work() if ranks is None else ranks.led(f"{self._called}, batched", work)

    def _one(self, present: tuple[bool, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Return the map as a function of the tensors that are there."""

        def one(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rest = iter(parts)
            return tuple(self._apply([next(rest) if here else None for here in present]))

        return one

    def _stack(
        self, plan: Plan, present: tuple[bool, ...], parts: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        grad = torch.is_grad_enabled()

        def mapped() -> Sequence[torch.Tensor]:
            with torch.set_grad_enabled(grad):
                return torch.vmap(self._one(present))(*parts)

        if grad:
            set_grad_mode(False)
        try:
            results = plan.stacked(parts, mapped)
        finally:
            if grad:
                set_grad_mode(True)
        for t in results:
            if t is None:
                break
        else:
            return list(results)  # type: ignore[arg-type]
        return [
            spec.zeros().expand(len(parts[0]), *spec.shape).clone() if t is None else t
            for t, spec in zip(results, self._results.tensors, strict=True)
        ]

    def _apply(self, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Apply the map to flat lists of tensors, None for zero."""
        # Loops, and no context managers: this runs at every call.
        grad = torch.is_grad_enabled()
        present, given = self._whole, tensors
        for t in tensors:
            if t is None:
                present = tuple([t is not None for t in tensors])
                given = [t for t in tensors if t is not None]
            elif grad and t.requires_grad:
                return list(DifferentiableProduct.apply(self, *tensors))  # type: ignore[no-untyped-call]
        ranks = self._lifetime.ranks
        if ranks is not None and not ranks.inside:
            return ranks.run(
                self._called, lambda: self._prepared(present), lambda: self._apply(tensors)
            )
        if self._lifetime.closed:
            self._check_open()
        if self._first is not None:
            self._first()
        plan = self._plans.get(present)
        if plan is None:
            at_once = self._at_once(tensors)
            if at_once is not None:
                return [s.or_zeros(t) for t, s in zip(at_once, self._results.tensors, strict=True)]
            plan = self._plan(present)
        if grad and plan.makes_history:
            set_grad_mode(False)
            try:
                results = plan(given)  # type: ignore[arg-type]
            finally:
                set_grad_mode(True)
        else:
            results = plan(given)  # type: ignore[arg-type]
        if plan.quiet and not self._shortened:
            self._shorten(plan)
        for t in results:
            if t is None:
                break
        else:
            return results  # type: ignore[return-value]
        return [spec.or_zeros(t) for t, spec in zip(results, self._results.tensors, strict=True)]

    def _at_once(
        self, tensors: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None] | None:
        """Apply the map without a plan, if there is a way."""
        return None

    def _shorten(self, plan: Plan) -> None:
        """Look once for the shortest way to call a product of which nothing more will come."""
        lifetime = self._lifetime
        with self._lock:
            self._shortened = True
            alone = lifetime.ranks is None
            fits = (
                alone
                and self._takes_one_tensor
                and (self._results.is_single or self._results.is_row)
            )
            if fits and not lifetime.closed and self._first is None:
                self._short = plan.short_way(lifetime, in_tuple=self._results.is_row)

    @property
    def _takes_one_tensor(self) -> bool:
        """Whether the product is called with one tensor as it is."""
        return False

    def _then(self, other: Product, name: str) -> Product:
        """Return this product followed by another one, as one program: one pass.

        If both are of one point, other points of the same structure take the program over.
        """
        mine, theirs = self._source, other._source
        # Points of one structure share constants: what is known of one says nothing of two.
        pool = self._pool if self._pool is other._pool else Pool()
        return Product(
            lambda: self._proved().then(other._proved(), name, pool),
            self._arguments,
            other._results,
            self._lifetime,
            self._policy,
            mine if mine is theirs else None,
            name,
            pool,
        )

    def _transposed(self) -> Product:
        """Return the other product."""
        with self._lock:
            if self._turned is None:
                self._turned = Product(
                    self._transpose,
                    self._results,
                    self._arguments,
                    self._lifetime,
                    self._policy,
                    pool=self._pool,
                )
            return self._turned

    def _transpose(self) -> BoundProgram:
        program = self._proved()
        name = f"transpose of {program.name}"
        turned = program.made(transpose, name, pool=self._pool)
        if self._policy.check != "never":
            check_built_in(program, turned, transpose)
        ours, theirs = self._arguments.layouts, self._results.layouts
        if ours or theirs:
            turned = turned.made(among_ranks, theirs, ours, pool=self._pool)
        return turned


def stack_sizes(space: Space, flat: Sequence[torch.Tensor | None]) -> None:
    if len(flat) == 1 and flat[0] is not None:
        return
    sizes = {t.shape[0] for t in flat if t is not None}
    if len(sizes) != 1:
        raise StructureError(
            f"batched: expected {space.word}s stacked along their first dimension, all of one "
            f"length, got lengths {sorted(sizes)}"
        )
