"""Which entries of its result an operation takes from which of its arguments, found by trying.

Kernels such as pooling, interpolation, normalisation, Fourier transforms and triangular solves
have no formula here: they are applied to random numbers that are zero outside of some blocks of
their arguments, first of large blocks, then of smaller ones. Blocks that no result has in common
are tried together, so that an operation that is local, or works within one batch entry, takes
some hundred calls whatever its size.

The numbers that it was recorded with do not enter: constants are random too, so that nothing is
zero by chance, at this point or at another one. For operations that choose by their constants
where they read from, these are kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from .._programs.aten import schema_of
from .._programs.numbers import Numbers
from .._programs.program import Equation
from .._programs.values import Constant, Var
from .._record.node_formulas import Differential
from .._spaces.nested import map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload
from ._boolean import marked
from ._coloring import grouped

#: Operations whose floating point constants do not decide which results are zero, by name.
_TRIED = frozenset(
    (
        "linalg_cross linalg_solve_triangular triangular_solve linalg_lu_solve cholesky_solve "
        "_trilinear cumsum logcumsumexp trace nansum "
        "convolution convolution_backward unfold_backward embedding_dense_backward "
        "_softmax_backward_data _log_softmax_backward_data native_layer_norm_backward "
        "native_group_norm_backward native_batch_norm_backward cudnn_batch_norm_backward "
        "miopen_batch_norm_backward batch_norm_backward _fused_rms_norm_backward glu_backward "
        "mse_loss_backward nll_loss_backward nll_loss2d_backward _cdist_backward "
        "max_pool2d_with_indices_backward max_pool3d_with_indices_backward "
        "adaptive_max_pool2d_backward adaptive_max_pool3d_backward fractional_max_pool2d_backward "
        "fractional_max_pool3d_backward max_unpool2d max_unpool3d channel_shuffle "
        "_embedding_bag_dense_backward _embedding_bag_per_sample_weights_backward "
        "_scaled_dot_product_flash_attention_for_cpu_backward _unsafe_masked_index "
        "_scaled_dot_product_fused_attention_overrideable_backward"
    ).split()
)
#: The same by the beginning of their names.
_TRIED_KINDS = (
    "upsample_",
    "_upsample_",
    "reflection_pad",
    "replication_pad",
    "avg_pool",
    "_adaptive_avg_pool",
    "im2col",
    "col2im",
    "_fft_",
    "grid_sampler",
    "_grid_sampler",
)
#: Those that read where floating point numbers say.
_POSITIONED = ("grid_sampler", "_grid_sampler")

#: Into how many blocks arguments are cut at first, and each block at every further step.
_FIRST, _AGAIN = 8, 4
#: How many numbers may be looked at in one step.
_WORK = 200_000_000
#: How many columns are looked at to see whether smaller blocks would tell more.
_LOOKS = 3


def tried(eq: Equation) -> bool:
    """Whether the structure of an operation is found by trying it."""
    if not isinstance(eq.op, OpOverload):
        return isinstance(eq.op, Differential)
    name = schema_of(eq.op).name
    if name == "_cdist_backward" and eq.args[3] == math.inf:
        return False  # it looks for where the maximum is taken
    return name in _TRIED or name.startswith(_TRIED_KINDS)


def kept(eq: Equation) -> list[Constant]:
    """Return the constants whose numbers say what an operation reads."""
    found = [c for c in eq.constants() if not c.spec.differentiable]
    name = eq.kind
    if name.startswith(_POSITIONED):
        grid = eq.args[2 if name.endswith("_backward") else 1]
        found += [grid] if isinstance(grid, Constant) else []
    return found


def relation(eq: Equation, numbers: Numbers, limit: int) -> Any:
    """Return which results of an equation, see `tried`, depend on which entries of its variables.

    Rows are the entries of all results, one after the other, columns those of the variables. None
    if it cannot be tried, or has more entries than `limit`.
    """
    for natural in (False, True):
        trial = _Trial(eq, numbers, natural=natural)
        outs = [k for k, v in enumerate(eq.outputs) if v is not None]
        try:
            blocks = [[_block(trial, v, k, limit) for v in trial.variables] for k in outs]
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue  # not on this device, or not in this precision
        if any(b is None for row in blocks for b in row):
            return None
        return sp.block_array(blocks, format="csr")
    return None


class _Trial:
    """Applies an operation to numbers that are zero outside of some places.

    If `natural`, it runs with its own dtypes where it is, else in double precision on the CPU.
    """

    def __init__(self, eq: Equation, numbers: Numbers, *, natural: bool) -> None:
        self.eq = eq
        self.variables = list(dict.fromkeys(eq.inputs()))
        self._natural = natural
        self._generator = torch.Generator().manual_seed(77)
        fixed = kept(eq)
        self._values: dict[Any, torch.Tensor] = {}
        for c in dict.fromkeys(eq.constants()):
            self._values[c] = self._constant(c, numbers[c], keep=c in fixed)
        self._random = {v: self._numbers(self._spec(v.spec)) for v in self.variables}
        for v, t in self._random.items():
            self._values[v] = torch.zeros_like(t)
        self._kwargs = {k: a for k, a in eq.kwargs.items() if natural or k != "device"}

    def _spec(self, spec: TensorSpec) -> TensorSpec:
        if self._natural:
            return spec
        dtype = spec.dtype
        if dtype.is_floating_point or dtype.is_complex:
            dtype = torch.complex128 if dtype.is_complex else torch.float64
        return TensorSpec(spec.shape, dtype, torch.device("cpu"))

    def _constant(self, c: Constant, own: torch.Tensor, *, keep: bool) -> torch.Tensor:
        spec = self._spec(c.spec)
        if keep or own.layout != torch.strided:
            return own.to(device=spec.device, dtype=spec.dtype)
        return self._numbers(spec)

    def _numbers(self, spec: TensorSpec) -> torch.Tensor:
        """Return positive random numbers of order one: sums of them are not zero."""
        parts = (2, *spec.shape) if spec.dtype.is_complex else spec.shape
        t = torch.rand(parts, generator=self._generator, dtype=torch.float64) + 0.5
        t = t.to(device=spec.device, dtype=spec.dtype.to_real())
        return torch.complex(t[0], t[1]) if spec.dtype.is_complex else t

    def __call__(self, v: Var, chosen: torch.Tensor, k: int) -> torch.Tensor:
        """Return where result k is not zero if one variable is zero where not chosen."""
        t = self._random[v]
        values = {**self._values, v: torch.where(chosen.to(t.device), t, 0)}

        def leaf(x: Any) -> Any:
            return values[x] if isinstance(x, (Var, Constant)) else x

        with torch.no_grad():
            results = self.eq.op(*map_leaves(leaf, self.eq.args), **map_leaves(leaf, self._kwargs))
        result = results[k] if isinstance(results, (tuple, list)) else results
        found: torch.Tensor = result.ne(0).cpu()
        return found


def _block(trial: _Trial, v: Var, k: int, limit: int) -> Any:
    """Return which entries of result k read which of a variable."""
    out = trial.eq.outputs[k]
    assert out is not None
    ins, outs = v.spec.shape, out.spec.shape
    flat = _along(trial, v, k, None)
    if 1 < len(ins) == len(outs):
        # Most kernels do the same at each place of a dimension, whatever the other dimensions.
        factors = [
            _refined(_along(trial, v, k, d), outs[d], ins[d], limit) for d in range(len(ins))
        ]
        if math.prod(f.nnz for f in factors) <= limit:
            whole = functools.reduce(lambda a, b: sp.kron(a, b, format="csr"), factors)
            if _is_exact(flat, whole.tocsc()):
                return whole
    return _refined(flat, out.spec.numel, v.spec.numel, limit)


Call: TypeAlias = Callable[[NDArray[np.bool_]], NDArray[np.bool_]]


def _along(trial: _Trial, v: Var, k: int, d: int | None) -> Call:
    """Return a trial of entries, or of the places of one dimension, taken as a whole."""
    ins = v.spec.shape
    shape = ins if d is None else [-1 if i == d else 1 for i in range(len(ins))]

    def call(chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        hit = trial(v, torch.from_numpy(chosen).reshape(shape), k)
        if d is None:
            return hit.reshape(-1).numpy()
        return hit.movedim(d, 0).reshape(hit.shape[d], -1).any(1).numpy()

    return call


def _is_exact(call: Call, columns: Any) -> bool:
    """Whether some columns of a relation, which holds at least all entries, hold no others."""
    width = columns.shape[1]
    for j in np.random.default_rng(2).integers(0, width, size=_LOOKS) if width else ():
        chosen = np.zeros(width, dtype=bool)
        chosen[j] = True
        if int(call(chosen).sum()) != columns.indptr[j + 1] - columns.indptr[j]:
            return False
    return True


def _refined(call: Call, height: int, width: int, limit: int) -> Any:
    """Find a relation by blocks of columns that get smaller, until that changes nothing.

    If it takes too much work, columns of one block count as alike. None if there are too many
    entries.
    """
    known = sp.csr_array(np.ones((1, 1), dtype=bool))  # all rows are alike, and one block
    kinds = np.zeros(height, dtype=np.int64)
    size = max(1, -(-width // _FIRST))
    edges = np.arange(0, width, size)
    parents = np.zeros(len(edges), dtype=np.int64)
    while True:
        lengths = np.diff(np.append(edges, width))
        found = _split(call, known, kinds, parents, lengths)
        if found is None or found.nnz > limit:
            return None
        if size == 1:
            return found
        columns = found.tocsc()
        block = np.repeat(np.arange(len(lengths)), lengths)
        if int((np.diff(columns.indptr) * lengths).sum()) <= limit:
            whole = columns[:, block]
            if _is_exact(call, whole):
                return whole.tocsr()
        known, kinds = _distinct(found)
        size = max(1, -(-size // _AGAIN))
        starts = [np.arange(a, a + n, size) for a, n in zip(edges, lengths, strict=True)]
        parents = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        edges = np.concatenate(starts)


def _distinct(rows: Any) -> tuple[Any, NDArray[np.int64]]:
    """Return the different rows of a boolean matrix, and which of them each row is."""
    keys = np.random.default_rng(1).integers(1, 2**62, size=rows.shape[1], dtype=np.int64)
    sums = rows.astype(np.int64) @ keys
    _, first, kinds = np.unique(sums, return_index=True, return_inverse=True)
    return rows[first], kinds.reshape(-1)


def _split(
    call: Call,
    known: Any,
    kinds: NDArray[np.int64],
    parents: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> Any:
    """Return which rows read which blocks, None if that would take too much work.

    It is known which kind of row reads which larger block, and of which of the `kinds` each row
    is; for each block, the larger one that it is part of, and how many columns it has.
    """
    colors = grouped(known)[parents]
    part = np.arange(len(parents)) - np.searchsorted(parents, parents)
    order = np.lexsort((part, colors))
    turns = np.flatnonzero(np.diff(colors[order]) | np.diff(part[order])) + 1
    trials = np.split(order, turns)
    if len(trials) * (len(kinds) + int(lengths.sum())) > _WORK:
        return None
    readers = known.tocsc()
    places = []
    for blocks in trials:
        chosen = np.zeros(len(parents), dtype=bool)
        chosen[blocks] = True
        # No kind of row reads parents of two of these blocks.
        read = readers[:, parents[blocks]].tocoo()
        block = np.full(known.shape[0], -1)
        block[read.row] = blocks[read.col]
        rows = np.flatnonzero(call(np.repeat(chosen, lengths)))
        reads = block[kinds[rows]]
        places.append(np.stack([rows, reads])[:, reads >= 0])
    row, column = np.concatenate(places, axis=1)
    return marked(row, column, (len(kinds), len(parents)))
