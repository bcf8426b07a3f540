"""Floor 2: writing down the linear program of a pullback.

`record_pullback` walks an autograd graph from its roots to its leaves. A built-in node is
called with random cotangents under a `Recorder`, which writes down each ATen operation that
touches something derived from a cotangent; all else that the node computes is a residual. A
custom Function's node is written down as one operation and not executed.

Random cotangents, because real backward formulas branch on zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._capture import Graph
from ._functions import CustomBackward, CustomNode
from ._linearity import (
    CONSTANT,
    READS_NUMBERS,
    UNINITIALIZED,
    functional_variant,
    known_linear,
    schema_of,
    tested_linear,
)
from ._program import (
    Emitter,
    Equation,
    Operation,
    Program,
    Residual,
    Var,
    leaves,
    map_leaves,
    zero_residual,
)
from ._space import TensorSpec
from ._torch import Node, OpOverload, TorchDispatchMode, aten, input_metadata
from .errors import LinearizeError, StalenessError, UnsupportedError


class OpaqueError(LinearizeError):
    """Raised inside a recording that meets code which it cannot follow."""


class _Entry:
    """A tensor met while recording: its variable (None for a constant)."""

    __slots__ = ("ref", "uninitialized", "var")

    def __init__(self, t: torch.Tensor, var: Var | None, uninitialized: bool = False) -> None:
        self.ref = weakref.ref(t)
        self.var = var
        self.uninitialized = uninitialized


class Functionalized(Operation):
    """An operation that writes to its arguments, run on copies; returns what it wrote."""

    __slots__ = ("op", "writes")
    may_alias = False

    def __init__(self, op: OpOverload) -> None:
        self.op = op
        self.writes = schema_of(op).writes

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return f"functional {schema_of(self.op).name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operation on copies."""
        arguments, keywords = list(args), dict(kwargs)
        written = []
        for position, name in self.writes:
            if position >= 0 and position < len(arguments):
                arguments[position] = t = arguments[position].clone()
            else:
                keywords[name] = t = keywords[name].clone()
            written.append(t)
        self.op(*arguments, **keywords)
        return written[0] if len(written) == 1 else written


class Recorder(TorchDispatchMode):
    """Writes down what is done to variables.

    Parameters
    ----------
    emitter
        Receives the equations.
    """

    def __init__(self, emitter: Emitter) -> None:
        super().__init__()
        self.emitter = emitter
        self._entries: dict[int, _Entry] = {}
        self._residuals: dict[int, Residual] = {}

    def define(self, t: torch.Tensor, var: Var | None, uninitialized: bool = False) -> None:
        """Let `t` stand for `var` from now on."""
        self._entries[id(t)] = _Entry(t, var, uninitialized)

    def variable(self, t: Any) -> Var | None:
        """Return the variable that `t` stands for, None for a constant."""
        entry = self._entries.get(id(t))
        return entry.var if entry is not None and entry.ref() is t else None

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = schema_of(func)
        derived = any(
            isinstance(x, torch.Tensor) and self.variable(x) is not None
            for x in leaves((args, kwargs))
        )
        if not derived or func in CONSTANT:
            out = func(*args, **kwargs)
            for t in leaves(out):
                if isinstance(t, torch.Tensor) and self.variable(t) is None:
                    self.define(t, None, func in UNINITIALIZED)
            return out
        if func in READS_NUMBERS:
            raise OpaqueError(f"reads the numbers in its argument ({schema.name})")
        if schema.writes:
            return self._mutation(func, args, kwargs)
        self._must_be_linear(func, args, kwargs)
        out = func(*args, **kwargs)
        self._write_down(func, args, kwargs, out)
        return out

    # -- one operation ------------------------------------------------------------------

    def _must_be_linear(self, func: OpOverload, args: Any, kwargs: Any) -> None:
        holds = [any(self.variable(x) is not None for x in leaves(a)) for a in args]
        keyword = any(self.variable(x) is not None for x in leaves(kwargs))
        if not keyword and known_linear(func, self._without_zeros(func, args, holds)):
            return
        with torch.no_grad():
            if not tested_linear(func, args, kwargs, lambda x: self.variable(x) is not None):
                raise OpaqueError(f"{schema_of(func).name} is not linear in the cotangent")

    def _without_zeros(self, func: OpOverload, args: Any, holds: list[bool]) -> list[bool]:
        """Count constants that are zero as variables in sums: `0 + g` is linear."""
        name = schema_of(func).name
        if name in ("add", "sub") and len(args) == 2 and not all(holds):
            other = args[holds.index(False)]
            zero = not bool(other.any()) if isinstance(other, torch.Tensor) else other == 0
            return [True, True] if zero else holds
        if name in ("cat", "stack"):
            parts = args[0]
            fine = all(self.variable(x) is not None or not bool(x.any()) for x in parts)
            return [True] if fine else holds
        return holds

    def _argument(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        var = self.variable(x)
        return self.residual(x) if var is None else var

    def residual(self, t: torch.Tensor) -> Residual:
        """Return the residual for a constant, one for each tensor."""
        known = self._residuals.get(id(t))
        if known is None or known.tensor is not t:
            # Without history: an unpacked output would hold the graph alive.
            known = Residual(t.detach() if t.requires_grad else t, self.emitter.source)
            self._residuals[id(known.tensor)] = known
            if known.tensor is not t:
                self.define(known.tensor, None)
        return known

    def _write_down(
        self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any
    ) -> list[Var | None]:
        outputs: list[Var | None] = []
        flat = list(out) if isinstance(out, (tuple, list)) else [out]
        for t in flat:
            if not isinstance(t, torch.Tensor) or not (t.is_floating_point() or t.is_complex()):
                # A comparison with the cotangent is frozen as it is at a random one; that it
                # does not matter elsewhere is tested with a second one.
                outputs.append(None)
                if isinstance(t, torch.Tensor):
                    self.define(t, None)
                continue
            var = Var(TensorSpec.of(t))
            outputs.append(var)
            self.define(t, var)
        if any(v is not None for v in outputs):
            arguments = map_leaves(self._argument, list(args))
            self.emitter.equations.append(
                Equation(
                    func,
                    tuple(arguments),
                    map_leaves(self._argument, dict(kwargs)),
                    tuple(outputs),
                    self.emitter.source,
                )
            )
        return outputs

    # -- operations that write to their arguments ----------------------------------------

    def _mutation(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        schema = schema_of(func)
        written = [
            args[position] if 0 <= position < len(args) else kwargs[name]
            for position, name in schema.writes
        ]
        aliases = [self._aliases(t) for t in written]
        before = [[(a, a.clone()) for a in group] for group in aliases]
        contents = [self._content(t) for t in written]
        values = self._functional(func, args, kwargs, written, contents)
        out = func(*args, **kwargs)
        for t, var, group in zip(written, values, before, strict=True):
            changed = [a for a, old in group if not torch.equal(_bits(a), _bits(old))]
            flat = self._flat_content(t, [*(a for a, _ in group), t]) if changed else None
            self.define(t, var)
            if flat is not None and var is not None:
                self._propagate(t, var, changed, flat)
            elif changed and var is None:
                for a in changed:
                    self._overwritten(a)
        return out

    def _overwritten(self, a: torch.Tensor) -> None:
        if self.variable(a) is not None:
            raise OpaqueError("overwrites a part of something derived from the cotangent")

    def _aliases(self, t: torch.Tensor) -> list[torch.Tensor]:
        """Return the other live tensors on the same storage."""
        storage = t.untyped_storage().data_ptr()
        found = []
        for key, entry in list(self._entries.items()):
            other = entry.ref()
            if other is None:
                del self._entries[key]
            elif other is not t and other.untyped_storage().data_ptr() == storage:
                found.append(other)
        return found

    def _content(self, t: torch.Tensor) -> Var | Residual:
        """Return what a tensor holds before it is written to."""
        var = self.variable(t)
        if var is not None:
            return var
        entry = self._entries.get(id(t))
        empty = entry is not None and entry.uninitialized
        if empty or not bool(t.any()):
            # One zero, expanded: it costs no memory.
            return zero_residual(TensorSpec.of(t))
        return Residual(t.clone(), self.emitter.source)

    def _functional(
        self,
        func: OpOverload,
        args: Any,
        kwargs: Any,
        written: list[torch.Tensor],
        contents: list[Var | Residual],
    ) -> list[Var | None]:
        """Write down a writing operation as one that returns new values."""
        name = schema_of(func).name
        target = written[0]
        if name in ("zero_", "fill_"):
            if name == "fill_" and self.variable(args[1]) is not None:
                raise OpaqueError("fill_ with a number derived from the cotangent")
            return [None]
        if name == "copy_":
            source = args[1]
            if self.variable(source) is None:
                return [None]
            return [self._shaped(self.variable(source), target)]

        def replaced(x: Any) -> Any:
            for t, content in zip(written, contents, strict=True):
                if x is t:
                    return content
            return self._argument(x)

        variant = functional_variant(func)
        out_names = {n for position, n in schema_of(func).writes if position == -1}
        with torch.no_grad():
            copies = {id(t): t.clone() for t in written}

            def number(x: Any) -> Any:
                return copies.get(id(x), x)

            def is_variable(x: Any) -> bool:
                for t, content in zip(written, contents, strict=True):
                    if x is copies[id(t)] or x is t:
                        return isinstance(content, Var) or content.source == "zeros"
                return self.variable(x) is not None

            keywords = {k: v for k, v in kwargs.items() if k not in out_names or variant is None}
            operation: Any = variant if variant is not None else Functionalized(func)
            if not tested_linear(
                operation,
                map_leaves(number, list(args)),
                map_leaves(number, keywords),
                is_variable,
            ):
                raise OpaqueError(f"{name} is not linear in the cotangent")
        outputs = [Var(TensorSpec.of(t)) for t in written]
        self.emitter.equations.append(
            Equation(
                operation,
                tuple(map_leaves(replaced, list(args))),
                map_leaves(replaced, keywords),
                tuple(outputs),
                self.emitter.source,
            )
        )
        return list(outputs)

    def _shaped(self, var: Var | None, like: torch.Tensor) -> Var:
        """Write down the broadcast and cast of `var` to the shape and dtype of `like`."""
        assert var is not None
        spec = TensorSpec.of(like)
        if var.spec.shape != spec.shape:
            middle = TensorSpec(spec.shape, var.spec.dtype, var.spec.device)
            var = self.emitter.emit(aten.expand.default, (var, list(spec.shape)), middle)
        if var.spec != spec:
            var = self.emitter.emit(
                aten._to_copy.default, (var,), spec, dtype=spec.dtype, device=spec.device
            )
        return var

    def _flat_content(self, t: torch.Tensor, group: Sequence[torch.Tensor]) -> Var | Residual:
        """Return the whole storage under `t`, as it was before, as a flat value."""
        count = t.untyped_storage().nbytes() // t.element_size()
        spec = TensorSpec((count,), t.dtype, t.device)
        for a in group:
            if a.dtype != t.dtype:
                raise OpaqueError("writes through a view of another dtype")
            var = self.variable(a)
            if var is not None and a.numel() == count and a.is_contiguous():
                return self._flattened(var, spec)
        flat: Var | Residual = zero_residual(spec)
        for a in group:
            var = self.variable(a)
            if var is not None:
                flat = self.emitter.emit(
                    aten.as_strided_scatter.default,
                    (flat, var, list(a.shape), list(a.stride()), a.storage_offset()),
                    spec,
                )
        return flat

    def _flattened(self, var: Var, spec: TensorSpec) -> Var:
        # Contiguous, because the strides at a later run may be others.
        dense = self.emitter.emit(
            aten.clone.default, (var,), var.spec, memory_format=torch.contiguous_format
        )
        return self.emitter.emit(aten.view.default, (dense, list(spec.shape)), spec)

    def _propagate(
        self, t: torch.Tensor, var: Var, changed: list[torch.Tensor], flat: Var | Residual
    ) -> None:
        """After a write to `t`, let the changed tensors on its storage stand for the result."""
        count = t.untyped_storage().nbytes() // t.element_size()
        spec = TensorSpec((count,), t.dtype, t.device)
        flat = self.emitter.emit(
            aten.as_strided_scatter.default,
            (flat, var, list(t.shape), list(t.stride()), t.storage_offset()),
            spec,
        )
        for a in changed:
            view = self.emitter.emit(
                aten.as_strided.default,
                (flat, list(a.shape), list(a.stride()), a.storage_offset()),
                TensorSpec.of(a),
            )
            self.define(a, view)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(t.detach().resolve_conj().resolve_neg())


class NodeBackward(Operation):
    """The pullback of a graph node that is not written in PyTorch operations (C++ extensions)."""

    __slots__ = ("inputs", "label", "node", "outputs")

    def __init__(
        self, node: Node, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self.node = node
        self.label = node.name()
        #: Specs of the gradients that it returns, and of those that it takes.
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return self.label

    def __call__(self, *grads: torch.Tensor | None) -> Any:
        """Call the node."""
        with torch.inference_mode(False), torch.no_grad():
            result = self.node(*(None if g is None else g.clone() for g in grads))
        return result if isinstance(result, (tuple, list)) else (result,)


def _metadata_spec(meta: Any) -> TensorSpec:
    return TensorSpec(tuple(meta.shape), meta.dtype, meta.device)


class _Walk:
    """One walk over a graph, from roots to leaves."""

    def __init__(self, graph: Graph, emitter: Emitter, generator: torch.Generator) -> None:
        self.graph = graph
        self.emitter = emitter
        self.generator = generator
        self.recorder = Recorder(emitter)
        self.pending: dict[Node, dict[int, torch.Tensor]] = {}
        self.reached = set(graph.order)

    def placeholder(self, spec: TensorSpec, var: Var) -> torch.Tensor:
        """Return random numbers that stand for `var`."""
        t = spec.random(self.generator)
        self.recorder.define(t, var)
        return t

    def run(self, seeds: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Walk from the roots, one seed each; return what arrives at the leaves."""
        with torch.inference_mode(False), torch.no_grad(), self.recorder:
            for edge, seed in zip(self.graph.roots, seeds, strict=True):
                if edge is not None:
                    self.deliver(edge, seed)
            targets = set(self.graph.leaves)
            for node in self.graph.order:
                if node in targets:
                    continue
                received = self.pending.pop(node, None)
                if received:
                    self.visit(node, received)
        arrived = (self.pending.get(leaf, {}) for leaf in self.graph.leaves)
        return [got.get(0) for got in arrived]

    def deliver(self, edge: tuple[Node, int], grad: torch.Tensor) -> None:
        """Add a gradient to what a node receives, in the shape and dtype that it expects."""
        node, nr = edge
        grad = _fitted(grad, _metadata_spec(input_metadata(node)[nr]))
        slot = self.pending.setdefault(node, {})
        slot[nr] = slot[nr] + grad if nr in slot else grad

    def visit(self, node: Node, received: dict[int, torch.Tensor]) -> None:
        """Write down one node."""
        self.emitter.source = node.name()
        custom = self.graph.custom.get(node)
        if custom is not None:
            self.custom(custom, node, received)
            return
        count = len(input_metadata(node))
        grads = [received.get(i) for i in range(count)]
        mark = len(self.emitter.equations)
        try:
            result = self.call(node, grads)
            opaque = self.is_opaque(result)
        except OpaqueError:
            opaque = True
        if opaque:
            del self.emitter.equations[mark:]
            self.opaque(node, grads)
            return
        for edge, grad in zip(node.next_functions, result, strict=False):
            if edge[0] is None or grad is None or not self.wanted(edge[0]):
                continue
            if self.recorder.variable(grad) is not None:
                self.deliver(edge, grad)

    def wanted(self, node: Node) -> bool:
        """Whether a node leads to a leaf."""
        return node in self.reached

    def call(self, node: Node, grads: list[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Call a built-in node."""
        name = node.name()
        if "NotImplemented" in name:
            raise UnsupportedError(
                f"{name}: this operation has no derivative registered (for a torch.library "
                "operator, call register_autograd)"
            )
        try:
            result = node(*grads)
        except LinearizeError:
            raise
        except RuntimeError as error:
            text = str(error)
            if "modified by an inplace operation" in text or "modified in-place" in text:
                raise StalenessError(
                    f"{name}: a tensor that it needs was changed in place after the "
                    f"linearization: {text}"
                ) from error
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedError(
                f"{name}: PyTorch cannot apply its derivative: {text}"
            ) from error
        return result if isinstance(result, (tuple, list)) else (result,)

    def is_opaque(self, result: Sequence[torch.Tensor | None]) -> bool:
        """Whether a gradient does not descend from the cotangents although it is not zero."""
        return any(
            g is not None and self.recorder.variable(g) is None and bool(g.any()) for g in result
        )

    def opaque(self, node: Node, grads: list[torch.Tensor | None]) -> None:
        """Write down a node as one operation."""
        edges = node.next_functions
        specs = [None if n is None else _metadata_spec(input_metadata(n)[nr]) for n, nr in edges]
        takes = [_metadata_spec(m) for m in input_metadata(node)]
        gives = [s for s in specs if s is not None]
        self.place(NodeBackward(node, gives, takes), edges, specs, grads)

    def custom(self, custom: CustomNode, node: Node, received: dict[int, torch.Tensor]) -> None:
        """Write down a custom Function's node as one operation."""
        custom.know_outputs(min(received))
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        grads = [received.get(i) for i in range(len(custom.outputs))]
        self.place(CustomBackward(custom), edges, custom.inputs, grads)

    def place(
        self,
        op: Operation,
        edges: Sequence[tuple[Node | None, int]],
        specs: Sequence[TensorSpec | None],
        grads: Sequence[torch.Tensor | None],
    ) -> None:
        """Write down an operation that is not executed, and let random numbers stand for it."""
        outputs: list[Var | None] = []
        after: list[tuple[tuple[Node, int], torch.Tensor]] = []
        for edge, spec in zip(edges, specs, strict=True):
            node, nr = edge
            if node is None or spec is None or not self.wanted(node):
                outputs.append(None)
                continue
            var = Var(spec)
            outputs.append(var)
            after.append(((node, nr), self.placeholder(spec, var)))
        args = tuple(None if g is None else self.recorder.variable(g) for g in grads)
        self.emitter.equations.append(Equation(op, args, {}, tuple(outputs), self.emitter.source))
        for target, t in after:
            self.deliver(target, t)


def _fitted(grad: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Do what the autograd engine does to a gradient before it hands it on."""
    if grad.shape != spec.shape:
        grad = grad.sum_to_size(spec.shape)
    if grad.is_complex() and not spec.dtype.is_complex:
        grad = torch.view_as_real(grad.resolve_conj()).select(-1, 0)
    if grad.dtype != spec.dtype or grad.device != spec.device:
        grad = grad.to(device=spec.device, dtype=spec.dtype)
    return grad


def record_pullback(
    graph: Graph,
    out_specs: Sequence[TensorSpec],
    in_specs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    name: str = "pullback",
) -> Program:
    """Record the linear program from cotangents of a graph's roots to those of its leaves.

    Parameters
    ----------
    graph
        The autograd graph.
    out_specs
        The specification of each root's cotangent.
    in_specs
        The specification of each leaf.
    seed
        Of the random cotangents.
    name
        The program's name.

    Raises
    ------
    UnsupportedError
        If a node's derivative cannot be applied; the message names the node.
    StalenessError
        If a tensor saved by the graph was changed in place.
    """
    emitter = Emitter()
    walk = _Walk(graph, emitter, torch.Generator().manual_seed(seed))
    inputs = [Var(spec) for spec in out_specs]
    seeds = [walk.placeholder(v.spec, v) for v in inputs]
    arrived = walk.run(seeds)
    outputs = [None if t is None else walk.recorder.variable(t) for t in arrived]
    return Program(inputs, emitter.equations, outputs, in_specs, name).live()


def record_function(
    fn: Callable[..., Sequence[torch.Tensor | None]],
    in_specs: Sequence[TensorSpec],
    out_specs: Sequence[TensorSpec | None],
    *,
    seed: int = 0,
    name: str = "map",
    source: str = "",
) -> tuple[Program, list[torch.Tensor], list[torch.Tensor | None]]:
    """Record a linear function written in PyTorch operations by calling it once.

    Returns
    -------
    program, arguments, results
        The program, the random numbers that `fn` was called with, and what it returned.

    Raises
    ------
    OpaqueError
        If `fn` does something that cannot be written down: its result does not descend from
        its arguments, or an operation in it is not linear or reads numbers.
    """
    emitter = Emitter(source)
    recorder = Recorder(emitter)
    generator = torch.Generator().manual_seed(seed)
    inputs = [Var(spec) for spec in in_specs]
    arguments = [spec.random(generator) for spec in in_specs]
    for t, v in zip(arguments, inputs, strict=True):
        recorder.define(t, v)
    with torch.inference_mode(False), torch.no_grad(), recorder:
        results = list(fn(*arguments))
    outputs: list[Var | None] = []
    specs: list[TensorSpec] = []
    for t, spec in zip(results, out_specs, strict=True):
        if spec is None:
            continue
        specs.append(spec)
        var = None if t is None else recorder.variable(t)
        if t is not None and var is None and bool(t.any()):
            raise OpaqueError("returns something that does not descend from its argument")
        outputs.append(var)
    return Program(inputs, emitter.equations, outputs, specs, name).live(), arguments, results
