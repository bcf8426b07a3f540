"""Checks of linearizations, for users' own functions and custom Functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ._capture.capture import capture
from ._capture.contexts import ContextRecords
from ._capture.custom import CustomNode
from ._points.linearization import Linearization
from ._points.linearizer import Linearizer
from ._spaces.space import TensorSpec, check_no_layouts, differentiable
from ._spaces.trees import tangent_leaves
from ._torch.names import pytree
from .errors import CheckFailure, LinearizeError

__all__ = ["Report", "check_linearization"]


def __dir__() -> list[str]:
    return __all__


Tensors = list[torch.Tensor]
#: The largest of a number over the ranks that f communicates with, and sums of several.
Most = Callable[[float], float]
Total = Callable[[Sequence[float]], list[float]]


def _as_it_is(number: float) -> float:
    return number


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_linearization` measured.

    Attributes
    ----------
    runs
        How often f ran for the linearization and all products.
    jvp_error
        Largest difference of J·v from central finite differences, relative to the largest
        entry.
    adjoint_error
        ⟨u, J·v⟩ - ⟨Jᵀ·u, v⟩, relative to ‖u‖·‖J·v‖ + ‖Jᵀ·u‖·‖v‖.
    functions
        The custom Functions between value and primals, in order.
    """

    runs: int
    jvp_error: float
    adjoint_error: float
    functions: tuple[str, ...]


def check_linearization(
    f: Callable[..., Any],
    *primals: Any,
    dtype: torch.dtype | None = torch.float64,
    rtol: float = 1e-5,
    step: float = 1e-4,
    directions: int = 2,
    seed: int = 0,
    opaque: Any = "error",
) -> Report:
    """Check value, products and number of runs of a function linearized at a point.

    J·v is compared with fourth-order central finite differences of f, Jᵀ·u with J·v through
    the adjoint identity ⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩ (the real part, for complex numbers), each at
    random directions and twice, because a second call must give what the first gave.

    Parameters
    ----------
    f
        The function. It must compute the same each time.
    *primals
        The point; pytrees of tensors and other leaves.
    dtype
        Floating point primals are converted to it (complex ones to its complex partner),
        because finite differences need double precision. None leaves them as they are.
    rtol
        The largest `jvp_error` that passes. The adjoint identity must hold to 1e-3 of it.
    step
        The step of the finite differences, relative to the largest entry of the primals. If
        they differ by more than `rtol`, a tenth and a hundredth of it are tried as well.
    directions
        How many random pairs (v, u) are tried.
    seed
        Of the random directions. The global random state stays untouched.
    opaque
        As for `Linearizer`.

    Returns
    -------
    Report
        What was measured, the largest of all directions.

    Raises
    ------
    CheckFailure
        If a check fails. The message names the custom Function at fault where there is one.
    MissingDerivativeError
        If a custom Function lacks a method that cannot be derived.
    """
    primals = pytree.tree_map(lambda x: _converted(x, dtype), primals)
    runs = 0

    def counted(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        return f(*args)

    here = Linearizer(counted, maxsize=0, opaque=opaque).at(*primals)
    check_no_layouts(here.in_space, "check_linearization")
    generator = torch.Generator().manual_seed(seed)
    ranks = here._lifetime.ranks
    most: Most = _as_it_is if ranks is None else ranks.most
    total: Total = list if ranks is None else ranks.total
    _check_value(f, primals, here, most)
    functions = tuple(node.name for node, _ in _custom_nodes(f, primals))
    jvp_error = adjoint_error = 0.0
    for _ in range(directions):
        v = [spec.random(generator) for spec in here.in_space.tensors]
        u = [spec.random(generator) for spec in here.out_space.tensors]
        jv = _twice(here.jvp_fn._apply, v, "jvp_fn", most)
        jtu = _twice(here.vjp_fn._apply, u, "vjp_fn", most)
        differences = _finite_differences(
            lambda x: _values(f, primals, x), _flat(primals), v, step, most
        )
        off = _smallest((most(_difference(jv, d)) for d in differences), rtol)
        jvp_error = max(jvp_error, off)
        adjoint_error = max(adjoint_error, _adjoint_error(u, jv, jtu, v, total))
    report = Report(runs, jvp_error, adjoint_error, functions)
    if jvp_error > rtol or adjoint_error > rtol * 1e-3:
        _explain(f, primals, report, rtol, step)
    if runs != 1:
        raise CheckFailure(f"f ran {runs} times for one point")
    return report


def _explain(
    f: Callable[..., Any], primals: Any, report: Report, rtol: float, step: float
) -> None:
    """Raise with the name of what is at fault."""
    faults: list[str] = []
    for node, arguments in _custom_nodes(f, primals):
        faults.extend(_faults(node, arguments, rtol, step))
    if not faults and report.functions:
        faults = [f"no single custom Function is at fault (in f: {', '.join(report.functions)})"]
    if report.jvp_error > rtol:
        what = f"J·v differs from finite differences by {report.jvp_error:.1e} (relative)"
    else:
        what = f"J·v and Jᵀ·u are not adjoint: {report.adjoint_error:.1e} (relative)"
    raise CheckFailure("; ".join([what, *dict.fromkeys(faults)]))


def _faults(
    node: CustomNode, arguments: tuple[Any, ...] | None, rtol: float, step: float
) -> Iterator[str]:
    """Compare one custom Function's methods with finite differences of its forward."""
    generator = torch.Generator().manual_seed(1)
    v = [spec.random(generator) for spec in node.inputs]
    if arguments is None:
        return
    inside = [
        TensorSpec.of(y) if differentiable(y) else None for y in _outputs(node, arguments, {})
    ]
    u = [spec.random(generator) if spec is not None else None for spec in inside]

    def run(x: Tensors) -> Tensors:
        given = dict(zip(node.positions, x, strict=True))
        return [y for y in _outputs(node, arguments, given) if differentiable(y)]

    at = [arguments[i].detach() for i in node.positions]
    known = [t for t in u if t is not None]

    def smallest(error_of: Callable[[Tensors], float]) -> float:
        return _smallest(map(error_of, _finite_differences(run, at, v, step)), rtol)

    with torch.no_grad():
        if node.has_jvp:
            try:
                got = node.jvp(v, [spec is not None for spec in inside])
            except LinearizeError as failure:
                yield str(failure)
                return
            jv = [t for t, spec in zip(got, inside, strict=True) if spec is not None]
            given = [t for t in jv if t is not None]
            error = smallest(lambda d: _difference(given, d))
            if error > rtol:
                yield (
                    f"{node.name}.jvp differs from finite differences of its forward by "
                    f"{error:.1e}"
                )
        if node.has_backward:
            back = node.backward(u)
            jtu = [spec.or_zeros(t) for t, spec in zip(back, node.inputs, strict=True)]
            error = smallest(lambda d: _adjoint_error(known, d, jtu, v))
            if error > rtol:
                yield (
                    f"{node.name}.backward is not the transpose of finite differences of its "
                    f"forward: off by {error:.1e}"
                )


def _outputs(node: CustomNode, arguments: tuple[Any, ...], given: dict[int, Any]) -> list[Any]:
    call = [
        given.get(i, a).clone().detach() if isinstance(a, torch.Tensor) else a
        for i, a in enumerate(arguments)
    ]
    with torch.no_grad():
        result = node.cls.apply(*call)
    return list(result) if isinstance(result, (tuple, list)) else [result]


class _Arguments(ContextRecords):
    """Records that also keep what `forward` was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[int, tuple[Any, ...] | None] = {}

    def _created(self, ctx: Any, arguments: tuple[Any, ...] | None) -> None:
        super()._created(ctx, arguments)
        kept = arguments
        if arguments is not None:
            kept = tuple(
                a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments
            )
        self.arguments[id(ctx)] = kept


def _custom_nodes(
    f: Callable[..., Any], primals: Any
) -> list[tuple[CustomNode, tuple[Any, ...] | None]]:
    """Run f once more and return its custom nodes with their arguments, in order."""
    records = _Arguments()
    captured = capture(f, primals, {}, range(len(primals)), records=records)
    graph = captured.graph()
    nodes = [graph.custom[n] for n in reversed(graph.order) if n in graph.custom]
    return [
        (node, records.arguments.get(id(node.ctx)))
        for node in nodes
        if isinstance(node, CustomNode)
    ]


def _check_value(f: Callable[..., Any], primals: Any, here: Linearization, most: Most) -> None:
    with torch.no_grad():
        again = [t for t in pytree.tree_leaves(f(*primals)) if isinstance(t, torch.Tensor)]
    value = [t for t in pytree.tree_leaves(here.value) if isinstance(t, torch.Tensor)]
    for i, (a, b) in enumerate(zip(value, again, strict=True)):
        if most(0.0 if torch.allclose(a, b, rtol=1e-6, equal_nan=True) else 1.0):
            raise CheckFailure(
                f"the value (leaf {i}) differs from that of a second run of f: f must be "
                "deterministic to be checked"
            )


def _twice(
    product: Callable[[Tensors], Tensors], argument: Tensors, name: str, most: Most
) -> Tensors:
    first = product([t.clone() for t in argument])
    again = product([t.clone() for t in argument])
    # Later calls may run a simplified program, which rounds differently.
    limit = max((1e4 * torch.finfo(t.dtype).eps for t in first), default=0.0)
    if most(_difference(_finite(first), _finite(again)) - limit) > 0:
        raise CheckFailure(f"{name} gave another result when it was called a second time")
    return first


def _finite(tensors: Tensors) -> Tensors:
    return [torch.nan_to_num(t) if not t.is_complex() else t for t in tensors]


def _converted(x: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(x, torch.Tensor) or dtype is None or not differentiable(x):
        return x
    return x.detach().to(dtype.to_complex() if x.is_complex() else dtype)


def _flat(tree: Any) -> Tensors:
    return [t.detach() for t in tangent_leaves(tree)]


def _values(f: Callable[..., Any], primals: Any, flat: Tensors) -> Tensors:
    rest = iter(flat)
    moved = pytree.tree_map(lambda x: next(rest) if differentiable(x) else x, primals)
    with torch.no_grad():
        return _flat(f(*moved))


def _finite_differences(
    run: Callable[[Tensors], Tensors],
    at: Tensors,
    v: Tensors,
    step: float,
    most: Most = _as_it_is,
) -> Iterator[Tensors]:
    """Yield (8 (f₊ - f₋) - (f₊₊ - f₋₋)) / 12h for smaller and smaller h, Fornberg (1988), table 1.

    Several, because a step that suits one entry of a primal may be far too long for another.
    """
    size, length = most(_largest(at, 1.0)), most(_largest(v, 1.0))
    first = step * max(size, 1e-2) / length
    for h in (first, first / 10, first / 100):

        def moved(k: int, h: float = h) -> Tensors:
            return run([x + k * h * t for x, t in zip(at, v, strict=True)])

        yield [
            (8 * (p1 - m1) - (p2 - m2)) / (12 * h)
            for p1, m1, p2, m2 in zip(moved(1), moved(-1), moved(2), moved(-2), strict=True)
        ]


def _smallest(errors: Iterator[float], enough: float) -> float:
    """Return the smallest error, or the first that is small enough."""
    smallest = math.inf
    for error in errors:
        smallest = min(smallest, error)
        if smallest <= enough:
            break
    return smallest


def _difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return _relative(_largest([x - y for x, y in zip(a, b, strict=True)]), _largest((*a, *b)))


def _largest(tensors: Sequence[torch.Tensor], default: float = 0.0) -> float:
    sizes = [float(t.abs().max()) for t in tensors if t.numel()]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=default)


def _relative(off: float, scale: float) -> float:
    if not math.isfinite(off):
        return math.inf
    return off / scale if scale else off


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum(
        float(torch.vdot(x.reshape(-1), y.reshape(-1)).real) for x, y in zip(a, b, strict=True)
    )


def _adjoint_error(
    u: Tensors, jv: Tensors, jtu: Tensors, v: Tensors, total: Total = list
) -> float:
    pairs = (u, u), (jv, jv), (jtu, jtu), (v, v), (u, jv), (jtu, v)
    uu, jj, tt, vv, forth, back = total([_dot(a, b) for a, b in pairs])
    return _relative(abs(forth - back), math.sqrt(uu * jj) + math.sqrt(tt * vv))
