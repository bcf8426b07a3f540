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
from .program import Equation, Operation, Program


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What things cost.

    Nanoseconds for an operation on next to nothing (`launch`) and for one that makes a view; bytes
    in a nanosecond; floating point operations in a nanosecond, in matrix products.
    """

    launch: float
    view: float
    bandwidth: float
    arithmetic: float

    def moved(self, nbytes: float) -> float:
        """Return the price of reading or writing bytes."""
        return nbytes / self.bandwidth


#: One core of a processor, and other devices.
CPU = Machine(launch=1500, view=700, bandwidth=12, arithmetic=30)
DEVICE = Machine(launch=6000, view=2000, bandwidth=1500, arithmetic=10_000)


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
    return m.launch + max(m.moved(read + written), arithmetic(eq) / m.arithmetic)


def _start(eq: Equation, m: Machine) -> float:
    is_view = not isinstance(eq.op, Operation) and may_alias(eq.op)
    return m.view if is_view else m.launch


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
