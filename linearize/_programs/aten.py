"""What is known of ATen operations: schemas, zeros, aliases, reshapes and permutations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from .._torch.names import OpOverload, aten
from .values import Var

#: Operations whose result does not depend on the numbers in their tensor argument.
CONSTANT = frozenset(
    op
    for packet in (
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones "
        "new_full new_empty new_empty_strided"
    ).split()
    for op in (getattr(aten, packet).default,)
)
UNINITIALIZED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
#: Operations that hand the numbers of a tensor to the host.
READS_NUMBERS = frozenset(
    {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
)


#: Backward operations that take gradients of any strides.
_ANY_STRIDES = frozenset(
    (
        "slice_backward select_backward diagonal_backward unfold_backward convolution_backward "
        "native_layer_norm_backward native_batch_norm_backward native_dropout_backward "
        "embedding_dense_backward _scaled_dot_product_flash_attention_for_cpu_backward "
        "_scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward "
        "_scaled_dot_product_cudnn_attention_backward"
    ).split()
)


@dataclasses.dataclass(frozen=True, slots=True)
class Schema:
    """The parts of an operation's schema that recording needs."""

    name: str
    writes: tuple[tuple[int, str], ...]
    is_view: bool
    pointwise: bool


@functools.cache
def schema_of(op: OpOverload) -> Schema:
    """Return what an operation writes, and of what kind it is."""
    writes = tuple(
        (-1 if a.kwarg_only else i, a.name)
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )
    name = op._schema.name.partition("::")[2]
    return Schema(name, writes, bool(op.is_view), torch.Tag.pointwise in op.tags)


@functools.cache
def wants_contiguous(op: OpOverload) -> bool:
    """Whether an operation may go wrong, without a word, for gradients that are not contiguous.

    Formulas of PyTorch's gradients call `contiguous` for such kernels, which leaves no trace
    where there is nothing to do: `native_group_norm_backward` on the CPU reads past strides.
    """
    schema = schema_of(op)
    kernel = schema.name.endswith("_backward") and not schema.pointwise
    return op.namespace == "aten" and kernel and schema.name not in _ANY_STRIDES


@functools.cache
def functional_variant(op: OpOverload) -> OpOverload | None:
    """Return the operation that computes the same without writing to its arguments."""
    if op.namespace != "aten":
        return None
    schema = schema_of(op)
    written = {name for _, name in schema.writes}
    out_style = all(position == -1 for position, _ in schema.writes)
    packet = getattr(aten, schema.name if out_style else schema.name.rstrip("_"), None)
    if packet is None:
        return None

    def signature(o: OpOverload, skip: set[str]) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in o._schema.arguments if a.name not in skip]

    wanted = signature(op, written if out_style else set())
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if not schema_of(candidate).writes and signature(candidate, set()) == wanted:
            return candidate  # type: ignore[no-any-return]
    return None


_COPYING = {aten.clone.default, aten._to_copy.default}


def may_alias(op: Callable[..., Any]) -> bool:
    """Whether an operation's result may share memory with its argument."""
    return not isinstance(op, OpOverload) or _may_alias(op)


@functools.cache  # of PyTorch's own operations: others go with their point
def _may_alias(op: OpOverload) -> bool:
    if op in _COPYING:
        return False
    if schema_of(op).is_view:
        return True
    aliases = any(r.alias_info is not None for r in op._schema.returns)
    # Composite operations (`reshape`) return a view where they can, without saying so.
    return aliases or op.name() in _MAYBE_VIEW


_MAYBE_VIEW = frozenset(
    {
        "aten::reshape",
        "aten::resolve_conj",
        "aten::resolve_neg",
        "aten::contiguous",
        "aten::_unsafe_view",
        "aten::lift_fresh",
        "aten::_reshape_alias",
    }
)


def returns_several(op: Callable[..., Any]) -> bool:
    """Whether an operation returns a tuple or list, be it of one tensor."""
    return not isinstance(op, OpOverload) or _returns_several(op)


@functools.cache
def _returns_several(op: OpOverload) -> bool:
    returns = op._schema.returns
    return len(returns) != 1 or str(returns[0].type) == "List[Tensor]"


#: What shows a value in another shape.
RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
    }
)


def permutation(op: Any, args: Any) -> tuple[int, ...] | None:
    """Return which dimension of the argument each dimension of a permuted value is."""
    if op not in _PERMUTATIONS or not isinstance(args[0], Var):
        return None
    n = len(args[0].spec.shape)
    order = list(range(n))
    if op is aten.permute.default:
        return tuple([d % n for d in args[1]])
    if n > 1:
        i, j = (0, 1) if op is aten.t.default else (args[1] % n, args[2] % n)
        order[i], order[j] = order[j], order[i]
    return tuple(order)


_PERMUTATIONS = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})


#: Pointwise, linear in the first argument, without the tag that says so.
UNTAGGED_POINTWISE = frozenset(
    "softplus_backward hardtanh_backward native_dropout_backward masked_fill tril triu "
    "threshold_backward hardsigmoid_backward hardswish_backward mish_backward "
    "leaky_relu_backward elu_backward logit_backward".split()
)

#: Pointwise, multiplying each entry of the argument by a number; other operations that are
#: pointwise may choose between the entry and zero, which is not the same for infinite entries.
MULTIPLYING = frozenset(
    "neg mul div alias detach clone _to_copy tanh_backward sigmoid_backward gelu_backward "
    "silu_backward mish_backward elu_backward leaky_relu_backward softplus_backward "
    "log_sigmoid_backward native_dropout_backward".split()
)


def chooses(op: OpOverload) -> bool:
    """Whether an operation is pointwise and may choose between an entry and zero."""
    schema = schema_of(op)
    return (schema.pointwise or schema.name in UNTAGGED_POINTWISE) and (
        schema.name not in MULTIPLYING
    )
