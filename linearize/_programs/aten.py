"""What is known of ATen operations.

Rules of one transform stand where that is made; what an operation *is* stands here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._spaces.nested import leaves
from .._torch.names import OpOverload, aten
from .values import Var


def operations(names: str) -> list[OpOverload]:
    """Return operations by their names; `add` stands for `add.default`."""
    parts = (name.partition(".") for name in names.split())
    return [getattr(getattr(aten, packet), overload or "default") for packet, _, overload in parts]


#: Operations whose result does not depend on the numbers in their tensor argument.
CONSTANT = frozenset(
    operations(
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones "
        "new_full new_empty new_empty_strided"
    )
)
UNINITIALIZED = frozenset(
    operations("empty.memory_format empty_like empty_strided new_empty new_empty_strided")
)
#: What sets entries to a constant where a mask says so.
MASKS = frozenset(operations("where.self masked_fill.Tensor masked_fill_.Tensor"))
#: Operations that hand the numbers of a tensor to the host.
READS_NUMBERS = frozenset(operations("_local_scalar_dense equal is_nonzero"))
#: What puts the entries of one argument elsewhere, or leaves some out, by name.
MOVES = frozenset(
    (
        "alias detach clone _to_copy view _unsafe_view _reshape_alias reshape t transpose permute "
        "unsqueeze squeeze expand slice select diagonal split split_with_sizes unbind unfold "
        "roll flip tril triu slice_backward select_backward diagonal_backward movedim narrow "
        "repeat gather index index_select contiguous lift_fresh resolve_conj resolve_neg "
        "diag_embed rot90 pixel_shuffle pixel_unshuffle take"
    ).split()
)
#: What puts the entries of several elsewhere, or new ones beside them.
JOINED = frozenset("cat stack constant_pad_nd".split())
#: Linear in the first argument, which stands alone.
LINEAR_FIRST = MOVES | frozenset(
    (
        "as_strided as_strided_copy view_as_real view_as_complex _conj conj_physical _neg_view "
        "real imag neg _efficientzerotensor squeeze_ trace diag sum mean cumsum nansum "
        "unfold_backward embedding_dense_backward fft_fft _fft_c2c _fft_r2c _fft_c2r"
    ).split()
)
#: Linear in all arguments jointly.
JOINTLY_LINEAR = frozenset(("add sub cat stack").split())
#: Linear in each of two.
BILINEAR = frozenset(("mul mm bmm mv dot vdot").split())
#: Derivatives, linear in the gradient, which comes first.
GRADIENT_FIRST = frozenset(
    (
        "tanh_backward sigmoid_backward silu_backward gelu_backward threshold_backward "
        "softplus_backward hardtanh_backward leaky_relu_backward elu_backward mish_backward "
        "hardswish_backward hardsigmoid_backward logit_backward native_dropout_backward "
        "_softmax_backward_data _log_softmax_backward_data native_layer_norm_backward "
        "native_batch_norm_backward native_group_norm_backward convolution_backward "
        "avg_pool2d_backward max_pool2d_with_indices_backward _adaptive_avg_pool2d_backward "
        "nll_loss_backward mse_loss_backward"
    ).split()
)
#: Operations that put numbers elsewhere: linear wherever what they put in between is zero.
PLACING = frozenset(
    (
        "where scatter scatter_add index_put _index_put_impl_ index_put_ masked_fill "
        "constant_pad_nd diagonal_scatter select_scatter slice_scatter as_strided_scatter "
        "index_add index_copy index_fill masked_scatter masked_select put take "
        "masked_fill_ _unsafe_masked_index _unsafe_masked_index_put_accumulate _unsafe_index_put"
    ).split()
)
#: Operations that are linear in the argument at this place, whatever the others are.
LINEAR_AT = {
    "linalg_solve_triangular": (1,),
    "linalg_lu_solve": (2,),
    "cholesky_solve": (0,),
    "triangular_solve": (0,),
    "_trilinear": (0, 1, 2),
    "convolution": (0, 1),
    "linalg_cross": (0, 1),
}
#: The same for the first argument, by the beginning of the name.
LINEAR_FIRST_KINDS = (
    "upsample_",
    "_upsample_",
    "reflection_pad",
    "replication_pad",
    "avg_pool",
    "_adaptive_avg_pool",
    "grid_sampler",
    "im2col",
    "col2im",
)
#: Operations that put numbers elsewhere and compute nothing.
COPIES = frozenset(
    "clone _to_copy cat stack index_select gather index roll flip repeat slice_backward "
    "select_backward diagonal_backward copy_ as_strided_copy permute_copy constant_pad_nd".split()
)
#: Pointwise, linear in the first argument, without the tag that says so.
_UNTAGGED_POINTWISE = frozenset(
    "softplus_backward hardtanh_backward native_dropout_backward masked_fill tril triu "
    "threshold_backward hardsigmoid_backward hardswish_backward mish_backward "
    "leaky_relu_backward elu_backward logit_backward".split()
)
#: Pointwise, multiplying each entry of the argument by a number; other operations that are
#: pointwise may choose between the entry and zero, which is not the same for infinite entries.
MULTIPLYING = frozenset(
    "neg mul div alias detach clone _to_copy tanh_backward sigmoid_backward gelu_backward "
    "silu_backward mish_backward elu_backward leaky_relu_backward softplus_backward "
    "log_sigmoid_backward native_dropout_backward mse_loss_backward smooth_l1_loss_backward "
    "huber_loss_backward".split()
)
#: Pointwise without the tag too, in one argument or several.
JOINED_BY_ENTRY = frozenset(
    (
        "real imag _conj _neg_view where rsub mse_loss_backward smooth_l1_loss_backward "
        "huber_loss_backward"
    ).split()
)
_UNREPEATABLE = frozenset(
    {
        torch.Tag.nondeterministic_seeded,
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
    }
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
    #: Whether it is pointwise, be it without the tag that says so.
    by_entry: bool
    may_alias: bool
    returns_several: bool

    @property
    def into_out(self) -> bool:
        """Whether all that it writes to is handed in by `out=`."""
        return all(position == -1 for position, _ in self.writes)

    def targets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return what a call writes to."""
        named = [args[i] if 0 <= i < len(args) else kwargs[name] for i, name in self.writes]
        return [t for t in leaves(named) if isinstance(t, torch.Tensor)]

    def without_out(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call that are not written to."""
        written = {name for position, name in self.writes if position == -1}
        return {k: a for k, a in kwargs.items() if k not in written}


@functools.cache
def schema_of(op: OpOverload) -> Schema:
    """Return what an operation writes, and of what kind it is."""
    writes = tuple(
        (-1 if a.kwarg_only else i, a.name)
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )
    name = op._schema.name.partition("::")[2]
    pointwise = torch.Tag.pointwise in op.tags
    by_entry = pointwise or name in _UNTAGGED_POINTWISE
    returns = op._schema.returns
    # Composite operations (`reshape`) return a view where they can, without saying so.
    aliases = name in _MAYBE_VIEW or any(r.alias_info is not None for r in returns)
    several = len(returns) != 1 or str(returns[0].type) == "List[Tensor]"
    is_view = bool(op.is_view)
    return Schema(name, writes, is_view, pointwise, by_entry, is_view or aliases, several)


def at_random(op: OpOverload) -> bool:
    """Whether an operation draws at random."""
    return torch.Tag.nondeterministic_seeded in op.tags


def unrepeatable(op: OpOverload, args: Sequence[Any]) -> bool:
    """Whether an operation draws at random, or depends on numbers as to what it does."""
    if not _UNREPEATABLE.intersection(op.tags):
        return False
    # `index` may depend on the numbers of a mask; with positions it does not.
    masks = torch.bool, torch.uint8
    by_positions = op is aten.index.Tensor and all(
        t is None or t.dtype not in masks for t in args[1]
    )
    return not by_positions


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
    packet = getattr(aten, schema.name if schema.into_out else schema.name.rstrip("_"), None)
    if packet is None:
        return None

    def signature(o: OpOverload, skip: set[str]) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in o._schema.arguments if a.name not in skip]

    wanted = signature(op, written if schema.into_out else set())
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if not schema_of(candidate).writes and signature(candidate, set()) == wanted:
            return candidate  # type: ignore[no-any-return]
    return None


_MAYBE_VIEW = frozenset(
    "reshape resolve_conj resolve_neg contiguous _unsafe_view lift_fresh _reshape_alias".split()
)


def may_alias(op: Callable[..., Any]) -> bool:
    """Whether an operation's result may share memory with its argument."""
    return not isinstance(op, OpOverload) or schema_of(op).may_alias


def returns_several(op: Callable[..., Any]) -> bool:
    """Whether an operation returns a tuple or list, be it of one tensor."""
    return not isinstance(op, OpOverload) or schema_of(op).returns_several


#: What permutes dimensions.
_PERMUTATIONS = frozenset(operations("t transpose.int permute"))
#: What shows a value in another shape, as the recorder and the passes write it.
SHOWN_IN_ORDER = frozenset(operations("view reshape unsqueeze"))
#: The same in another shape or order.
SHOWN = SHOWN_IN_ORDER | _PERMUTATIONS
#: All that shows a value in another shape.
RESHAPES = SHOWN_IN_ORDER.union(operations("_unsafe_view squeeze.dim squeeze.dims squeeze"))
#: Views that need their argument to lie in memory as it does now, which a reshape does not.
VIEWS_BY_STRIDES = frozenset(operations("view _unsafe_view _reshape_alias"))
#: What relies on how its argument lies in memory.
STRIDED = frozenset(operations("as_strided as_strided_scatter view_as_complex view_as_real"))
#: What may leave its argument as it is.
IDLE = frozenset(
    operations(
        "alias detach view _unsafe_view reshape expand _to_copy squeeze.dim squeeze lift_fresh "
        "clone"
    )
)
#: What gives the same numbers in the same order.
SAME_NUMBERS = IDLE | RESHAPES


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


#: Operations that leave an entry as it is, or put zero in its place.
CHOICES = frozenset(
    operations(
        "where.self masked_fill.Scalar masked_fill.Tensor threshold_backward hardtanh_backward "
        "hardshrink_backward softshrink_backward tril triu"
    )
)


def chooses(op: OpOverload) -> bool:
    """Whether an operation is pointwise and may choose between an entry and zero."""
    schema = schema_of(op)
    return schema.by_entry and schema.name not in MULTIPLYING
