"""What a linearization keeps.

The objects here are made of numbers and names only: to hold one keeps no tensor alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from .._capture.graph import Graph
from .._execute.binding import BoundProgram
from .._programs.program import Operation
from .._spaces.memory import dense_parts
from .._text.labels import Line, lines_of, name_of, named
from .._text.tables import as_html, as_text, clipped, code, framed, size
from .cost import summed

#: How lines of f become known.
HINT = "Lines of f are known with Linearizer(f, trace=True)."
_UNKNOWN = "(line not known)"


@dataclasses.dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor that a linearization keeps.

    Attributes
    ----------
    shape, dtype, device
        Of the tensor.
    nbytes
        Bytes of memory that are kept because of it: those of its whole storage, or 0 if `note`
        says that they count elsewhere.
    operations
        What keeps it: nodes of the autograd graph, named by PyTorch after the operations of f
        (`SinBackward0`), custom Functions, or "folded diagonals" for what simplifying made.
    lines
        The lines of f that these come from; empty if they are not known.
    keepers
        Who needs it: "jvp_fn", "vjp_fn", or "graph" as long as no product has been asked for.
    note
        "primal" if it shares the memory of a primal, "shared" if that of a tensor listed
        before, "watched" if it is kept only to see that nobody changes it; else empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    operations: tuple[str, ...]
    lines: tuple[Line, ...]
    keepers: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        where = "" if self.device.type == "cpu" else f" {self.device}"
        return f"{kind}[{','.join(map(str, self.shape))}]{where}"


class Residuals(Sequence[KeptTensor]):
    """The tensors that a linearization keeps, the largest first. Print it for a table.

    Attributes
    ----------
    nbytes
        Bytes of all, each storage once and without the primals' own.
    traced
        Whether lines of f were noted.
    """

    def __init__(self, tensors: Iterable[KeptTensor], traced: bool) -> None:
        self._tensors = tuple(sorted(tensors, key=lambda t: -t.nbytes))
        self.traced = traced
        self.nbytes = sum(t.nbytes for t in self._tensors)

    @overload
    def __getitem__(self, index: int) -> KeptTensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[KeptTensor, ...]: ...
    def __getitem__(self, index: int | slice) -> KeptTensor | tuple[KeptTensor, ...]:
        """Return one of the tensors, or some."""
        return self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)

    def by_line(self) -> dict[str, int]:
        """Return the bytes kept by each line of f, or group of lines, the most first.

        Keys are short names like `model.py:12`, or `model.py:12, 14-16` for what several lines
        share. What has no known line is under `(line not known)`.
        """
        return summed((named(t.lines) or _UNKNOWN, t.nbytes) for t in self._tensors)

    def by_operation(self) -> dict[str, int]:
        """Return the bytes kept by each kind of operation, the most first."""
        return summed((", ".join(t.operations), t.nbytes) for t in self._tensors)

    def table(self, limit: int | None = 50) -> tuple[list[str], list[list[str]]]:
        """Return the names of columns, and one row of cells for each tensor.

        Parameters
        ----------
        limit
            The most rows; the last one tells what is left out. None for all.
        """
        head = ["bytes", "tensor", "kept by", "for", "note"]
        if self.traced:
            head[3:3] = ["line of f", "text"]
        shown = self._tensors if limit is None else self._tensors[:limit]
        rows = []
        for t in shown:
            row = [size(t.nbytes), str(t), ", ".join(t.operations), ", ".join(t.keepers), t.note]
            if self.traced:
                row[3:3] = [named(t.lines) or _UNKNOWN, _text(t.lines)]
            rows.append(row)
        rest = self._tensors[len(shown) :]
        if rest:
            more = [size(sum(t.nbytes for t in rest)), f"{len(rest):,} more"]
            rows.append(more + [""] * (len(head) - 2))
        return head, rows

    def __str__(self) -> str:
        head, rows = self.table()
        table = as_text(head, [[clipped(c) for c in row] for row in rows], right=(0,))
        return "\n".join([self._headline(), table, *([] if self.traced else [HINT])])

    def _repr_html_(self) -> str:
        return framed(self._html())

    def _html(self, limit: int | None = 50) -> str:
        head, rows = self.table(limit)
        codes = range(1, len(head) - 2)
        cells = [[code(c) if i in codes else c for i, c in enumerate(row)] for row in rows]
        hint = "" if self.traced else f'<p class="lz-faint">{HINT}</p>'
        return f"<p>{self._headline()}</p>{as_html(head, cells, right=(0,))}{hint}"

    def _headline(self) -> str:
        count = len(self._tensors)
        return f"{count:,} tensor{'s' * (count != 1)} kept, {size(self.nbytes)} in all"

    def __repr__(self) -> str:
        return f"<Residuals: {self._headline()}>"


def residuals(
    made: Mapping[str, Iterable[BoundProgram]],
    waiting: tuple[Graph | None, BoundProgram | None],
    external: Iterable[int],
    traced: bool,
) -> Residuals:
    """Return what products keep, and what is kept for programs still to be made.

    Parameters
    ----------
    made
        For each product, by its name, the programs that are made.
    waiting
        What programs are still to be made of: the graph, or the pullback.
    external
        Data pointers of storages that do not count.
    traced
        Whether lines are known.
    """
    found: dict[Any, _Entry] = {}
    for keep in _kept(made, waiting):
        entry = found.setdefault(_identity(keep.tensor), keep)
        if entry is not keep:
            entry.merge(keep)
    primals = set(external)
    seen: set[int] = set()
    return Residuals([entry.listed(primals, seen) for entry in found.values()], traced)


@dataclasses.dataclass(slots=True)
class _Entry:
    tensor: torch.Tensor
    operations: tuple[str, ...]
    lines: tuple[Line, ...]
    keepers: tuple[str, ...]
    watched: bool = False

    def merge(self, other: _Entry) -> None:
        """Take in what else keeps the same tensor."""
        self.operations = tuple(dict.fromkeys((*self.operations, *other.operations)))
        self.lines = tuple(dict.fromkeys((*self.lines, *other.lines)))
        self.keepers = tuple(dict.fromkeys((*self.keepers, *other.keepers)))
        self.watched &= other.watched

    def listed(self, primals: set[int], seen: set[int]) -> KeptTensor:
        t = self.tensor
        count, note = 0, "watched" if self.watched else ""
        for part in dense_parts(t):
            storage = part.untyped_storage()
            pointer = storage.data_ptr()
            if not pointer:
                pass  # its numbers are not kept
            elif pointer in primals:
                note = "primal"
            elif pointer in seen:
                note = "shared"
            else:
                count += storage.nbytes()
            seen.add(pointer)
        what = (tuple(t.shape), t.dtype, t.device, count, self.operations, self.lines)
        return KeptTensor(*what, self.keepers, note)


def _kept(
    made: Mapping[str, Iterable[BoundProgram]], waiting: tuple[Graph | None, BoundProgram | None]
) -> Iterator[_Entry]:
    for name, programs in made.items():
        for program in programs:
            yield from _kept_by(program, (name,))
            for r in program.binding.guards:
                names = (name_of(r.source),)
                yield _Entry(r.tensor, names, lines_of(r.source), (name,), watched=True)
    graph, pullback = waiting
    if graph is not None:
        for node in graph.order:
            label = graph.label(node)
            for t in graph.saved_by(node):
                yield _Entry(t, (name_of(label),), lines_of(label), ("graph",))
    if pullback is not None:
        yield from _kept_by(pullback, tuple(made))


def _kept_by(program: BoundProgram, keepers: tuple[str, ...]) -> Iterator[_Entry]:
    numbers = program.numbers()
    for eq in program.equations:
        for r in numbers.residuals(eq.constants()):
            lines = (*lines_of(r.source), *lines_of(eq.source))
            names = (name_of(r.source) or eq.name,)
            yield _Entry(r.tensor, names, tuple(dict.fromkeys(lines)), keepers)
        if isinstance(eq.op, Operation):
            for t in eq.op.bytes_kept():
                yield _Entry(t, (eq.name,), lines_of(eq.source), keepers)


def _identity(t: torch.Tensor) -> Any:
    """Return what tells a tensor from others that are alive."""
    if t.layout != torch.strided:
        return id(t)
    memory = t.untyped_storage().data_ptr() or id(t)
    return memory, t.storage_offset(), t.dtype, tuple(t.shape), t.stride(), t.is_conj()


def _text(lines: Sequence[Line]) -> str:
    return lines[0].text if len(lines) == 1 else ""
