"""`Linearization`, a function linearized at one point."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._capture.capture import Capture
from .._execute.binding import BoundProgram
from .._forms.compiled import Options
from .._inspect import kept
from .._inspect.drawing import Drawing, draw
from .._inspect.page import page
from .._inspect.summary import Summary, costs
from .._programs.residuals import Residual
from .._reuse.shared import Structures
from .._simplify.passes import explain, simplify
from .._spaces.memory import total_bytes
from .._spaces.trees import flatten
from .._text.tables import code, framed
from .._torch.pieces import Piece
from .._torch.sharded import local_of
from ..errors import ClosedError, CopyError, UnsupportedError
from .closures import JvpFn, VjpFn
from .first_use import check_adjoint, check_before_use, check_statistics
from .jacobian import Jacobian
from .lifetime import Lifetime
from .policy import Policy
from .programs import PointPrograms

__all__ = ["Linearization", "ProgramPair"]


class ProgramPair:
    """The two linear programs of a point; prints both.

    Attributes
    ----------
    pushforward : BoundProgram
        The program of `jvp_fn`. Readable by `print`, as the other one.
    pullback : BoundProgram
        The program of `vjp_fn`.
    pieces : tuple
        The parts of f that `torch.compile` was asked to compile: `name`, and `reason` why one
        ran as it is, empty if it ran compiled. Printed below the programs.
    """

    __slots__ = ("pieces", "pullback", "pushforward")

    def __init__(
        self, pushforward: BoundProgram, pullback: BoundProgram, pieces: Sequence[Piece] = ()
    ) -> None:
        self.pushforward = pushforward
        self.pullback = pullback
        self.pieces = tuple(pieces)

    def simplified(self) -> ProgramPair:
        """Return the programs as they are run when they are run often."""
        return ProgramPair(
            self.pushforward.made(simplify), self.pullback.made(simplify), self.pieces
        )

    def explain(self) -> str:
        """Tell what each simplification does to each program."""
        return f"{explain(self.pushforward)}\n{explain(self.pullback)}"

    def draw(self, limit: int = 30) -> Drawing:
        """Draw both programs beside each other.

        Parameters
        ----------
        limit
            The most equations of each that are drawn. Of longer programs the beginning and the
            end are drawn, with one box for what lies between.

        Returns
        -------
        Drawing
            Shown by notebooks; `save("programs.svg")` writes it.
        """
        return draw([self.pushforward, self.pullback], limit)

    def __str__(self) -> str:
        pieces = "\n".join(map(str, self.pieces))
        return "\n\n".join([str(self.pushforward), str(self.pullback), *filter(None, [pieces])])

    def _repr_html_(self) -> str:
        return framed(self.draw().svg)

    def __repr__(self) -> str:
        return f"ProgramPair({self.pushforward!r}, {self.pullback!r})"


class Guarded:
    """What f returned: each caller gets lists and dicts of its own, and no changed tensor.

    Parameters
    ----------
    tree
        What f returned.
    name
        What it is called in errors.

    Attributes
    ----------
    stamps
        The tensors, as they were.
    """

    def __init__(self, tree: Any, name: str) -> None:
        self._leaves, self._structure = flatten(tree)
        self.stamps = [Residual(t, name) for t in self._leaves if isinstance(t, torch.Tensor)]

    def get(self) -> Any:
        """Return it, if it is as it was."""
        for r in self.stamps:
            r.check()
        return self._structure.unflatten(self._leaves)


class Linearization:
    """A function linearized at one point: its value and its two products.

    Made by `Linearizer.at`. Can be used as a context manager, which closes it at the end.

    Attributes
    ----------
    jvp_fn : JvpFn
        `jvp_fn(*tangents)` is J·v.
    vjp_fn : VjpFn
        `vjp_fn(cotangent)` is Jᵀ·u.
    in_space : Space
        Of tangents: the structure, shapes and dtypes of the primals.
    out_space : Space
        Of cotangents: those of the value.
    """

    def __init__(
        self,
        captured: Capture,
        policy: Policy | None = None,
        notify: Callable[[bool], None] | None = None,
        structures: Structures | None = None,
        *,
        alone: bool = True,
    ) -> None:
        policy = policy or Policy()
        if alone and captured.records.communicates():
            raise UnsupportedError(
                "f communicates with other ranks, which this function does not take part in: use "
                "Linearizer(f).at(...) and its products"
            )
        self._name, self._traced = captured.name, captured.trace is not None
        self._simplifies, self._pieces = policy.simplify, captured.pieces
        structures = structures or Structures(policy.shared)
        source = PointPrograms(captured, structures, check=policy.check)
        self._lifetime = Lifetime(notify)
        self._lifetime.register(self)
        self.in_space = captured.in_space
        self.out_space = captured.out_space
        self._value = Guarded(captured.value, "the value")
        self._aux = Guarded(captured.aux, "aux")
        self._external = {local_of(t).untyped_storage().data_ptr() for t in captured.leaves}
        self._source = weakref.ref(source)
        common = (self._lifetime, policy, source)
        self.jvp_fn = JvpFn(source.pushforward, self.in_space, self.out_space, *common)
        self.vjp_fn = VjpFn(source.pullback, self.out_space, self.in_space, *common)
        if policy.check == "always":
            together = captured.records.communicates()
            check_before_use(self.jvp_fn, self.vjp_fn, held=together)
        check_statistics((self.jvp_fn, self.vjp_fn), source.moving)

    @property
    def value(self) -> Any:
        """The value of f at the point, detached, in f's structure. Not to be changed in place.

        Raises
        ------
        StalenessError
            If a tensor of it was changed in place, or shares memory with one that was.
        ClosedError
            If the linearization was closed.
        """
        self._check_open()
        return self._value.get()

    @property
    def aux(self) -> Any:
        """What f returned beside its value (`has_aux=True`), detached; else None.

        Raises
        ------
        StalenessError
            If a tensor of it was changed in place, or shares memory with one that was.
        ClosedError
            If the linearization was closed.
        """
        self._check_open()
        return self._aux.get()

    @property
    def jacobian(self) -> Jacobian:
        """The Jacobian as a linear operator, for `J @ v`, `J.T @ u`, `J.gram()`, ...

        It costs nothing to make, and keeps the two products only.

        Raises
        ------
        ClosedError
            If the linearization was closed.
        """
        self._check_open()
        return Jacobian(self.jvp_fn, self.vjp_fn)

    @property
    def program(self) -> ProgramPair:
        """The two linear programs, recorded if they are not yet. Readable by `print`."""
        self._check_open()
        return ProgramPair(self.jvp_fn.program, self.vjp_fn.program, self._pieces)

    def compile(self, **options: Any) -> None:
        """Have the programs of both products compiled, at their next calls.

        Points with the same structure use what was compiled.

        Parameters
        ----------
        **options
            For `torch.compile`, as of `Linearizer(compile=...)`.

        Raises
        ------
        ClosedError
            If the linearization was closed.
        """
        self._check_open()
        chosen = Options.of(options)
        assert chosen is not None
        for product in (self.jvp_fn, self.vjp_fn):
            product._compile(chosen)

    def check(self) -> None:
        """Check now that the two products are adjoint, on one random pair.

        Calls each custom Function's `jvp` and `backward` once more.

        Raises
        ------
        AdjointError
            If they are not. The message names the first operation or custom Function at which
            they part.
        MissingDerivativeError
            If one of the two cannot be had.
        ClosedError
            If the linearization was closed.
        """

        def check() -> None:
            self._check_open()
            check_adjoint(self.jvp_fn, self.vjp_fn)

        ranks = self._lifetime.ranks
        if ranks is None:
            check()
        else:
            ranks.led("a check", check)

    @property
    def nbytes(self) -> int:
        """Bytes of the residuals, each storage once, without the primals' own."""
        source = self._source()
        kept = [*self.jvp_fn._kept(), *self.vjp_fn._kept(), *(source.kept() if source else ())]
        return total_bytes(kept, excluding=self._external)

    def residuals(self) -> kept.Residuals:
        """Return a list of every tensor that is kept now: size, operation, line of f.

        Nothing is recorded for it. Before the first product these are the tensors that the
        autograd graph saved, then those that the linear programs read; the bytes of all are
        `nbytes`. Lines are known with `Linearizer(f, trace=True)`.

        Raises
        ------
        ClosedError
            If the linearization was closed.
        """
        self._check_open()
        source = self._source()
        made = {p._name: p._programs() for p in (self.jvp_fn, self.vjp_fn)}
        waiting = (None, None) if source is None else source.waiting()
        return kept.residuals(made, waiting, self._external, self._traced)

    def summary(self) -> Summary:
        """Return tables of the operations, of what a product costs, and of what is kept.

        Both programs are recorded for it if they are not yet. Costs are estimated from shapes
        (see `linearize.inspection.Cost`).

        Raises
        ------
        ClosedError
            If the linearization was closed.
        """
        self._check_open()
        jvp_fn, vjp_fn = self.jvp_fn, self.vjp_fn
        estimates = costs(
            {
                jvp_fn._direction: lambda: jvp_fn.program,
                vjp_fn._direction: lambda: vjp_fn.program,
            }
        )
        return Summary(self._name, self._map(), estimates, self.residuals())

    def report(self, path: str | os.PathLike[str], *, limit: int = 30) -> Path:
        """Write everything that can be seen inside to one HTML page that needs nothing else.

        Parameters
        ----------
        path
            Where; an existing file is replaced.
        limit
            The most equations of each program that are drawn.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        ClosedError
            If the linearization was closed.
        """
        summary = self.summary()
        programs: dict[str, BoundProgram] = {}
        for product in (self.jvp_fn, self.vjp_fn):
            if not isinstance(summary.costs[product._direction], str):
                programs[product._direction] = product.program
        path = Path(path)
        text = page(summary, programs, limit, simplifies=self._simplifies)
        path.write_text(text, encoding="utf-8")
        return path

    @property
    def closed(self) -> bool:
        """Whether the linearization was closed."""
        return self._lifetime.closed

    def close(self) -> None:
        """Release everything that is kept for the products; they cannot be used any more."""
        self._lifetime.close()

    def _release(self) -> None:
        self._value = self._aux = Guarded(None, "")

    def _fresh(self) -> bool:
        """Whether nothing that the point gives was changed in place, and it is open."""
        return not self.closed and not any(
            r.changed()
            for r in (
                *self._value.stamps,
                *self._aux.stamps,
                *self.jvp_fn._residuals(),
                *self.vjp_fn._residuals(),
            )
        )

    def _intact(self) -> bool:
        """Whether the same holds, and of what the graph keeps too."""
        source = self._source()
        return self._fresh() and not (source is not None and source.changed())

    def _size(self) -> int:
        return self.nbytes

    def _check_open(self) -> None:
        if self._lifetime.closed:
            raise ClosedError(
                "this linearization was closed (at the end of a `with` block, or by close()); "
                "linearize anew with at(...)"
            )

    def __enter__(self) -> Linearization:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_whole(self, what: str) -> None:
        """Raise if the vectors are parts, which what is called by name does not know of."""
        if self.in_space.group is not None:
            raise UnsupportedError(
                f"{what}: f communicates, so that each rank has parts of the vectors only, which "
                "this does not support; use the products, linearize.distributed.dot and norm, or "
                "linearize.scipy.aslinearoperator"
            )

    def _map(self) -> str:
        return f"{self.in_space} -> {self.out_space}"

    def __repr__(self) -> str:
        return "<Linearization closed>" if self.closed else f"<Linearization {self._map()}>"

    def _repr_html_(self) -> str:
        title = f"<strong>Linearization</strong> of {code(self._name)}"
        if self.closed:
            return framed(f"<p>{title}, closed</p>")
        shown = Summary(self._name, "", {}, self.residuals())
        return framed(f"<p>{title}<br>{code(self._map())}</p>{shown._memory_html()}")

    def __reduce__(self) -> Any:
        raise CopyError("a Linearization cannot be copied or pickled: it holds graph contexts")
