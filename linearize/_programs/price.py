"""A price for one run of a program, in nanoseconds of a machine that exists on paper only.

An operation costs its launch, and the bytes that it reads and writes or the arithmetic of a
matrix product, whichever takes longer; a view costs less than a launch. Prices depend on the
program alone: two runs of one script, and all processes of a group, come to the same ones.
"""

from __future__ import annotations

import dataclasses

import torch

from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten
from .aten import may_alias
from .program import Equation, Program


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What things cost.

    Nanoseconds for an operation on next to nothing (`launch`) and for one that makes a view; how
    many bytes stay in `cache`; bytes in a nanosecond, of those and of more; floating point
    operations in a nanosecond, in matrix products.
    """

    launch: float
    view: float
    cache: int
    cached: float
    bandwidth: float
    arithmetic: float

    def moved(self, nbytes: float) -> float:
        """Return the price of reading or writing bytes."""
        return nbytes / (self.cached if nbytes <= self.cache else self.bandwidth)


#: One core of a processor, and other devices.
CPU = Machine(launch=2000, view=1000, cache=1 << 22, cached=30, bandwidth=12, arithmetic=30)
DEVICE = Machine(
    launch=6000, view=2000, cache=1 << 24, cached=3000, bandwidth=1500, arithmetic=10_000
)


def machine(device: torch.device) -> Machine:
    """Return what stands for a device."""
    return CPU if device.type == "cpu" else DEVICE


def price(program: Program) -> float:
    """Return the price of a run; what user code costs is not known and counts as a launch."""
    return sum(map(_price, program.equations))


def price_of_many(program: Program, count: int) -> float:
    """Return the price of a run with many arguments at once."""
    total = 0.0
    for eq in program.equations:
        m = machine(_device(eq))
        start = _start(eq, m)
        total += start + count * (_price(eq) - start)
    return total


def matrix_price(matrix: TensorSpec) -> float:
    """Return the price of a product with a matrix, arguments and results reshaped."""
    m = machine(matrix.device)
    entries = matrix.numel + sum(matrix.shape)
    return m.launch + 2 * m.view + m.moved(matrix.dtype.itemsize * entries)


def multiplies(program: Program) -> bool:
    """Whether a run with many arguments at once mostly multiplies matrices."""
    moving = multiplying = 0.0
    for eq in program.equations:
        m = machine(_device(eq))
        if not (isinstance(eq.op, OpOverload) and may_alias(eq.op)):
            passed = (v for v in (*eq.inputs(), *eq.outputs) if v is not None)
            moving += m.moved(sum(v.spec.nbytes for v in passed))
        multiplying += arithmetic(eq) / m.arithmetic
    return multiplying > moving


def _price(eq: Equation) -> float:
    m = machine(_device(eq))
    if may_alias(eq.op):
        return _start(eq, m)
    read = sum(x.spec.nbytes for x in dict.fromkeys(eq.reads()))
    written = sum(v.spec.nbytes for v in eq.outputs if v is not None)
    return _start(eq, m) + max(m.moved(read + written), arithmetic(eq) / m.arithmetic)


def _start(eq: Equation, m: Machine) -> float:
    if not isinstance(eq.op, OpOverload):
        return m.launch
    return m.view if may_alias(eq.op) else m.launch * _LAUNCHES.get(eq.op.overloadpacket, 1)


def _device(eq: Equation) -> torch.device:
    for v in (*eq.outputs, *eq.reads()):
        if v is not None:
            return v.spec.device  # type: ignore[no-any-return]
    return torch.device("cpu")


def arithmetic(eq: Equation) -> float:
    """Return how many operations a matrix product or a convolution takes."""
    out = next((v.spec for v in eq.outputs if v is not None), None)
    if out is None:
        return 0
    packet = getattr(eq.op, "overloadpacket", None)
    if packet in PRODUCTS:
        left = eq.args[PRODUCTS[packet]].spec.shape
        return 2.0 * out.numel * int(left[-1])
    if packet is aten.convolution or packet is aten.convolution_backward:
        weight = eq.args[1 if packet is aten.convolution else 2].spec
        large = max(x.spec.numel for x in (*eq.reads(), *eq.outputs) if x is not None)
        return float(2 * large * weight.numel / max(weight.shape[0], 1))
    return 0


#: How many launches operations on next to nothing take that are made of several kernels, or that
#: prepare what they do.
_LAUNCHES = {
    aten.bmm: 1.5,
    aten.baddbmm: 1.5,
    aten._softmax_backward_data: 1.5,
    aten._log_softmax_backward_data: 1.5,
    aten.native_layer_norm_backward: 2,
    aten.native_group_norm_backward: 2,
    aten.native_batch_norm_backward: 2,
    aten.index: 2,
    aten.index_select: 2,
    aten.index_add: 2.5,
    aten.index_put: 2.5,
    aten.scatter_add: 2.5,
    aten.constant_pad_nd: 2.5,
    aten.roll: 2,
    aten.linalg_solve_triangular: 2.5,
    aten.linalg_lu_solve: 5,
    aten.convolution: 20,
    aten.convolution_backward: 20,
}

#: Where the left factor of a product stands.
PRODUCTS = {
    aten.dot: 0,
    aten.vdot: 0,
    aten.mm: 0,
    aten.bmm: 0,
    aten.mv: 0,
    aten.matmul: 0,
    aten.addmm: 1,
    aten.baddbmm: 1,
    aten.addmv: 1,
}
