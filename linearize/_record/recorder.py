"""The recorder, which writes down what is done to variables.

A `Recorder` is a dispatch mode: it sees every ATen operation that runs under it. Operations
on variables become equations; operations on constants just run. Writes into tensors are
turned into operations that return new values, also through views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._capture.mesh_collectives import MeshCollective, OnMesh
from .._programs.aten import (
    CONSTANT,
    MASKS,
    READS_NUMBERS,
    STRIDED,
    UNINITIALIZED,
    VIEWS_BY_STRIDES,
    schema_of,
    wants_contiguous,
)
from .._programs.values import Var
from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._torch.modes import DispatchMode, lazy_bits_respected
from .._torch.names import OpOverload, aten
from .._torch.sharded import COMMUNICATING, WAITING, has_sharded, is_fake, waited
from ..errors import LinearizeError
from .linearity import known_linear, tested_linear
from .recording import OpaqueError, Recording, SparseError
from .storage import memory_order
from .writes import Writes


def _is_sparse(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout != torch.strided


def _is_dense(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.is_contiguous()


def _only_shape(kwargs: dict[str, Any]) -> bool:
    """Whether an operation moves its argument to the meta device, where no numbers are.

    PyTorch asks so for the shape of a product with a `ZeroTensor`, as forward mode makes them.
    """
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


class Recorder(DispatchMode):
    """Writes down what is done to variables, which a recording tells, and that receives it."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.emitter, self.constants = recording.emitter, recording.constants
        self.writes = Writes(recording)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if has_sharded(types):
            return NotImplemented  # it comes again, with the parts that are on this rank
        if is_fake(types):
            return func(*args, **(kwargs or {}))
        with lazy_bits_respected():
            if func.namespace in COMMUNICATING:
                return self._exchange(func, args)
            return self._see(func, args, kwargs or {})

    def _exchange(self, func: OpOverload, args: tuple[Any, ...]) -> torch.Tensor:
        """Write down that ranks communicate, and wait until they have."""
        name = schema_of(func).name
        given = args[0]
        if name in WAITING:
            with torch.no_grad():
                waited(given)
            return given  # type: ignore[no-any-return]
        out = waited(func(*args))
        var = self.recording.variable(given)
        if var is None:
            self.recording.define(out, None)
            self.constants.decided(f"{name} in {self.emitter.source}")
            return out
        spec = TensorSpec.of(out)
        done = OnMesh(MeshCollective(name, args, TensorSpec.of(given), spec), back=False)
        self.recording.define(out, self.emitter.emit(done, (var,), spec))
        return out

    def _see(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema = schema_of(func)
        if self.constants.scales:
            args, kwargs = self.constants.scales.marked(func, (args, kwargs))
        if schema.is_view and self.recording.is_mixed(args[0]):
            return self.writes.view_of_mixed(func, args, kwargs)
        if schema.writes:
            self.writes.overwritten(schema, args, kwargs)
        derived = any(self.recording.derived(x) for x in leaves((args, kwargs)))
        if not derived or func in CONSTANT or _only_shape(kwargs):
            note = self.constants.seen(func, args, kwargs)
            targets = self.writes.constant_written(schema, args, kwargs) if schema.writes else ()
            out = func(*args, **kwargs)
            note(out)
            for t in targets:
                self.writes.partly_constant(t, self.recording.aliases(t))
            empty = func in UNINITIALIZED or (
                schema.is_view and self.recording.uninitialized(args[0])
            )
            for t in leaves(out):
                if isinstance(t, torch.Tensor) and not self.recording.derived(t):
                    self.recording.define(t, None, uninitialized=empty)
            return out
        if func in READS_NUMBERS:
            raise OpaqueError(f"reads the numbers in its argument ({schema.name})")
        if func in MASKS:
            others = [
                x for x in args if isinstance(x, torch.Tensor) and not self.recording.derived(x)
            ]
            self.constants.masking(others)
        out = None
        try:
            if schema.writes:
                return self.writes.write(func, args, kwargs)
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
        holds = [any(self.recording.derived(x) for x in leaves(a)) for a in args]
        keyword = any(self.recording.derived(x) for x in leaves(kwargs))
        if not keyword and known_linear(func, self._without_zeros(func, args, holds)):
            return None
        self.recording.judge(func, holds, keyword, (args, kwargs))
        with torch.no_grad():
            linear = tested_linear(func, args, kwargs, self.recording.derived)
        if linear is None:
            raise OpaqueError(f"{schema_of(func).name} is not linear in the cotangent")
        return linear

    def _without_zeros(self, func: OpOverload, args: Any, holds: list[bool]) -> list[bool]:
        """Count constants that are zero as variables in sums: `0 + g` is linear."""
        name = schema_of(func).name
        if name in ("add", "sub") and len(args) == 2 and not all(holds):
            other = args[holds.index(False)]
            zero = (
                not self.recording.some(other) if isinstance(other, torch.Tensor) else other == 0
            )
            return [True, True] if zero else holds
        if name in ("cat", "stack"):
            parts = args[0]
            fine = all(self.recording.derived(x) or not self.recording.some(x) for x in parts)
            return [True] if fine else holds
        return holds

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
                    self.recording.define(t, None)
                    if depends:
                        # A comparison with the cotangent is kept as it is at a random one;
                        # whoever records must test that it does not matter elsewhere.
                        self.recording.frozen = f"{schema_of(func).name} in {self.emitter.source}"
                        self.constants.decided(self.recording.frozen)
                continue
            var = Var(TensorSpec.of(t))
            outputs.append(var)
            self.recording.define(t, var)
        if any(v is not None for v in outputs):
            operation, arguments = self._any_layout(func, args)
            keywords = map_leaves(self.recording.argument, dict(kwargs))
            self.emitter.add(operation, tuple(arguments), outputs, **keywords)

    def _any_layout(self, func: Callable[..., Any], args: Any) -> tuple[Any, list[Any]]:
        """Return an operation and its arguments that do not rely on strides seen now.

        At a later run a cotangent may be laid out otherwise.
        """
        arguments = map_leaves(self.recording.argument, list(args))
        if func in VIEWS_BY_STRIDES:
            return aten.reshape.default, arguments[:2]
        if func is aten._neg_view.default:
            return aten.neg.default, arguments  # a view is of no use, and cannot be batched
        if func is aten.view_as_real.default and isinstance(arguments[0], Var):
            # It refuses numbers that are stored conjugated, as a cotangent may be.
            (v,) = arguments
            return func, [self.emitter.emit(aten.resolve_conj.default, (v,), v.spec)]
        if func not in STRIDED or func is aten.view_as_real.default:
            if isinstance(func, OpOverload) and wants_contiguous(func):
                pairs = zip(arguments, args, strict=True)
                arguments = [self._contiguous(a) if _is_dense(t) else a for a, t in pairs]
            return func, arguments
        x = args[0]
        strided = func is not aten.view_as_complex.default
        order = memory_order(x) if func is aten.as_strided.default else None
        known = x.is_contiguous() or order is not None
        if strided and not (known and isinstance(args[-1], int)):
            raise OpaqueError("as_strided of something that is not contiguous")
        if strided and len(args) != 4 + (func is aten.as_strided_scatter.default):
            raise OpaqueError("as_strided without an offset")
        v = arguments[0]
        if isinstance(v, Var):
            if order and not x.is_contiguous():
                spec = v.spec.shaped(*(x.shape[d] for d in order))
                v = self.emitter.emit(aten.permute.default, (v, order), spec)
            arguments[0] = self.emitter.dense(v)
            if strided:
                arguments[-1] -= x.storage_offset()
        return func, arguments

    def _contiguous(self, a: Any) -> Any:
        if not isinstance(a, Var):
            return a
        return self.emitter.emit(aten.contiguous.default, (a,), a.spec)
