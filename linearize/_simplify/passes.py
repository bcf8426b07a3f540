"""Making linear programs smaller.

A program that will run a hundred times is worth simplifying. Passes are small functions from
a program to a program that is the same map, each in a module of its own. They are given the
numbers too: of some a factor is made, and some decide what can be done.
"""

from __future__ import annotations

from collections.abc import Callable

from .._execute.binding import BoundProgram
from .._programs.numbers import Numbers
from .._programs.program import Operation, Program
from .._spaces.memory import total_bytes
from .copies import merge_copies
from .diagonals import fold_diagonals
from .moves import merge_moves
from .parts import join_parts
from .products import (
    add_products,
    apply_diagonals,
    scale_products,
    share_matrices,
    transpose_products,
)
from .rowwise import multiply_rows
from .sparse_matrices import store_by_rows

#: The passes, in order.
PASSES: tuple[Callable[[Program, Numbers], Program], ...] = (
    merge_copies,
    join_parts,
    multiply_rows,
    share_matrices,
    transpose_products,
    merge_copies,
    fold_diagonals,
    apply_diagonals,
    merge_copies,
    scale_products,
    merge_moves,
    add_products,
    merge_copies,
    store_by_rows,
)


def simplify(program: Program, numbers: Numbers) -> Program:
    """Return a smaller program that is the same map.

    `numbers` are those that the program reads, afterwards those that the result reads.
    """
    for one in PASSES:
        known = len(numbers)
        program = one(program, numbers)
        if len(numbers) > known:
            numbers.keep(program.constants)
    return program


def explain(program: BoundProgram) -> str:
    """Tell what each pass makes of a program: equations and bytes kept.

    And what of it is left to PyTorch, and what is left out as ranks communicate.
    """
    numbers, now = program.numbers(), program.program
    lines = [f"{program.name}: {_size(program)}"]
    ops = [eq.op for eq in program.equations if isinstance(eq.op, Operation)]
    lines += [f"  {op.name}: {op.note}" for op in ops if op.note]
    if any(op.communicates for op in ops):
        lines.append("  communicates: no matrix and no band takes over, no point is remembered")
        if now.fixed:
            lines.append(f"  recorded anew at each point: {now.fixed}")
    for one in PASSES:
        now = one(now, numbers)
        lines.append(f"  after {one.__name__}: {_size(BoundProgram.of(now, numbers))}")
    return "\n".join(lines)


def _size(program: BoundProgram) -> str:
    kept = total_bytes(program.kept_tensors())
    return f"{len(program.equations)} equations, {kept:,} bytes kept"
