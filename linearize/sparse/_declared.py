"""Patterns that the authors of custom Functions declare.

What an opaque method makes of its argument cannot be seen. Its author says which entries are
connected; that is held against the method's own products when it is first used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from .._capture.custom import CustomNode
from .._capture.custom_operations import CustomBackward, CustomJvp
from .._programs.program import Equation
from .._programs.values import Var
from .._spaces.compare import roughly
from .._spaces.space import TensorSpec
from .._torch.graphs import operator_of
from .._torch.names import OpOverload
from ..errors import FunctionContractError, OptionError, StructureError
from ._boolean import in_parts, marked
from ._coloring import count, grouped

Shapes: TypeAlias = list[tuple[int, ...]]
#: What can be declared.
Declared: TypeAlias = Literal["elementwise", "row-wise"] | Callable[[Shapes, Shapes], Any] | Any


class _Declaration:
    """A pattern, and for which uses it was checked."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self.checked: set[Hashable] = set()


_DECLARED: weakref.WeakKeyDictionary[Any, _Declaration] = weakref.WeakKeyDictionary()
#: How often something was declared: patterns that were found before may be larger than now.
_times = [0]


def times_declared() -> int:
    """Return how often a pattern was declared."""
    return _times[0]


def declare(function: Any, pattern: Declared) -> None:
    """Say which inputs the outputs of a custom Function depend on, for sparse Jacobians.

    The methods of a custom Function are opaque: without a declaration each of its outputs counts
    as depending on all of its inputs. When the pattern is first used, with each set of shapes,
    it is compared with the Function's own products.

    Parameters
    ----------
    function
        A `torch.autograd.Function`, or a `torch.library` custom operator with a backward.
    pattern
        "elementwise": each entry of an output depends on the entries of the inputs at the same
        place, inputs being broadcast to the output. "row-wise": each `output[i]` depends on
        `input[i]` of the inputs that have the output's first dimension, and on all of the
        others. Or a matrix, a SciPy sparse one for instance: rows are the entries of the
        outputs, one after the other, columns those of the floating point or complex tensors that
        `forward` takes. Or a function that returns such a matrix, given the list of the shapes
        of these tensors and the list of those of the outputs.

    Raises
    ------
    StructureError
        If what is given first is neither a Function nor a custom operator.
    OptionError
        If there is no such pattern.
    FunctionContractError
        By what uses the pattern: if it does not fit the shapes, or lacks entries.
    """
    key = getattr(function, "_opoverload", function)
    if not isinstance(key, (OpOverload, type)):
        key = getattr(key, "default", None)
    is_function = isinstance(key, type) and issubclass(key, torch.autograd.Function)
    if not is_function and not isinstance(key, OpOverload):
        raise StructureError(
            "declare: expected a torch.autograd.Function or a torch.library custom operator, got "
            f"{function!r}"
        )
    if isinstance(pattern, str):
        if pattern not in ("elementwise", "row-wise"):
            raise OptionError(
                'declare: pattern must be "elementwise", "row-wise", a matrix or a function that '
                f"returns one, got {pattern!r}"
            )
    elif not callable(pattern):
        pattern = sp.csr_array(pattern).astype(bool)
    _DECLARED[key] = _Declaration(pattern)
    _times[0] += 1


def relation(eq: Equation) -> Any:
    """Return the same as `_probing.relation` of an opaque operation; None if nothing was declared.

    Raises `FunctionContractError` if what was declared does not fit.
    """
    if not isinstance(eq.op, (CustomBackward, CustomJvp)):
        return None
    node = eq.op.node
    operator = operator_of(node.cls)
    declaration = _DECLARED.get(node.cls if operator is None else operator)
    if declaration is None:
        return None
    found = _of_equation(eq, eq.op, _blocks(node, declaration.given))
    key = (type(eq.op), node.inputs, node.outputs, tuple(x is None for x in eq.args))
    if key not in declaration.checked:
        _check(eq, node, found)
        declaration.checked.add(key)
    return found


def _blocks(node: CustomNode, given: Any) -> list[list[Any]]:
    """Return for each output and each input of a node which entries are connected."""
    outs = [spec for spec in node.outputs if spec is not None and spec.differentiable]
    if not isinstance(given, str):
        blocks = iter(_cut(node, given, outs))
        return [next(blocks) if s in outs else [None] * len(node.inputs) for s in node.outputs]
    return [
        [None if out is None else _connected(node, given, i, out) for i in node.inputs]
        for out in node.outputs
    ]


def _connected(node: CustomNode, given: str, into: TensorSpec, out: TensorSpec) -> Any:
    a, b = into.shape, out.shape
    if given == "elementwise":
        try:
            read = torch.arange(into.numel).reshape(a).expand(b).reshape(-1).numpy()
        except RuntimeError:
            raise FunctionContractError(
                f"{node.name} was declared to be elementwise, but its input of shape {a} is not "
                f"broadcast to its output of shape {b}; declare a matrix"
            ) from None
        return marked(np.arange(out.numel), read, (out.numel, into.numel))
    same = bool(a) and bool(b) and a[0] == b[0]
    rows = a[0] if same else 1
    ones = np.ones((out.numel // max(rows, 1), into.numel // max(rows, 1)), dtype=bool)
    return sp.kron(sp.eye_array(rows, dtype=bool), ones, format="csr")


def _cut(node: CustomNode, given: Any, outs: Sequence[TensorSpec]) -> list[list[Any]]:
    """Cut the matrix of all arguments and outputs into blocks."""
    arguments = node.arguments
    if callable(given):
        given = sp.csr_array(given([s.shape for _, s in arguments], [s.shape for s in outs]))
    expected = sum(s.numel for s in outs), sum(s.numel for _, s in arguments)
    if given.shape != expected:
        raise FunctionContractError(
            f"{node.name}: the pattern that was declared has shape {given.shape}, expected "
            f"{expected}: entries of the outputs by entries of the arguments"
        )
    columns, row, column = given.astype(bool).tocsc(), 0, 0
    parts = {}
    for position, spec in arguments:
        parts[position] = columns[:, column : column + spec.numel].tocsr()
        column += spec.numel
    blocks = []
    for out in outs:
        blocks.append([parts[p][row : row + out.numel] for p in node.positions])
        row += out.numel
    return blocks


def _of_equation(eq: Equation, op: CustomBackward | CustomJvp, blocks: list[list[Any]]) -> Any:
    """Return the relation of one direction between what varies and what is used."""
    variables = list(dict.fromkeys(eq.inputs()))
    backward = isinstance(op, CustomBackward)
    rows = []
    for k, out in enumerate(eq.outputs):
        if out is None:
            continue
        total = {v: sp.csr_array((out.spec.numel, v.spec.numel), dtype=bool) for v in variables}
        for i, v in enumerate(eq.args):
            block = blocks[i][k] if backward else blocks[k][i]
            if isinstance(v, Var) and block is not None:
                total[v] = total[v] + (block.T if backward else block)
        rows.append([total[v] for v in variables])
    return sp.block_array(rows, format="csr").astype(bool)


def _check(eq: Equation, node: CustomNode, pattern: Any) -> None:
    """Raise unless products have no other entries than a pattern.

    The matrix is found from one product for each of its colours. Times a random vector it must
    give what the method gives for that vector. Complex numbers count as two real ones.
    """
    variables = list(dict.fromkeys(eq.inputs()))
    outs = [v.spec for v in eq.outputs if v is not None]
    pattern = in_parts(pattern, outs, [v.spec for v in variables])
    colors = torch.from_numpy(grouped(pattern))

    def image(x: torch.Tensor) -> torch.Tensor:
        values, start = {}, 0
        for v in variables:
            size = v.spec.numel * (1 + v.spec.dtype.is_complex)
            part = x[start : start + size].to(v.spec.dtype.to_real())
            start += size
            if v.spec.dtype.is_complex:
                part = torch.view_as_complex(part.reshape(-1, 2))
            values[v] = part.reshape(v.spec.shape).to(v.spec.device)
        with torch.inference_mode(False), torch.no_grad():
            results = eq.op(*(values[a] if isinstance(a, Var) else a for a in eq.args))
        flat = []
        for t, out in zip(results, eq.outputs, strict=True):
            if out is not None:
                t = out.spec.or_zeros(t)
                t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
                flat.append(t.reshape(-1).double().cpu())
        return torch.cat(flat)

    images = torch.stack([image((colors == c).double()) for c in range(count(colors.numpy()))])
    entries = pattern.tocoo()
    found = images[colors[entries.col.astype(np.int64)], entries.row].numpy()
    matrix = sp.csr_array((found, (entries.row, entries.col)), shape=pattern.shape)
    x = torch.randn(pattern.shape[1], generator=torch.Generator().manual_seed(5)).double()
    off = np.abs(image(x).numpy() - matrix @ x.numpy())
    limit = max(roughly(s.dtype) for s in outs)
    lacking = np.flatnonzero(~(off <= limit * (abs(matrix) @ x.abs().numpy()) + 1e-300))
    if len(lacking):
        raise FunctionContractError(
            f"{eq.name} depends on more than was declared (linearize.sparse.declare): entry "
            f"{lacking[0]} of its result, and {len(lacking) - 1} others, have other numbers than "
            f"a matrix with the pattern that was declared for {node.name}"
        )
