"""A small Jacobian as a matrix.

A program of many small steps can take longer than one product with the matrix that it stands
for, and then the matrix takes over, by a rule in numbers:

1. The program calls no custom Function: those are promised one call for each product.
2. All arguments and results are on one device, in float32 or float64 or their complex kin.
3. The matrix takes no more than `dense_limit` bytes.
4. `MATRIX_FROM` products were asked for, and half as many as it takes to write the matrix out:
   rows or columns, whichever are fewer. What was spent by then pays for the matrix. Where the
   matrix has won at a point of the same structure, as many as are as dear as writing it out.
5. A product with a matrix of that size has at most `MATRIX_SHARE` of the program's price.
6. It gives the same as the program, as precisely, for the vector at hand and a random one.

Where a square matrix is zero but for a band of diagonals, the diagonals are kept if a product
with them has the lower price. Prices are those of `_programs.price`: nothing is measured.

A matrix multiplies zeros too: an infinity or a NaN in the argument, or one that comes about
where the program chooses what else to take, would spread to all results. Where a result is not
finite, the program runs that the matrix took the place of. To look makes the host wait for an
accelerator: there only a matrix without zeros takes over.

Complex numbers count as pairs of real ones, because a derivative need not be linear over the
complex numbers.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from .._execute.binding import BoundProgram
from .._execute.executor import runner
from .._execute.thresholds import (
    MATRIX_AGAIN_FROM,
    MATRIX_COMPARED,
    MATRIX_FROM,
    MATRIX_MAPPED,
    MATRIX_PASS,
    MATRIX_SHARE,
    NEVER,
)
from .._programs.around_matrix import flat_real, matrix_program, reals, times
from .._programs.numbers import Numbers
from .._programs.price import matrix_price, price, price_of_many
from .._programs.program import Emitter, Program
from .._programs.values import Var
from .._spaces.space import TensorSpec
from .._torch.modes import being_traced, functorch_active
from ..errors import LinearizeError
from .banded import Banded

#: From a program and its numbers to its transpose.
Transpose: TypeAlias = Callable[[Program, Numbers], Program]

_DTYPES = frozenset({torch.float32, torch.float64})


@functools.lru_cache(maxsize=256)
def _spec(ins: tuple[TensorSpec, ...], outs: tuple[TensorSpec, ...]) -> TensorSpec | None:
    """Return what the matrix of a map is like, None if it would not be of one dtype and device."""
    specs = [*ins, *outs]
    dtypes, devices = {s.dtype.to_real() for s in specs}, {s.device for s in specs}
    if len(dtypes) != 1 or len(devices) != 1 or not dtypes <= _DTYPES:
        return None
    shape = sum(map(reals, outs)), sum(map(reals, ins))
    return TensorSpec(shape, dtypes.pop(), devices.pop())


class Dense:
    """The matrix of a point, if it comes to that: one for both products.

    Parameters
    ----------
    spec
        Of the matrix: the real numbers that come out of the pushforward, by those that go in.
    taken
        Called when the matrix takes the place of a program for the first time.
    transpose
        Gives the transpose of a program.

    Attributes
    ----------
    count
        Products asked for so far.
    due
        At how many a matrix is considered.
    matrix
        Of the pushforward, if there is one; a band of diagonals, if it is no more.
    """

    def __init__(self, spec: TensorSpec, taken: Callable[[], None], transpose: Transpose) -> None:
        self.spec = spec
        self.count = 0
        self.due = max(MATRIX_FROM, min(spec.shape) // 2)
        self.matrix: torch.Tensor | Banded | None = None
        self._taken: Callable[[], None] | None = taken
        self._transpose = transpose
        self._given: torch.Tensor | None = None
        self._tried = False
        self._lock = threading.Lock()

    @staticmethod
    def of(
        ins: Sequence[TensorSpec],
        outs: Sequence[TensorSpec],
        limit: int,
        taken: Callable[[], None],
        transpose: Transpose,
    ) -> Dense | None:
        """Return what stands ready for a map, None if its matrix is too large or of no use."""
        spec = _spec(tuple(ins), tuple(outs))
        if spec is None or not 0 < spec.nbytes <= limit:
            return None
        return Dense(spec, taken, transpose)

    def again(self, program: Program) -> int:
        """Return at how many products a matrix pays that won where this program was run before."""
        saved = price(program) - matrix_price(self.spec)
        mapped = MATRIX_COMPARED + len(program.equations) * MATRIX_MAPPED
        writing = price_of_many(program, min(self.spec.shape)) + mapped
        return max(MATRIX_AGAIN_FROM, math.ceil(writing / saved)) if saved > 0 else NEVER

    def written(self, matrix: torch.Tensor) -> None:
        """Take note that somebody wrote the matrix of the pushforward out at this point."""
        with self._lock:
            if self.matrix is None and TensorSpec.of(matrix) == self.spec:
                self._given = matrix
                self.due = 0

    def program(self, program: BoundProgram, *, forward: bool) -> BoundProgram | None:
        """Return the product with the matrix as a program, None if it is not worth it."""
        with self._lock:
            if not self._tried:
                self._tried = True
                if _is_strided(program) and self.pays(program.program):
                    matrix = self._given
                    if matrix is None:
                        matrix = self._written_out(program, forward)
                    self.matrix = None if matrix is None else _narrowed(matrix)
                    self._given = None
        return None if self.matrix is None else _around(self.matrix, program, forward=forward)

    @property
    def spreads(self) -> bool:
        """Whether a number that is not finite may reach a result that it should not reach.

        Then all results are looked at. Where that is out of the question, a matrix without zeros
        is trusted: each number of the argument does reach each result.
        """
        matrix = self.matrix
        if not isinstance(matrix, torch.Tensor) or numbers_at_hand(matrix.device):
            return True
        return bool((matrix == 0).any())

    def taken(self) -> None:
        """Note that the matrix has taken the place of a program."""
        with self._lock:
            if self._taken is not None:
                self._taken()
                self._taken = None

    def pays(self, program: Program) -> bool:
        """Whether a product with the matrix is enough cheaper than a program."""
        return matrix_price(self.spec) <= MATRIX_SHARE * price(program)

    def _written_out(self, program: BoundProgram, forward: bool) -> torch.Tensor | None:
        """Return the matrix of the pushforward, from the fewest unit vectors."""
        if sum(reals(s) for s in program.specs) < sum(reals(v.spec) for v in program.inputs):
            try:
                program, forward = program.made(self._transpose), not forward
            except LinearizeError:
                return None
        columns = _columns(program, self.spec)
        return columns.t() if forward else columns


def _is_strided(program: BoundProgram) -> bool:
    """Whether the price of a program says something: a sparse constant is not read in full."""
    return all(r.tensor.layout is torch.strided for r in program.binding.residuals)


def _narrowed(matrix: torch.Tensor) -> torch.Tensor | Banded:
    """Return the matrix of a pushforward, or its diagonals if it is a band and they cost less."""
    banded = Banded.of(matrix)
    if banded is None:
        return matrix
    band, whole = (
        sum(price(_multiplied(form, forward=forward)) for forward in (True, False))
        for form in (banded, matrix)
    )
    return banded if band < whole else matrix


def _multiplied(matrix: torch.Tensor | Banded, *, forward: bool) -> Program:
    """Return the product of a square matrix with a vector as a program."""
    spec = matrix.spec if isinstance(matrix, Banded) else TensorSpec.of(matrix)
    e, v = Emitter(), Var(TensorSpec(spec.shape[:1], spec.dtype, spec.device))
    result = _multiply(matrix, forward=forward)[1](e, v)
    return Program([v], e.equations, [result], [v.spec])


def _multiply(
    matrix: torch.Tensor | Banded, *, forward: bool
) -> tuple[TensorSpec, Callable[[Emitter, Var], Var]]:
    """Return the spec of a matrix or its transpose, and what writes down a product with it."""
    if isinstance(matrix, Banded):
        return matrix.spec, matrix.times if forward else matrix.transposed_times
    turned = matrix if forward else matrix.t()
    return TensorSpec.of(turned), times(turned)


def _around(
    matrix: torch.Tensor | Banded, program: BoundProgram, *, forward: bool
) -> BoundProgram:
    """Return the product with a matrix, or its transpose, as a program like another one."""
    columns = [v.spec for v in program.inputs]
    wanted = [True] * len(program.specs)
    spec, multiply = _multiply(matrix, forward=forward)
    numbers = Numbers()
    made = matrix_program(spec, multiply, columns, program.specs, wanted, program.name, numbers)
    made = Program(made.inputs, made.equations, made.outputs, made.specs, program.name)
    return BoundProgram.of(made, numbers)


def _columns(program: BoundProgram, like: TensorSpec) -> torch.Tensor:
    """Return the columns of a program's matrix as rows, several in each pass."""
    ins, outs = [v.spec for v in program.inputs], program.specs
    count, length = sum(map(reals, ins)), sum(map(reals, outs))
    found = torch.empty((count, length), dtype=like.dtype, device=like.device)
    run = runner(program)
    chunk = max(1, min(count, MATRIX_PASS // max(program.peak_bytes(), 1)))

    def product(*parts: torch.Tensor) -> list[torch.Tensor]:
        results = run(parts)
        pairs = zip(results, outs, strict=True)
        return [spec.zeros() if t is None else t for t, spec in pairs]

    for start in range(0, count, chunk):
        rows = torch.zeros(
            (min(chunk, count - start), count), dtype=like.dtype, device=like.device
        )
        rows.diagonal(start).fill_(1)
        results = torch.vmap(product)(*_split(rows, ins))
        parts = [flat_real(t).reshape(len(rows), -1) for t in results]
        found[start : start + len(rows)] = torch.cat(parts, 1)
    return found


def _split(rows: torch.Tensor, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Return stacks of arguments that rows of real numbers stand for."""
    parts = rows.split([reals(s) for s in specs], 1)
    return [
        torch.view_as_complex(part.reshape(len(rows), *spec.shape, 2))
        if spec.dtype.is_complex
        else part.reshape(len(rows), *spec.shape)
        for part, spec in zip(parts, specs, strict=True)
    ]


def random_arguments(program: BoundProgram) -> list[torch.Tensor]:
    """Return random arguments of a program, the same each time."""
    generator = torch.Generator().manual_seed(7)
    return [v.spec.random(generator) for v in program.inputs]


def can_be_trusted(results: Sequence[torch.Tensor | None]) -> bool:
    """Whether no result of a matrix holds an infinity or NaN, seen here and now.

    Denied too if a sum, of squares for vectors, overflows: that is seen soonest.
    """
    if not can_be_looked_at():
        return False
    for t in results:
        if t is not None:
            total = (torch.dot(t, t) if t.dim() == 1 else torch.sum(t)).item()
            if total - total != 0:
                return False
    return True


def can_be_looked_at() -> bool:
    """Whether numbers can be told here and now."""
    return not (functorch_active() or being_traced())


def numbers_at_hand(device: torch.device) -> bool:
    """Whether the host need not wait for a device to tell a number."""
    return device.type == "cpu"
