"""The operators of PyTorch's database, their samples, and a sample as a function of tensors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

SEED = 20


def numeric(leaf: Any) -> bool:
    """Whether a leaf is a tensor that can have a derivative."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def seed(number: int) -> None:
    """Reset all generators that an operator or a sample may draw from."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - the database draws from this one
    random.seed(number)


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


@functools.cache
def _by_name() -> dict[str, Any]:
    return {full_name(op): op for op in op_db}


def names(dtype: torch.dtype) -> list[str]:
    """Return the operators that are differentiable at all and take this dtype."""
    return [n for n, op in _by_name().items() if op.supports_autograd and dtype in op.dtypes]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One sample of an operator, as a function of the tensors that require grad."""

    run: Callable[..., list[torch.Tensor]]
    primals: list[torch.Tensor]
    sample: Any
    #: The same sample in double precision.
    wider: Callable[[], Problem]


def _problem(op: Any, sample: Any, tree: Any) -> Problem:
    def is_primal(leaf: Any) -> bool:
        return numeric(leaf) and leaf.requires_grad

    def run(*primals: torch.Tensor) -> list[torch.Tensor]:
        given = iter(primals)
        first, args, kwargs = pytree.tree_map(lambda t: next(given) if is_primal(t) else t, tree)
        seed(SEED)
        # The wrapper keeps arguments in the operator's domain: Hermitian for `eigh`, and so on.
        output = op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            output = sample.output_process_fn_grad(output)
        return [t for t in pytree.tree_leaves(output) if numeric(t)]

    def widen(leaf: Any) -> Any:
        if not numeric(leaf):
            return leaf
        wide = torch.complex128 if leaf.is_complex() else torch.float64
        return leaf.detach().to(wide).requires_grad_(leaf.requires_grad)

    return Problem(
        run,
        [t.detach() for t in pytree.tree_leaves(tree) if is_primal(t)],
        sample,
        lambda: _problem(op, sample, pytree.tree_map(widen, tree)),
    )


def problems(name: str, dtype: torch.dtype, limit: int | None) -> Sequence[Problem]:
    """Return the first samples of an operator (all of them if there is no limit)."""
    op = _by_name().get(name)
    if op is None:
        raise LookupError(f"{name} is not in the database of torch {torch.__version__}")
    seed(SEED)
    # All are made before the first is run: a run resets the generators.
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=True), limit))
    return [_problem(op, s, (s.input, s.args, s.kwargs)) for s in samples]
