"""Operations that write to their arguments, written down as ones that return new values.

Buffers may be filled piece by piece, and through views: what lies on the same memory stands for
other variables afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._programs.aten import Schema, functional_variant, schema_of
from .._programs.program import Operation
from .._programs.values import Constant, Var, zeros
from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten
from .linearity import known_linear, tested_linear
from .recording import OpaqueError, Recording
from .storage import common_dtype, covered, covers_storage, flat_spec, flattened, scattered, shown


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


class Writes:
    """Writes down what is done to the memory of variables and constants."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.emitter, self.constants = recording.emitter, recording.constants

    def write(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Run and write down an operation that writes to its arguments."""
        written = schema_of(func).targets(args, kwargs)
        aliases = [self.recording.aliases(t) for t in written]
        before = [[(a, *self._old(a)) for a in group] for group in aliases]
        contents = [self._content(t) for t in written]
        values = self._functional(func, args, kwargs, written, contents)
        self.recording.spare_constants(written)
        note = self.constants.seen(func, args, kwargs)
        out = func(*args, **kwargs)
        if any(var is not None for var in values):
            self.constants.overwritten(written, None)
        else:
            note(out)
        for t, var, group in zip(written, values, before, strict=True):
            changed = self._overlapping(t, group)
            flat = self._flat_content(t, [*(a for a, *_ in group), t]) if changed else None
            if var is not None:
                var.spec = TensorSpec.of(t)  # `unsqueeze_` and the like change the shape
            self.recording.define(t, var)
            if flat is None:
                continue
            if var is not None:
                self._propagate(t, var, changed, flat)
            elif isinstance(flat, Var):
                if self.recording.some(t):
                    self.partly_constant(t, changed)
                else:  # zero is linear
                    self._propagate(t, zeros(TensorSpec.of(t)), changed, flat)
        return out

    def constant_written(self, schema: Schema, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Note that a constant is overwritten."""
        targets = schema.targets(args, kwargs)
        for t in targets:
            self.recording.initialized(t)
        self.recording.spare_constants(targets)
        return targets

    # -- buffers that are used piece by piece, and may never be read as a whole again ------

    def partly_constant(self, t: torch.Tensor, others: list[torch.Tensor]) -> None:
        """After a constant was written to `t`, note what is left of tensors on its storage."""
        variables = [a for a in others if self.recording.derived(a)]
        if not variables or not self.recording.some(t):
            return  # zero is linear
        for a, here in zip(variables, covered(t, variables), strict=True):
            if bool(here.any()):
                self.recording.define(a, None, mixed=not bool(here.all()))

    def view_of_mixed(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Run an operation that shows a part of a tensor that is mixed."""
        out = func(*args, **kwargs)
        for t in leaves(out):
            self.recording.define(t, None, mixed=True)
        return out

    def overwritten(self, schema: Schema, args: Any, kwargs: Any) -> None:
        """Forget what was in tensors that are written to without being read."""
        unread = schema.into_out or schema.name in ("copy_", "zero_", "fill_")
        for t in schema.targets(args, kwargs) if unread else ():
            if self.recording.is_mixed(t):
                self.recording.define(t, None, uninitialized=True)

    def _old(self, a: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """Return a copy of a constant's content, and whether that is so at every point.

        None for what has none that matters.
        """
        if self.recording.derived(a) or self.recording.uninitialized(a):
            return None, True
        return a.clone(), self.constants.static(a)

    def _overlapping(
        self, t: torch.Tensor, group: list[tuple[torch.Tensor, torch.Tensor | None, bool]]
    ) -> list[torch.Tensor]:
        """Return the tensors that share memory with `t`, which was written to."""
        if not group:
            return []
        found = []
        places = covered(t, [a for a, *_ in group])
        for (a, before, static), here in zip(group, places, strict=True):
            old = before
            if bool(here.any()):
                found.append(a)
                if old is not None and here.dim() > old.dim():
                    old = (
                        torch.view_as_real(old.resolve_conj())
                        if old.is_complex()
                        else old[..., None]
                    )
                if not static:
                    self.constants.decided_by(a, before)
                if old is not None and bool((old != 0).logical_and(~here).any()):
                    raise OpaqueError("writes into a buffer that holds something else")
        return found

    # -- one operation that writes ---------------------------------------------------------

    def _content(self, t: torch.Tensor) -> Var | Constant:
        """Return what a tensor holds before it is written to."""
        var = self.recording.variable(t)
        if var is not None:
            return var
        if self.recording.uninitialized(t) or not self.recording.some(t, still=True):
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
        schema = schema_of(func)
        name, target = schema.name, written[0]
        if name in ("zero_", "fill_"):
            if name == "fill_" and self.recording.derived(args[1]):
                raise OpaqueError("fill_ with a number derived from the cotangent")
            return [None]
        if name == "copy_":
            source = args[1]
            if not self.recording.derived(source):
                return [None]
            return [self._shaped(self.recording.variable(source), target)]

        def held(x: Any) -> Var | Constant | None:
            pairs = zip(written, contents, strict=True)
            return next((content for t, content in pairs if x is t), None)

        if schema.into_out:
            read = [x for x in leaves((args, kwargs)) if all(x is not t for t in written)]
            if all(not self.recording.derived(x) for x in read):
                return [None] * len(written)
        variant = functional_variant(func)
        keywords = kwargs if variant is None else schema.without_out(kwargs)
        operation: Any = Functionalized(func) if variant is None else variant

        def is_variable(x: Any) -> bool:
            content = held(x)
            if content is None:
                return self.recording.derived(x)
            return isinstance(content, Var) or content.is_zero

        def replaced(x: Any) -> Any:
            content = held(x)
            return self.recording.argument(x) if content is None else content

        holds = [any(is_variable(x) for x in leaves(a)) for a in args]
        if variant is None or keywords or not known_linear(variant, holds):
            self.recording.judge(
                variant or func, holds, any(map(is_variable, leaves(keywords))), args
            )
            with torch.no_grad():
                linear = tested_linear(operation, args, keywords, is_variable)
            if linear is None or not all(linear):
                raise OpaqueError(f"{name} is not linear in the cotangent")
        outputs = [Var(self._natural(variant, t, args)) for t in written]
        arguments = tuple(map_leaves(replaced, list(args)))
        self.emitter.add(operation, arguments, outputs, **map_leaves(replaced, keywords))
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
            shape = spec.shape
            var = self.emitter.emit(
                aten.expand.default, (var, list(shape)), var.spec.shaped(*shape)
            )
        return self.emitter.cast(var, spec)

    def _flat_content(self, t: torch.Tensor, group: Sequence[torch.Tensor]) -> Var | Constant:
        """Return the whole storage under `t`, as it was before, as a flat value."""
        dtype = common_dtype([t, *group])
        if dtype is None:
            raise OpaqueError("writes through a view of another dtype")
        spec = flat_spec(t, dtype)
        for a in group:
            var = self.recording.variable(a)
            if var is not None and covers_storage(a):
                return flattened(self.emitter, var, a, dtype)
        flat: Var | Constant = zeros(spec)
        for a in group:
            var = self.recording.variable(a)
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
            self.recording.define(a, shown(self.emitter, flat, a))
