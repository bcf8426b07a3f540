"""Broadcasting: whether a shape does it to another one, and how it is undone."""

from __future__ import annotations

from collections.abc import Sequence

from .._torch.names import aten
from .program import Emitter
from .values import Var


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of a shape broadcasts to another one."""
    # `torch.broadcast_shapes` would load a computer algebra system.
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


def summed(e: Emitter, v: Var, shape: Sequence[int]) -> Var:
    """Emit the sum over the dimensions along which a value of a shape was broadcast."""
    have = v.spec.shape
    more = len(have) - len(shape)
    over = [i for i, n in enumerate(have) if i < more or shape[i - more] == 1 != n]
    if over and over == list(range(more)):
        return e.emit(aten.sum.dim_IntList, (v, over), v.spec.shaped(*shape))
    if over:
        kept = [1 if i in over else n for i, n in enumerate(have)]
        v = e.emit(aten.sum.dim_IntList, (v, over, True), v.spec.shaped(*kept))
    return e.shaped(v, *shape)
