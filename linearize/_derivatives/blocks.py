"""Whole Jacobians and Hessians as pytrees of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._capture.dependence import derivative
from .._spaces.flat import units
from .._spaces.operators import ChunkSize, Direction, check_chunk_size
from .._spaces.space import Space, TensorSpec, differentiable
from .._torch.names import pytree
from ..errors import OptionError, StructureError, UnsupportedError
from .gradient import gradient_by
from .history import Live, Point, handed_on
from .sight import Sight, seen

ArgNums: TypeAlias = int | tuple[int, ...]


def jacrev(
    func: Callable[..., Any],
    argnums: ArgNums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = "auto",
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of func by its rows.

    The contract of `torch.func.jacrev`; func runs once, and may contain custom Functions.

    Parameters
    ----------
    func
        Returns a tensor or a pytree of tensors.
    argnums
        With respect to which arguments: a position, or a tuple of positions for a tuple of
        Jacobians.
    has_aux
        Whether func returns `(output, aux)`; the result is then `(jacobian, aux)`.
    chunk_size
        Rows computed in one vectorised pass: "auto" for as many as take a quarter of the free
        memory, None for all.

    Returns
    -------
    callable
        Takes the arguments of func. Its result is structured like func's output, with a
        structure like the argument's in place of each leaf, of tensors of shape
        `(*output.shape, *argument.shape)`.

    Raises
    ------
    OptionError
        If an option has a value that it cannot have.
    UnsupportedError
        For complex numbers, if the derivative is linear over the real numbers only. (The
        functions of `torch.func` refuse all complex numbers.)
    """
    return _transform(func, argnums, has_aux, chunk_size, "reverse")


def jacfwd(
    func: Callable[..., Any],
    argnums: ArgNums = 0,
    has_aux: bool = False,
    *,
    chunk_size: ChunkSize = "auto",
    randomness: str = "error",
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of func by its columns.

    The contract of `torch.func.jacfwd`; func runs once, and may contain custom Functions.

    Parameters
    ----------
    func, argnums, has_aux, chunk_size
        As for `jacrev`, columns in place of rows.
    randomness
        For `torch.func`, which this is handed on to inside its transforms. Outside of them
        random draws of func are those of its one run.
    """
    return _transform(func, argnums, has_aux, chunk_size, "forward", randomness=randomness)


def hessian(
    func: Callable[..., Any], argnums: ArgNums = 0, *, chunk_size: ChunkSize = "auto"
) -> Callable[..., Any]:
    """Return a function that computes the Hessian of func.

    The contract of `torch.func.hessian`. func and its backward run once; what follows are
    products with the linearized gradient, in vectorised passes. An output of several numbers
    takes one backward for each of them.

    Parameters
    ----------
    func, argnums, chunk_size
        As for `jacrev`.

    Returns
    -------
    callable
        Takes the arguments of func. Its result is structured like func's output, with a square
        of structures like the argument's in place of each leaf.
    """
    check_chunk_size(chunk_size)

    def hessian_of(*args: Any, **kwargs: Any) -> Any:
        if handed_on(args):
            return torch.func.hessian(func, argnums)(*args, **kwargs)
        g, chosen = _in_chosen(func, argnums, args, kwargs)
        single = isinstance(argnums, int)

        @derivative
        def rows(*primals: Any) -> Any:
            value, sight = seen(g, primals)
            sight.check_regions(value, "hessian")
            return row_gradients(value, primals[0] if single else primals, sight)

        point = Point(rows, chosen, has_aux=False)
        return matrix(point, "auto", chunk_size, unpack=single)

    return hessian_of


def _transform(
    func: Callable[..., Any],
    argnums: ArgNums,
    has_aux: bool,
    chunk_size: ChunkSize,
    direction: Direction,
    **options: Any,
) -> Callable[..., Any]:
    check_chunk_size(chunk_size)
    torchs = torch.func.jacrev if direction == "reverse" else torch.func.jacfwd

    def jacobian_of(*args: Any, **kwargs: Any) -> Any:
        if handed_on(args):
            return torchs(func, argnums, has_aux=has_aux, **options)(*args, **kwargs)
        g, chosen = _in_chosen(func, argnums, args, kwargs)
        forward = "jacfwd" if direction == "forward" else ""
        point = Point(g, chosen, has_aux, forward=forward)
        blocks = matrix(point, direction, chunk_size, unpack=isinstance(argnums, int))
        return (blocks, point.aux) if has_aux else blocks

    return jacobian_of


def _in_chosen(
    func: Callable[..., Any], argnums: ArgNums, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return func as a function of the chosen arguments alone, and these."""
    given = (argnums,) if isinstance(argnums, int) else argnums
    fine = isinstance(given, (tuple, list)) and given and all(isinstance(p, int) for p in given)
    if not fine:
        raise OptionError(
            f"argnums must be a position or a tuple of positions, got {argnums!r} "
            f"({type(argnums).__name__})"
        )
    positions = [p + len(args) if p < 0 else p for p in given]
    if any(not 0 <= p < len(args) for p in positions) or len(set(positions)) != len(positions):
        raise OptionError(f"argnums={argnums!r} does not fit {len(args)} positional arguments")

    def of_chosen(*chosen: Any) -> Any:
        full = list(args)
        for p, x in zip(positions, chosen, strict=True):
            full[p] = x
        return func(*full, **kwargs)

    return of_chosen, tuple(args[p] for p in positions)


def matrix(
    point: Point, direction: Direction, chunk_size: ChunkSize, *, unpack: bool = False
) -> Any:
    """Return the Jacobian of a point: the output's tree, of trees like the tuple of primals.

    With `unpack`, the inner trees are like the only primal.
    """
    J = point.here.jacobian
    J.check_complex_linear("a Jacobian")
    if J._is_mixed and direction == "reverse":
        raise UnsupportedError(
            "a Jacobian from real to complex numbers: its rows are not what the pullback gives, "
            "which keeps real parts only; compute columns (jacfwd, forward-mode)"
        )

    def found(forward: bool) -> list[torch.Tensor]:
        return _blocks(point, forward, chunk_size)

    blocks = J._by_fewer(found) if direction == "auto" else found(direction == "forward")
    here = point.here
    arguments = here.in_space.unpacked() if unpack else here.in_space
    count = len(arguments.tensors)
    rows = [arguments.element_of(blocks[i : i + count]) for i in range(0, len(blocks), count)]
    return here.out_space.element_of(rows)


def _blocks(point: Point, forward: bool, chunk_size: ChunkSize) -> list[torch.Tensor]:
    """Return the blocks, for each leaf of the output one for each leaf of the primals."""
    J = point.here.jacobian
    ours, theirs = (J.in_space, J.out_space) if forward else (J.out_space, J.in_space)
    stacks = [
        torch.empty((ours.size, *leaf.shape), dtype=leaf.dtype, device=leaf.device)
        for leaf in theirs.tensors
    ]
    with torch.no_grad():
        for start, parts in (J.columns if forward else J.rows)(chunk_size):
            for stack, part in zip(stacks, parts, strict=True):
                # Rows of complex Jacobians are the conjugates of what the pullback gives.
                stack[start : start + len(part)] = part if forward else part.conj()
    numbers = _cut(stacks, ours, theirs, forward)
    live = point.live
    if live is None or not torch.is_grad_enabled():
        return numbers

    def again() -> Sequence[torch.Tensor]:
        rows = list(zip(*_images(live, ours, forward), strict=True))
        images = [torch.stack(list(row)) for row in rows]
        return _cut(images if forward else [t.conj() for t in images], ours, theirs, forward)

    return live.attach(numbers, again)


def _images(live: Live, space: Space, forward: bool) -> list[Sequence[torch.Tensor]]:
    """Return the images of the unit vectors, with their history."""
    apply = live.pushforward if forward else live.pullback
    return [apply([t[0] for t in parts]) for _, parts in units(space, 1, "history")]


def _cut(
    stacks: Sequence[torch.Tensor], ours: Space, theirs: Space, forward: bool
) -> list[torch.Tensor]:
    """Cut stacks of columns or rows into blocks of shape (*output.shape, *argument.shape)."""
    pieces: list[Sequence[torch.Tensor]] = [
        stack.split([leaf.numel for leaf in ours.tensors]) for stack in stacks
    ]

    def block(i: int, j: int, out: TensorSpec, arg: TensorSpec) -> torch.Tensor:
        piece = pieces[i][j].reshape(arg.numel, out.numel).mT if forward else pieces[j][i]
        return piece.reshape(out.shape + arg.shape)

    outs, arguments = (theirs, ours) if forward else (ours, theirs)
    return [
        block(i, j, out, arg)
        for i, out in enumerate(outs.tensors)
        for j, arg in enumerate(arguments.tensors)
    ]


def row_gradients(output: Any, primals: Any, sight: Sight) -> Any:
    """Return the Jacobian of an output by one backward for each of its numbers, with history."""

    def rows(y: Any) -> Any:
        if not differentiable(y):
            raise StructureError(
                f"hessian: expected floating point tensors as output, got {type(y).__name__}"
            )
        if y.is_complex():
            raise UnsupportedError(
                f"hessian: f returned complex numbers ({y.dtype}), of which real and imaginary "
                "part have a Hessian each; return them apart, y.real and y.imag"
            )
        numbers = y.reshape(-1) if y.numel() else [y.sum()]
        each = [gradient_by(number, primals, sight) for number in numbers]

        def stacked(*g: Any) -> Any:
            if g[0] is None:
                return None
            return torch.stack(g)[: y.numel()].reshape(y.shape + g[0].shape)

        return pytree.tree_map(stacked, *each)

    result = pytree.tree_map(rows, output)
    sight.warn_if_independent()
    return result
