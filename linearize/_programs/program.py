"""Linear programs.

A `Program` is a list of equations in static single assignment form. Each equation applies
one operation, linear in its `Var` arguments jointly, with everything else held fixed:
`Constant`s (which stand for tensors kept from the forward run) and static arguments.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._text.labels import joined
from .._torch.names import aten
from ..errors import LinearizeError
from .numbers import Numbers
from .values import Constant, Value, Var, last_uses, zeros


class Operation:
    """An operation that is not an ATen operator. Subclasses say what it does."""

    __slots__ = ()
    name: str = "operation"
    #: Whether the operation can return None for an output (an undefined tangent).
    may_return_none: bool = False
    #: Whether outputs may alias something that the operation's author owns.
    may_alias: bool = True
    #: Whether it belongs to one point, because it holds a node of its graph.
    of_point: bool = True
    #: Whether its author says that it can be called inside `torch.vmap`.
    takes_batches: bool = False
    #: Whether other ranks wait for it: it is called in every product, whatever its arguments.
    communicates: bool = False
    #: What a user may want to know of it.
    note: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the operation."""
        raise NotImplementedError

    def bytes_kept(self) -> Iterable[torch.Tensor]:
        """Return the tensors that the operation keeps alive."""
        return ()

    def moved(self, counterpart: Callable[[Any], Any]) -> Operation | None:
        """Return the same operation at another point, None if that is not possible.

        `counterpart` gives, for what the operation holds of its graph, the same of another.
        """
        return None if self.of_point else self


@dataclasses.dataclass(slots=True, eq=False)
class Equation:
    """One step: `outputs = op(*args, **kwargs)`.

    Attributes
    ----------
    op
        An ATen overload or an `Operation`.
    args, kwargs
        May contain `Var` and `Constant` leaves, also inside lists and tuples.
    outputs
        One `Var` per output of the operation; None for one that is not used or has no tangent.
    source
        The graph node that the equation comes from, for printing and errors.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Var | None, ...]
    source: str = ""
    _reads: tuple[Any, ...] | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """Printable name of the operation."""
        return op_name(self.op)

    @property
    def communicates(self) -> bool:
        """Whether other ranks wait for it."""
        return isinstance(self.op, Operation) and self.op.communicates

    @property
    def kind(self) -> str:
        """The name without the overload: `add` for `add.Tensor`."""
        return self.name if isinstance(self.op, Operation) else self.name.partition(".")[0]

    @property
    def result(self) -> Var | None:
        """Its output, None if that is not used or there are several."""
        return self.outputs[0] if len(self.outputs) == 1 else None

    def inputs(self) -> list[Var]:
        """Return the variables that the equation reads, repeated as they are."""
        reads = self.reads() if self._reads is None else self._reads
        return [x for x in reads if type(x) is Var]

    def constants(self) -> list[Constant]:
        """Return the constants that the equation reads, repeated as they are."""
        reads = self.reads() if self._reads is None else self._reads
        return [x for x in reads if type(x) is Constant]

    def reads(self) -> tuple[Any, ...]:
        """Return the variables and constants among the arguments."""
        if self._reads is None:  # arguments never change once an equation is made
            found = leaves((self.args, self.kwargs) if self.kwargs else self.args)
            self._reads = tuple([x for x in found if type(x) in _READ])
        return self._reads

    def argument(self, i: int, default: Any, name: str = "") -> Any:
        """Return a positional argument, which may be given by its name or left out."""
        return self.args[i] if len(self.args) > i else self.kwargs.get(name, default)

    def renamed(
        self,
        rename: Callable[[Any], Any],
        *,
        op: Callable[..., Any] | None = None,
        outputs: tuple[Var | None, ...] | None = None,
        source: str | None = None,
    ) -> Equation:
        """Return the equation with other variables and constants, and what else is given.

        `op`, `outputs` and `source` take the place of the equation's own.
        """

        def leaf(x: Any) -> Any:
            return rename(x) if type(x) in _READ else x

        made = Equation(
            self.op if op is None else op,
            map_leaves(leaf, self.args),
            map_leaves(leaf, self.kwargs) if self.kwargs else {},
            self.outputs if outputs is None else outputs,
            self.source if source is None else source,
        )
        if not self.kwargs and _READ.issuperset(map(type, made.args)):
            made._reads = made.args
        return made


#: What an equation reads of a program.
_READ = frozenset((Var, Constant))


def _other_term(eq: Equation, zero: set[Var]) -> Var | None:
    """Return a in `a + 0` where that is the sum as it stands."""
    if eq.op is not aten.add.Tensor or eq.kwargs:
        return None
    terms = [v for v in eq.inputs() if v not in zero]
    other = terms[0] if len(terms) == 1 else None
    return other if other is not None and other.spec == eq.outputs[0].spec else None  # type: ignore[union-attr]


def op_name(op: Any) -> str:
    """Return the printable name of an operation."""
    if isinstance(op, Operation):
        return op.name
    return str(op).removeprefix("aten.").removesuffix(".default")


class Program:
    """A linear map as a list of equations.

    Attributes
    ----------
    inputs
        The variables that stand for the argument.
    equations
        In order of execution.
    outputs
        One variable per component of the result; None for one that is always zero.
    specs
        Shape, dtype and device of each component of the result.
    fixed
        Why another point of the same structure may have another program; empty if it has not.
    """

    __slots__ = (
        "__weakref__",
        "_constants",
        "_of_point",
        "equations",
        "fixed",
        "inputs",
        "name",
        "outputs",
        "specs",
    )

    def __init__(
        self,
        inputs: Sequence[Var],
        equations: Sequence[Equation],
        outputs: Sequence[Var | None],
        specs: Sequence[TensorSpec],
        name: str = "program",
        fixed: str = "",
    ) -> None:
        self.inputs = tuple(inputs)
        self.equations = tuple(equations)
        self.outputs = tuple(outputs)
        self.specs = tuple(specs)
        self.name = name
        self.fixed = fixed
        self._constants: tuple[Constant, ...] | None = None
        self._of_point: bool | None = None

    def live(self) -> Program:
        """Return the program without the equations that no output depends on."""
        needed = {v for v in self.outputs if v is not None}
        kept: list[Equation] = []
        for eq in reversed(self.equations):
            if not needed.isdisjoint(eq.outputs) or eq.communicates:
                kept.append(eq)
                needed.update(eq.inputs())
        return self.with_equations(kept[::-1])

    def with_equations(
        self, equations: Sequence[Equation], outputs: Sequence[Var | None] | None = None
    ) -> Program:
        """Return a program of the same inputs with other equations."""
        outs = self.outputs if outputs is None else outputs
        return Program(self.inputs, equations, outs, self.specs, self.name, self.fixed)

    def restricted(self, present: Sequence[bool]) -> Program:
        """Return the program for arguments of which only those `present` are not zero."""
        zero = {v for v, here in zip(self.inputs, present, strict=True) if not here}
        same: dict[Var, Var] = {}
        kept: list[Equation] = []

        def replaced(x: Any) -> Any:
            return zeros(x.spec) if x in zero else same.get(x, x)

        for eq in self.equations:
            absent = [v in zero for v in eq.inputs()]
            if absent and all(absent) and not eq.communicates:
                zero.update(v for v in eq.outputs if v is not None)
                continue
            if not any(absent):
                kept.append(eq.renamed(replaced))
            elif isinstance(eq.op, Operation):
                # A custom Function is told that there is no tangent.
                args = tuple(None if a in zero else replaced(a) for a in eq.args)
                kept.append(Equation(eq.op, args, {}, eq.outputs, eq.source))
            elif (other := _other_term(eq, zero)) is not None and eq.outputs[0] is not None:
                same[eq.outputs[0]] = same.get(other, other)
            else:
                kept.append(eq.renamed(replaced))
        inputs = [v for v, here in zip(self.inputs, present, strict=True) if here]
        outputs = [None if v is None or v in zero else same.get(v, v) for v in self.outputs]
        return Program(inputs, kept, outputs, self.specs, self.name, self.fixed).live()

    def uses(self) -> Counter[Var]:
        """Return how often each variable is read or returned."""
        count = Counter(v for eq in self.equations for v in eq.inputs())
        count.update(v for v in self.outputs if v is not None)
        return count

    def opaque(self) -> list[Operation]:
        """Return the operations that are not ATen operators, in order."""
        return [eq.op for eq in self.equations if isinstance(eq.op, Operation)]

    def with_opaque(self, ops: Sequence[Operation]) -> Program:
        """Return the program with others in place of its opaque operations."""
        if list(ops) == self.opaque():
            return self
        rest = iter(ops)
        return self.with_equations(
            [
                Equation(next(rest), eq.args, eq.kwargs, eq.outputs, eq.source)
                if isinstance(eq.op, Operation)
                else eq
                for eq in self.equations
            ]
        )

    def is_opaque(self) -> bool:
        """Whether user code is called."""
        return bool(self.opaque())

    def communicates(self) -> bool:
        """Whether other ranks wait for something in it."""
        return any(eq.communicates for eq in self.equations)

    @property
    def is_of_point(self) -> bool:
        """Whether it calls user code that belongs to one point; at each new point it is asked."""
        if self._of_point is None:
            self._of_point = any(op.of_point for op in self.opaque())
        return self._of_point

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants that the equations read, each once, in the order of a `Binding`."""
        if self._constants is None:
            reads = {x: None for eq in self.equations for x in eq.reads() if type(x) is Constant}
            self._constants = tuple(reads)
        return self._constants

    def last_uses(self) -> list[list[Var]]:
        """Return for each equation the variables that are not needed after it."""
        return last_uses([(*eq.inputs(), *eq.outputs) for eq in self.equations], self.outputs)

    def peak_bytes(self) -> int:
        """Return the most bytes that variables take at once, each counted in full."""
        now = peak = sum(v.spec.nbytes for v in self.inputs)
        for eq, gone in zip(self.equations, self.last_uses(), strict=True):
            made = {v for v in eq.outputs if v is not None}
            now += sum(v.spec.nbytes for v in made.difference(gone))
            peak = max(peak, now)
            now -= sum(v.spec.nbytes for v in gone if v not in made)
        return peak

    def check(self) -> None:
        """Raise `LinearizeError` if a variable is read before it is defined, or defined twice."""
        defined = set(self.inputs)
        if len(defined) != len(self.inputs):
            raise LinearizeError(f"{self.name}: an input stands twice")
        for i, eq in enumerate(self.equations):
            for x in eq.reads():
                if x not in defined and type(x) is Var:
                    raise LinearizeError(
                        f"{self.name}: equation {i} ({eq.name}) reads an undefined variable"
                    )
            for out in eq.outputs:
                if out is None:
                    continue
                if out in defined:
                    raise LinearizeError(
                        f"{self.name}: equation {i} ({eq.name}) defines a variable again"
                    )
                defined.add(out)
        self.check_outputs(defined)

    def check_outputs(self, defined: Container[Var]) -> None:
        """Raise if an output is not among the variables that are defined, or not as specified."""
        for out, spec in zip(self.outputs, self.specs, strict=True):
            if out is not None and out not in defined:
                raise LinearizeError(f"{self.name}: an output is never defined")
            if out is not None and out.spec != spec:
                raise LinearizeError(f"{self.name}: an output is {out.spec}, expected {spec}")

    def __str__(self) -> str:
        return "\n".join(printed(self))

    def __repr__(self) -> str:
        return f"<Program {self.name}: {len(self.equations)} equations>"


class Emitter:
    """Collects equations while a program is being built.

    Attributes
    ----------
    source
        What equations, and constants made here, come from.
    numbers
        The tensors of the constants.
    fixed
        As of the program (see `Program`).
    """

    __slots__ = ("equations", "fixed", "numbers", "source")

    def __init__(
        self, source: str = "", numbers: Numbers | None = None, *, fixed: str = ""
    ) -> None:
        self.equations: list[Equation] = []
        self.source = source
        self.numbers = Numbers() if numbers is None else numbers
        self.fixed = fixed

    def emit(
        self, op: Callable[..., Any], args: tuple[Any, ...], spec: TensorSpec, **kwargs: Any
    ) -> Var:
        """Append an equation with one output and return that output."""
        out = Var(spec)
        self.add(op, args, (out,), **kwargs)
        return out

    def add(
        self, op: Any, args: tuple[Any, ...], outputs: Iterable[Var | None], /, **kwargs: Any
    ) -> None:
        """Append an equation that defines some variables."""
        self.equations.append(Equation(op, args, kwargs, tuple(outputs), self.source))

    def shaped(self, v: Var, *shape: int) -> Var:
        """Return a value in another shape."""
        if v.spec.shape == shape:
            return v
        return self.emit(aten.reshape.default, (v, list(shape)), v.spec.shaped(*shape))

    def dense(self, v: Var) -> Var:
        """Return a copy of a value that lies in memory in order."""
        return self.emit(aten.clone.default, (v,), v.spec, memory_format=torch.contiguous_format)

    def cast(self, v: Var, spec: TensorSpec) -> Var:
        """Return a value in the dtype and on the device of a specification of its shape."""
        if v.spec == spec:
            return v
        return self.emit(aten._to_copy.default, (v,), spec, dtype=spec.dtype, device=spec.device)

    def constant(self, tensor: torch.Tensor) -> Constant:
        """Make a constant of a tensor of which nothing more is known."""
        return self.numbers.constant(tensor, self.source)

    def inline(
        self,
        program: Program,
        arguments: Sequence[Var],
        constants: Mapping[Constant, Constant] | None = None,
    ) -> list[Var | None]:
        """Append a program's equations with its inputs replaced, and return its outputs.

        The program's own variables are renamed, so that it can be inlined any number of times;
        constants stay, except for those that `constants` replaces.
        """
        names: dict[Any, Any] = dict(zip(program.inputs, arguments, strict=True))
        names.update(constants or {})
        self.fixed = self.fixed or program.fixed

        def rename(x: Any) -> Any:
            return names[x] if type(x) is Var else names.get(x, x)

        for eq in program.equations:
            outs = tuple([None if v is None else Var(v.spec) for v in eq.outputs])
            source = joined(eq.source, [self.source]) if eq.source else self.source
            self.equations.append(eq.renamed(rename, outputs=outs, source=source))
            names.update(zip(eq.outputs, outs, strict=True))
        return [None if v is None else names[v] for v in program.outputs]


def printed(program: Program, kept: str = "") -> Iterator[str]:
    """Yield the lines in which a program is printed; `kept` says how much is kept for it."""
    names: dict[Any, str] = {}
    constants = program.constants
    for i, c in enumerate(constants):
        names[c] = f"r{i}"
    for v in program.inputs:
        names[v] = f"v{len(names) - len(constants)}"

    def show(x: Any) -> str:
        if isinstance(x, Value):
            return names[x]
        if isinstance(x, (list, tuple)):
            return "[" + ", ".join(show(y) for y in x) + "]"
        if isinstance(x, float):
            return f"{x:.6g}"
        return str(x)

    arguments = ", ".join(f"{names[v]}: {v.spec}" for v in program.inputs)
    yield f"{program.name} ({arguments})   # {len(program.equations)} equations{kept}"
    for c in constants:
        yield f"  {names[c]}: {c.spec} = residual of {c.source or 'the run'}"
    for eq in program.equations:
        outs = []
        for out in eq.outputs:
            if out is None:
                outs.append("_")
            else:
                names[out] = f"v{len(names) - len(constants)}"
                outs.append(f"{names[out]}: {out.spec}")
        args = [show(a) for a in eq.args] + [f"{k}={show(a)}" for k, a in eq.kwargs.items()]
        text = f"  {', '.join(outs)} = {eq.name}({', '.join(args)})"
        yield f"{text}   # {eq.source}" if eq.source else text
    results = ", ".join("zero" if v is None else names[v] for v in program.outputs)
    yield f"  return {results}"
