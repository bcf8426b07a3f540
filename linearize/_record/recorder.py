"""The recorder, which writes down what is done to variables.

A `Recorder` is a dispatch mode: it sees every ATen operation that runs under it. Operations
on variables become equations; operations on constants just run. Writes into tensors are
turned into operations that return new values, also through views.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._programs.aten import (
    CONSTANT,
    READS_NUMBERS,
    UNINITIALIZED,
    Schema,
    functional_variant,
    schema_of,
    wants_contiguous,
)
from .._programs.origins import Origin
from .._programs.program import Emitter, Equation, Operation
from .._programs.values import Constant, Var, zeros
from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._torch.modes import DispatchMode, lazy_bits_respected
from .._torch.names import OpOverload, aten
from ..errors import LinearizeError
from .constants import Constants
from .linearity import known_linear, linear_by_meaning, tested_linear
from .storage import common_dtype, covered, flat_spec, flattened, memory_order, scattered, shown

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)
_STRIDED = (
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten.view_as_complex.default,
)


class OpaqueError(LinearizeError):
    """Raised inside a recording that meets code which it cannot follow."""


class SparseError(OpaqueError):
    """Raised if that is a sparse tensor made of what is recorded."""


def _is_sparse(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout != torch.strided


class _Entry:
    """A tensor met while recording: its variable (None for a constant)."""

    __slots__ = ("ref", "uninitialized", "var")

    def __init__(self, t: torch.Tensor, var: Var | None, uninitialized: bool = False) -> None:
        self.ref = weakref.ref(t)
        self.var = var
        self.uninitialized = uninitialized


def _is_dense(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.is_contiguous()


class Functionalized(Operation):
    """An operation that writes to its arguments, run on copies; returns what it wrote."""

    __slots__ = ("op", "writes")
    may_alias = False
    of_point = False

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


def _only_shape(kwargs: dict[str, Any]) -> bool:
    """Whether an operation moves its argument to the meta device, where no numbers are.

    PyTorch asks so for the shape of a product with a `ZeroTensor`, as forward mode makes them.
    """
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


class Recorder(DispatchMode):
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
        #: The constants that are read, by their tensors, which they keep alive.
        self._read: dict[int, tuple[torch.Tensor, Constant]] = {}
        #: Tensors that are linear in the cotangents in some places and constant in others.
        self._mixed: dict[int, weakref.ref[torch.Tensor]] = {}
        #: How the constants that are met come about.
        self.constants = Constants(emitter)
        #: A comparison of something derived from a cotangent, if one was met.
        self.frozen = ""

    def define(self, t: torch.Tensor, var: Var | None, uninitialized: bool = False) -> None:
        """Let `t` stand for `var` from now on."""
        self._entries[id(t)] = _Entry(t, var, uninitialized)

    def variable(self, t: Any) -> Var | None:
        """Return the variable that `t` stands for, None for a constant."""
        entry = self._entries.get(id(t))
        if entry is None or entry.ref() is not t:
            return None
        if id(t) in self._mixed:
            raise OpaqueError("writes a constant into something linear in the cotangent")
        return entry.var

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with lazy_bits_respected():
            return self._see(func, args, kwargs or {})

    def _see(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema = schema_of(func)
        if self._mixed:
            if schema.is_view and id(args[0]) in self._mixed:
                return self._view_of_mixed(func, args, kwargs)
            self._overwritten(schema, args, kwargs)
        derived = any(
            isinstance(x, torch.Tensor) and self.variable(x) is not None
            for x in leaves((args, kwargs))
        )
        if not derived or func in CONSTANT or _only_shape(kwargs):
            note = self.constants.seen(func, args, kwargs)
            if schema.writes:
                targets = self._constant_written(schema, args, kwargs)
            out = func(*args, **kwargs)
            note(out)
            for t in targets if schema.writes else ():
                self._partly_constant(t, self._aliases(t))
            empty = func in UNINITIALIZED or (schema.is_view and self._uninitialized(args[0]))
            for t in leaves(out):
                if isinstance(t, torch.Tensor) and self.variable(t) is None:
                    self.define(t, None, empty)
            return out
        if func in READS_NUMBERS:
            raise OpaqueError(f"reads the numbers in its argument ({schema.name})")
        out = None
        try:
            if schema.writes:
                return self._mutation(func, args, kwargs)
            linear = self._linear_outputs(func, args, kwargs)
            out = func(*args, **kwargs)
            self._write_down(func, args, kwargs, out, linear)
        except RuntimeError as error:
            if isinstance(error, (LinearizeError, torch.OutOfMemoryError)):
                raise
            if out is None and not schema.writes:
                out = func(*args, **kwargs)
            if not any(map(_is_sparse, leaves((args, kwargs, out)))):
                raise
            raise SparseError(f"makes a sparse tensor of its argument ({schema.name})") from error
        return out

    # -- one operation ------------------------------------------------------------------

    def _linear_outputs(self, func: OpOverload, args: Any, kwargs: Any) -> list[bool] | None:
        """Return which outputs are linear in the variables, the rest being constants.

        None stands for all. Raises `OpaqueError` if an output is neither.
        """
        holds = [any(self.variable(x) is not None for x in leaves(a)) for a in args]
        keyword = any(self.variable(x) is not None for x in leaves(kwargs))
        if not keyword and known_linear(func, self._without_zeros(func, args, holds)):
            return None
        self._judge(func, holds, keyword, (args, kwargs))
        with torch.no_grad():
            linear = tested_linear(func, args, kwargs, lambda x: self.variable(x) is not None)
        if linear is None:
            raise OpaqueError(f"{schema_of(func).name} is not linear in the cotangent")
        return linear

    def _judge(self, func: OpOverload, holds: list[bool], keyword: bool, given: Any) -> None:
        """Note whether a test of linearity says something about other points too."""

        def static() -> bool:
            others = (
                x
                for x in leaves(given)
                if isinstance(x, torch.Tensor)
                and self.variable(x) is None
                and (x.is_floating_point() or x.is_complex())
            )
            return all(self.constants.static(x) for x in others)

        if keyword or not linear_by_meaning(func, holds, static):
            self.constants.decided(f"linearity of {schema_of(func).name}")

    def _without_zeros(self, func: OpOverload, args: Any, holds: list[bool]) -> list[bool]:
        """Count constants that are zero as variables in sums: `0 + g` is linear."""
        name = schema_of(func).name
        if name in ("add", "sub") and len(args) == 2 and not all(holds):
            other = args[holds.index(False)]
            zero = not self.some(other) if isinstance(other, torch.Tensor) else other == 0
            return [True, True] if zero else holds
        if name in ("cat", "stack"):
            parts = args[0]
            fine = all(self.variable(x) is not None or not self.some(x) for x in parts)
            return [True] if fine else holds
        return holds

    def _argument(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        var = self.variable(x)
        return self.constant(x) if var is None else var

    def constant(self, t: torch.Tensor, origin: Origin | None = None) -> Constant:
        """Return a constant of the program, one for each tensor.

        Parameters
        ----------
        t
            The tensor.
        origin
            How it comes about, if that is told.
        """
        known = self._read.get(id(t))
        if known is None:
            origin = origin or self.constants.origin(t)
            known = t, self.emitter.numbers.constant(t, self.emitter.source, origin)
            self._read[id(t)] = known
        return known[1]

    def some(self, t: torch.Tensor) -> bool:
        """Whether a constant has an entry that is not zero."""
        self.constants.decided_by(t)
        return bool(t.any())

    def finish(self) -> None:
        """Detach the constants from the graph: call this outside, when nothing more follows."""
        for _, c in self._read.values():
            self.emitter.numbers.residual(c).settle()
        self._read = {}

    def _constant_written(self, schema: Schema, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Note that a constant is overwritten."""
        targets = [args[i] if 0 <= i < len(args) else kwargs[name] for i, name in schema.writes]
        for t in targets:
            for a in (t, *self._aliases(t)):
                if id(a) in self._entries:
                    self._entries[id(a)].uninitialized = False
        self._spare_constants(targets)
        return targets

    def _spare_constants(self, targets: Sequence[torch.Tensor]) -> None:
        """Give constants copies of their own before their memory is overwritten."""
        written = {t.untyped_storage().data_ptr() for t in targets}
        for key, (t, c) in list(self._read.items()):
            if t.untyped_storage().data_ptr() in written:
                del self._read[key]
                self.emitter.numbers.residual(c).replace(t.clone())

    def _write_down(
        self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any, linear: list[bool] | None
    ) -> None:
        outputs: list[Var | None] = []
        flat = list(out) if isinstance(out, (tuple, list)) else [out]
        known = iter(linear if linear is not None else [True] * len(flat))
        for t in flat:
            depends = isinstance(t, torch.Tensor) and next(known)
            if not depends or not (t.is_floating_point() or t.is_complex()):
                outputs.append(None)
                if isinstance(t, torch.Tensor):
                    self.define(t, None)
                    if depends:
                        # A comparison with the cotangent is kept as it is at a random one;
                        # whoever records must test that it does not matter elsewhere.
                        self.frozen = f"{schema_of(func).name} in {self.emitter.source}"
                        self.constants.decided(self.frozen)
                continue
            var = Var(TensorSpec.of(t))
            outputs.append(var)
            self.define(t, var)
        if any(v is not None for v in outputs):
            operation, arguments = self._any_layout(func, args)
            self.emitter.equations.append(
                Equation(
                    operation,
                    tuple(arguments),
                    map_leaves(self._argument, dict(kwargs)),
                    tuple(outputs),
                    self.emitter.source,
                )
            )

    def _any_layout(self, func: Callable[..., Any], args: Any) -> tuple[Any, list[Any]]:
        """Return an operation and its arguments that do not rely on strides seen now.

        At a later run a cotangent may be laid out otherwise.
        """
        arguments = map_leaves(self._argument, list(args))
        if func in _VIEWS:
            return aten.reshape.default, arguments[:2]
        if func is aten._neg_view.default:
            return aten.neg.default, arguments  # a view is of no use, and cannot be batched
        if func is aten.view_as_real.default and isinstance(arguments[0], Var):
            # It refuses numbers that are stored conjugated, as a cotangent may be.
            (v,) = arguments
            return func, [self.emitter.emit(aten.resolve_conj.default, (v,), v.spec)]
        if func not in _STRIDED:
            if isinstance(func, OpOverload) and wants_contiguous(func):
                pairs = zip(arguments, args, strict=True)
                arguments = [self._dense(a) if _is_dense(t) else a for a, t in pairs]
            return func, arguments
        x = args[0]
        strided = func is not aten.view_as_complex.default
        order = memory_order(x) if func is aten.as_strided.default else None
        known = x.is_contiguous() or order is not None
        if strided and not (known and isinstance(args[-1], int)):
            raise OpaqueError("as_strided of something that is not contiguous")
        if strided and len(args) != 4 + (func is aten.as_strided_scatter.default):
            raise OpaqueError("as_strided without an offset")
        if isinstance(arguments[0], Var):
            if order and not x.is_contiguous():
                shape = tuple(x.shape[d] for d in order)
                spec = TensorSpec(shape, x.dtype, x.device)
                arguments[0] = self.emitter.emit(aten.permute.default, (arguments[0], order), spec)
            arguments[0] = self.emitter.emit(
                aten.clone.default,
                (arguments[0],),
                arguments[0].spec,
                memory_format=torch.contiguous_format,
            )
            if strided:
                arguments[-1] -= x.storage_offset()
        return func, arguments

    def _dense(self, a: Any) -> Any:
        if not isinstance(a, Var):
            return a
        return self.emitter.emit(aten.contiguous.default, (a,), a.spec)

    # -- operations that write to their arguments ----------------------------------------

    def _mutation(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        schema = schema_of(func)
        written = [
            args[position] if 0 <= position < len(args) else kwargs[name]
            for position, name in schema.writes
        ]
        aliases = [self._aliases(t) for t in written]
        before = [[(a, self._old(a)) for a in group] for group in aliases]
        contents = [self._content(t) for t in written]
        values = self._functional(func, args, kwargs, written, contents)
        self._spare_constants(written)
        note = self.constants.seen(func, args, kwargs)
        out = func(*args, **kwargs)
        if any(var is not None for var in values):
            self.constants.overwritten(written, None)
        else:
            note(out)
        for t, var, group in zip(written, values, before, strict=True):
            changed = self._overlapping(t, group)
            flat = self._flat_content(t, [*(a for a, _ in group), t]) if changed else None
            if var is not None:
                var.spec = TensorSpec.of(t)  # `unsqueeze_` and the like change the shape
            self.define(t, var)
            if flat is None:
                continue
            if var is not None:
                self._propagate(t, var, changed, flat)
            elif isinstance(flat, Var):
                if self.some(t):
                    self._partly_constant(t, changed)
                else:  # zero is linear
                    self._propagate(t, zeros(TensorSpec.of(t)), changed, flat)
        return out

    # -- buffers that are used piece by piece, and may never be read as a whole again ------

    def _partly_constant(self, t: torch.Tensor, others: list[torch.Tensor]) -> None:
        """After a constant was written to `t`, note what is left of tensors on its storage."""
        variables = [a for a in others if self.variable(a) is not None]
        if not variables or not self.some(t):
            return  # zero is linear
        for a, here in zip(variables, covered(t, variables), strict=True):
            if bool(here.any()):
                self.define(a, None)
                if not bool(here.all()):
                    self._set_mixed(a)

    def _set_mixed(self, t: torch.Tensor) -> None:
        """Note that `t` is linear in the cotangents in some places and constant in others."""
        key = id(t)
        self._mixed[key] = weakref.ref(t, lambda _: self._mixed.pop(key, None))

    def _view_of_mixed(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        for t in leaves(out):
            self.define(t, None)
            self._set_mixed(t)
        return out

    def _overwritten(self, schema: Schema, args: Any, kwargs: Any) -> None:
        """Forget what was in tensors that are written to without being read."""
        if schema.name in ("copy_", "zero_", "fill_"):
            targets = [args[0]]
        else:
            targets = [kwargs[name] for position, name in schema.writes if position == -1]
        for t in targets:
            if self._mixed.pop(id(t), None) is not None:
                self.define(t, None, uninitialized=True)

    def _old(self, a: torch.Tensor) -> torch.Tensor | None:
        """Return a copy of a constant's content, None for what has none that matters."""
        return None if self.variable(a) is not None or self._uninitialized(a) else a.clone()

    def _overlapping(
        self, t: torch.Tensor, group: list[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> list[torch.Tensor]:
        """Return the tensors that share memory with `t`, which was written to."""
        if not group:
            return []
        found = []
        places = covered(t, [a for a, _ in group])
        for (a, old), here in zip(group, places, strict=True):
            if bool(here.any()):
                found.append(a)
                if old is not None and here.dim() > old.dim():
                    old = (
                        torch.view_as_real(old.resolve_conj())
                        if old.is_complex()
                        else old[..., None]
                    )
                if old is not None:
                    self.constants.decided_by(a)
                if old is not None and bool((old != 0).logical_and(~here).any()):
                    raise OpaqueError("writes into a buffer that holds something else")
        return found

    def _uninitialized(self, t: torch.Tensor) -> bool:
        entry = self._entries.get(id(t))
        return entry is not None and entry.ref() is t and entry.uninitialized

    def _aliases(self, t: torch.Tensor) -> list[torch.Tensor]:
        """Return the other live tensors on the same storage."""
        storage = t.untyped_storage().data_ptr()
        found = []
        for key, entry in list(self._entries.items()):
            other = entry.ref()
            if other is None:
                del self._entries[key]
            elif other is t or key in self._mixed:
                continue
            elif other.untyped_storage().data_ptr() == storage:
                found.append(other)
        return found

    def _content(self, t: torch.Tensor) -> Var | Constant:
        """Return what a tensor holds before it is written to."""
        var = self.variable(t)
        if var is not None:
            return var
        if self._uninitialized(t) or not self.some(t):
            # One zero, expanded: it costs no memory.
            return zeros(TensorSpec.of(t))
        return self.emitter.numbers.constant(
            t.clone(), self.emitter.source, self.constants.origin(t)
        )

    def _functional(
        self,
        func: OpOverload,
        args: Any,
        kwargs: Any,
        written: list[torch.Tensor],
        contents: list[Var | Constant],
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

        if all(position == -1 for position, _ in schema_of(func).writes):  # `out=`
            read = [x for x in leaves((args, kwargs)) if all(x is not t for t in written)]
            if all(self.variable(x) is None for x in read):
                return [None] * len(written)
        variant = functional_variant(func)
        out_names = {n for position, n in schema_of(func).writes if position == -1}
        keywords = {k: v for k, v in kwargs.items() if k not in out_names or variant is None}
        operation: Any = Functionalized(func) if variant is None else variant

        def is_variable(x: Any) -> bool:
            for t, content in zip(written, contents, strict=True):
                if x is t:
                    return isinstance(content, Var) or content.is_zero
            return self.variable(x) is not None

        holds = [any(is_variable(x) for x in leaves(a)) for a in args]
        if variant is None or keywords or not known_linear(variant, holds):
            self._judge(variant or func, holds, any(map(is_variable, leaves(keywords))), args)
            with torch.no_grad():
                linear = tested_linear(operation, args, keywords, is_variable)
            if linear is None or not all(linear):
                raise OpaqueError(f"{name} is not linear in the cotangent")
        outputs = [Var(self._natural(variant, t, args)) for t in written]
        self.emitter.equations.append(
            Equation(
                operation,
                tuple(map_leaves(replaced, list(args))),
                map_leaves(replaced, keywords),
                tuple(outputs),
                self.emitter.source,
            )
        )
        return [self._shaped(var, t) for var, t in zip(outputs, written, strict=True)]

    @staticmethod
    def _natural(variant: OpOverload | None, t: torch.Tensor, args: Any) -> TensorSpec:
        """Return what an operation gives that does not have to fit into `t`."""
        spec = TensorSpec.of(t)
        others = [x for x in leaves(args) if isinstance(x, torch.Tensor)]
        if variant is None or all(x.dtype == t.dtype or not x.is_floating_point() for x in others):
            return spec
        dtype = t.dtype
        for x in others:
            dtype = torch.result_type(torch.empty(t.shape, dtype=dtype), x)
        return TensorSpec(spec.shape, dtype, spec.device)

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

    def _flat_content(self, t: torch.Tensor, group: Sequence[torch.Tensor]) -> Var | Constant:
        """Return the whole storage under `t`, as it was before, as a flat value."""
        dtype = common_dtype([t, *group])
        if dtype is None:
            raise OpaqueError("writes through a view of another dtype")
        spec = flat_spec(t, dtype)
        for a in group:
            var = self.variable(a)
            if (
                var is not None
                and a.nbytes == spec.shape[0] * dtype.itemsize
                and a.is_contiguous()
            ):
                return flattened(self.emitter, var, a, dtype)
        flat: Var | Constant = zeros(spec)
        for a in group:
            var = self.variable(a)
            if var is not None:
                flat = scattered(self.emitter, flat, var, a)
        return flat

    def _propagate(
        self,
        t: torch.Tensor,
        var: Var | Constant,
        changed: list[torch.Tensor],
        flat: Var | Constant,
    ) -> None:
        """After a write to `t`, let the changed tensors on its storage stand for the result."""
        flat = scattered(self.emitter, flat, var, t)
        for a in changed:
            self.define(a, shown(self.emitter, flat, a))
