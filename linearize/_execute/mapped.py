"""Single operations inside `torch.vmap`.

A batched product runs a program under `torch.vmap`. Not every operation can be trusted
there: some have no batching rule, or one that warns, raises or gives wrong numbers. So

- what backward formulas are mostly made of is handed to PyTorch as it stands;
- a few operations have a rule here;
- any other is tried on random numbers, once for each combination of shapes, dtypes and settings:
  where PyTorch's rule does not give what single calls give, the operation is called entry by
  entry, inside the same pass, as user code is that does not say that it takes batches
  (`generate_vmap_rule` of a custom Function).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._programs.aten import schema_of
from .._programs.program import Operation
from .._spaces.compare import close
from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._torch.modes import batch_marker, batch_size, outside_transforms, transform_depth
from .._torch.names import DispatchKey, OpOverload, aten, batched_or_wrapped
from ..errors import UnsupportedError

#: Along which dimension each tensor is stacked; None for one that all entries share.
Dims: TypeAlias = Sequence[int | None]

_TRUSTED = frozenset(
    "add sub mul div neg where sum mean mm bmm mv addcmul alias detach view _unsafe_view reshape "
    "expand t transpose permute unsqueeze squeeze slice select cat conj_physical _conj _neg_view "
    "resolve_conj resolve_neg view_as_real masked_fill".split()
)
#: Entries in a trial: a batch of one could pass for a broadcast.
_TRIAL = 3
#: From how many numbers in one entry on nothing is gained by taking entries together.
_LARGE = 1 << 20
#: The most combinations to remember.
_MOST = 4096


def call(op: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Apply an operation to arguments that may be batches of `torch.vmap`."""
    if isinstance(op, OpOverload):
        if schema_of(op).name in _TRUSTED and not any(map(_is_sparse, args)):
            return op(*args, **kwargs)
        if op is aten.clone.default or op is aten.contiguous.default:
            return _copied(op, args[0], **kwargs)
    given: list[Any] = []
    template = map_leaves(lambda x: _slot(x, given), (list(args), kwargs))
    if isinstance(op, Operation) and op.communicates and batch_size() is not None:
        return _Batched.apply(op, template, *given, batch_marker())  # type: ignore[no-untyped-call]
    if not any(batched_or_wrapped(t) for t in given):
        return op(*args, **kwargs)
    if isinstance(op, Operation) and op.takes_batches:
        try:
            return op(*args, **kwargs)
        except RuntimeError as error:  # it reads a number, say: then entry by entry
            if isinstance(error, torch.OutOfMemoryError):
                raise
    # Inside several transforms the trial says too little.
    small = transform_depth() == 1 and sum(t.numel() for t in given) < _LARGE
    if small and isinstance(op, OpOverload) and op not in _RULES:
        key = _key(op, template, given)
        good = _known.get(key)
        if good is None:
            if len(_known) >= _MOST:
                _known.clear()
            good = _known[key] = _passes(op, template, given)
        if good:
            return op(*args, **kwargs)
    return _Batched.apply(op, template, *given)  # type: ignore[no-untyped-call]


def _is_sparse(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout != torch.strided


class Slot:
    """Stands for a tensor among an operation's arguments, whatever it is at a call."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"tensor {self.index}"


def _slot(x: Any, given: list[Any]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    given.append(x)
    return Slot(len(given) - 1)


def filled(template: Any, values: Sequence[Any]) -> Any:
    """Return nested arguments with values in place of slots."""
    return map_leaves(lambda x: values[x.index] if isinstance(x, Slot) else x, template)


def apply_to(op: Callable[..., Any], template: Any, tensors: Sequence[Any]) -> Any:
    """Call an operation with tensors in place of slots."""
    args, kwargs = filled(template, tensors)
    return op(*args, **kwargs)


def _copied(
    op: OpOverload, t: torch.Tensor, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    """Copy; which of a batch's dimensions are the channels, `torch.vmap` does not ask."""
    if memory_format in (None, torch.preserve_format, torch.contiguous_format):
        kwargs = {} if memory_format is None else {"memory_format": memory_format}
        result: torch.Tensor = op(t, **kwargs)
        return result
    return t.clone()


# -- trials ---------------------------------------------------------------------------------

#: Whether PyTorch's batching rule was found right, by what it may depend on.
_known: dict[Any, bool] = {}


def _key(op: OpOverload, template: Any, given: Sequence[torch.Tensor]) -> Any:
    kinds = tuple(
        (tuple(t.shape), t.dtype, t.device.type, t.layout, batched_or_wrapped(t)) for t in given
    )
    return op, repr(template), kinds


def _passes(op: OpOverload, template: Any, given: Sequence[torch.Tensor]) -> bool:
    """Try an operation on random numbers, batched and one by one."""
    if not op.has_kernel_for_dispatch_key(DispatchKey.FuncTorchBatched):
        return False  # its parts may have no rule either, which raises or warns
    generator = torch.Generator().manual_seed(3)
    shared = [not batched_or_wrapped(t) for t in given]
    specs = [TensorSpec.of(t) for t in given]
    with outside_transforms():
        rows = [
            [
                t if s else spec.random(generator)
                for t, s, spec in zip(given, shared, specs, strict=True)
            ]
            for _ in range(_TRIAL)
        ]
        singly = [_results(apply_to(op, template, row)) for row in rows]
        expected = [torch.stack(column) for column in zip(*singly, strict=True)]
        for where in (0, -1):  # a kernel may rely on the strides of what it is given
            dims = tuple(None if s else where for s in shared)
            columns = zip(given, zip(*rows, strict=True), shared, strict=True)
            stacked = [t if s else torch.stack(column, where) for t, column, s in columns]
            try:
                got = torch.vmap(lambda *ts: _results(apply_to(op, template, ts)), dims)(*stacked)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                return False
            if len(got) != len(expected) or not all(map(close, got, expected)):
                return False
    return True


def _results(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in leaves((out,)) if isinstance(t, torch.Tensor))


# -- rules of our own, and entry by entry ---------------------------------------------------


class _Batched(torch.autograd.Function):
    """An operation that `torch.vmap` leaves to us."""

    @staticmethod
    def forward(op: Callable[..., Any], template: Any, *tensors: Any) -> Any:
        out = apply_to(op, template, tensors)
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, template: Any, *given: Any) -> Any:
        dims, count = in_dims[2:], info.batch_size
        communicates = isinstance(op, Operation) and op.communicates
        if not communicates and op not in _RULES:
            out = by_entry(functools.partial(call_again, op), template, given, dims, count)
            whole = isinstance(out, torch.Tensor)
            return out, 0 if whole else tuple([None if t is None else 0 for t in out])
        stacked = [
            t.expand(count, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(given, dims, strict=True)
        ]
        if not communicates:
            return apply_to(_RULES[op], template, stacked), 0
        if any(map(batched_or_wrapped, given[:-1])):
            raise UnsupportedError(
                f"{op.name}: f communicates, and its products are mapped over two dimensions; "
                "flatten these to one"
            )
        # Once for all entries of a batch: so do all ranks, whatever is zero on one.
        return tuple(apply_to(lambda *args: op.stacked(count, args), template, stacked)), 0


def by_entry(
    op: Callable[..., Any], template: Any, given: Sequence[Any], dims: Dims, count: int
) -> Any:
    """Call an operation for each entry of a batch, and stack its result or results."""
    pairs = list(zip(given, dims, strict=True))
    rows = ([t if d is None else t.select(d, i) for t, d in pairs] for i in range(count))
    outs = [apply_to(op, template, row) for row in rows]
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs)
    return tuple([stack_results(column) for column in zip(*outs, strict=True)])


def call_again(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operation, perhaps on batches of a transform further out."""
    return call(op, args, kwargs)


def stack_results(column: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Stack results, some of which may be undefined, which is zero."""
    like = next((t for t in column if t is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if t is None else t for t in column])


def _strided(op: OpOverload, *given: Any) -> torch.Tensor:
    """Read or write all entries at once; each counts from its own beginning."""
    x, *written = (t for t in given if isinstance(t, torch.Tensor))
    size, stride, *offset = given[1 + len(written) :]
    x = x.contiguous()
    where = [len(x), *size], [x[0].numel(), *stride], (offset[0] if offset else None) or 0
    result: torch.Tensor = call(op, (x, *written, *where), {})
    return result


#: Operations on arguments all stacked along their first dimension.
_RULES: dict[Any, Callable[..., torch.Tensor]] = {
    op: functools.partial(_strided, op)
    for op in (aten.as_strided.default, aten.as_strided_scatter.default)
}
