"""Calling the `jvp` and `backward` of custom Functions directly.

`y.grad_fn` of a custom `torch.autograd.Function` is the context `ctx` that its `forward`
saw. A `CustomNode` calls the user's methods with that context, with the arguments that
PyTorch itself would pass (https://docs.pytorch.org/docs/stable/notes/extending.html), and
never calls `forward`.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch

from .._programs.residuals import Residual, first_freed
from .._spaces.space import TensorSpec
from .._torch.graphs import (
    forward_class,
    input_metadata,
    materialized_arguments,
    packed_by_hooks,
)
from .._torch.modes import without_inference_mode
from .._torch.names import pytree
from ..errors import FunctionContractError, StalenessError
from .contexts import ContextRecord, attributes, function_name
from .methods import gives_backward, gives_jvp
from .registered import registered_jvp


class CustomNode:
    """A context of a custom Function, callable in both directions.

    Inputs are the arguments of `forward` that required grad, in order; outputs are all that
    `forward` returned. Calls are serialised per node, as PyTorch's engine does: user code
    may keep things on its context.
    """

    __slots__ = (
        "__weakref__",
        "_attributes",
        "_count",
        "_fixed",
        "_lock",
        "_others",
        "_owners",
        "_packed",
        "_pinned",
        "_places",
        "_record",
        "_saved",
        "_unusable",
        "cls",
        "ctx",
        "inputs",
        "name",
        "outputs",
        "positions",
    )

    def __init__(self, ctx: Any, record: ContextRecord, owners: Sequence[Any] = ()) -> None:
        self.ctx = ctx
        self._owners = tuple(owners)
        self.cls = forward_class(ctx)
        self.name = function_name(self.cls)
        self._record = record
        self._lock = threading.RLock()
        needs: Sequence[bool] = self.ctx.needs_input_grad
        self._count = len(needs)
        self.positions = tuple(i for i, need in enumerate(needs) if need)
        #: Arguments that are not tensors.
        self._others = tuple(i for i, spec in enumerate(record.inputs or ()) if spec is None)
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        self.inputs = tuple(TensorSpec.received(input_metadata(node)[nr]) for node, nr in edges)
        self.outputs: tuple[TensorSpec | None, ...]
        self.outputs = tuple(map(TensorSpec.received, input_metadata(ctx)))
        self._saved: list[Residual] = []
        self._unusable = ""
        #: What a hook unpacked (a checkpoint computes it again each time), kept once it was.
        self._pinned: tuple[torch.Tensor | None, ...] | None = None
        self._packed = packed_by_hooks(ctx)
        if not self._packed:
            try:
                source = f"{self.name} (saved tensors)"
                kept = [t for t in ctx.saved_tensors if t is not None]
                self._saved = [Residual(t.detach(), source) for t in kept]
            except RuntimeError as error:  # the value is right all the same
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._unusable = f"a tensor that it saved was changed in place inside f: {error}"
        for_forward = [r for r in record.saved_for_forward or () if r is not None]
        #: What was saved, which stays the same; attributes need not.
        self._fixed = (*self._saved, *for_forward)
        #: For each argument of the jvp the place among the tangents, or -1, and what it is like.
        self._places: list[tuple[int, TensorSpec | None]] | None = None
        self._attributes: list[Residual] = []
        self._stamp()
        self._stamp_arguments()

    def know_outputs(self, used: Collection[int]) -> None:
        """Learn what stands for each output without a gradient; `used` are those that have one."""
        if len(self.outputs) > 1:
            arguments = materialized_arguments(self.ctx, min(used))
            self.outputs = tuple(
                own if i in used else (None if got is None else TensorSpec.of(got))
                for i, (got, own) in enumerate(zip(arguments, self.outputs, strict=True))
            )

    @property
    def arguments(self) -> list[tuple[int, TensorSpec]]:
        """The arguments of `forward` that can be differentiated, by their positions.

        Those that required grad, where no more was seen.
        """
        seen = self._record.inputs
        if seen is None:
            return list(zip(self.positions, self.inputs, strict=True))
        return [(i, s) for i, s in enumerate(seen) if s is not None and s.differentiable]

    @property
    def registered_jvp(self) -> Callable[..., Any] | None:
        """The jvp registered for a `torch.library` operator."""
        return registered_jvp(self.cls)

    @property
    def has_jvp(self) -> bool:
        """Whether the author gave a jvp."""
        return gives_jvp(self.cls) or self.registered_jvp is not None

    @property
    def has_backward(self) -> bool:
        """Whether the author gave a backward (or a `vjp` staticmethod, its other name)."""
        return gives_backward(self.cls)

    @property
    def takes_batches(self) -> bool:
        """Whether the author says that its methods can be called inside `torch.vmap`."""
        return bool(getattr(self.cls, "generate_vmap_rule", False))

    def signature(self) -> Hashable:
        """Return what of the node, besides its edges, decides how it is called."""
        return (
            self.cls,
            self.has_jvp,
            self.has_backward,
            self.positions,
            self._record.inputs,
            self._record.materialize,
        )

    def backward(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Call the user's `backward` once.

        Parameters
        ----------
        grads
            One cotangent per output; None where undefined.

        Returns
        -------
        list
            One cotangent per input; None where undefined.
        """
        result = self._guarded(self._call_backward, grads)
        if not isinstance(result, tuple):
            result = tuple(result) if isinstance(result, list) else (result,)
        count = self._count
        if len(result) > count and all(r is None for r in result[count:]):
            result = result[:count]
        if len(result) != count:
            raise FunctionContractError(
                f"{self.name}.backward returned {len(result)} gradients, expected {count} (one "
                "per argument of forward)"
            )
        for i in self._others:
            if i < count and result[i] is not None:
                raise FunctionContractError(
                    f"{self.name}.backward returned a gradient for argument {i}, which is not a "
                    "tensor: expected None"
                )
        found = []
        for i, spec in zip(self.positions, self.inputs, strict=True):
            r = result[i]
            found.append(None if r is None else self._fit(r, spec, i))
        return found

    def jvp(
        self, tangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """Call the user's `jvp` once.

        Parameters
        ----------
        tangents
            One tangent per input; None where there is none.
        wanted
            Which outputs have a tangent that is used.

        Returns
        -------
        list
            One tangent per output; None for outputs that are not wanted.
        """
        result = self._guarded(self._call_jvp, tangents)
        if not isinstance(result, tuple):
            result = tuple(result) if isinstance(result, list) else (result,)
        if len(result) != len(self.outputs):
            raise FunctionContractError(
                f"{self.name}.jvp returned {len(result)} tangents, expected {len(self.outputs)} "
                "(one per output of forward)"
            )
        out: list[torch.Tensor | None] = []
        for i, (t, spec) in enumerate(zip(result, self.outputs, strict=True)):
            if not wanted[i]:
                out.append(None)
            elif t is not None:
                out.append(self._exact(t, spec, i))
            elif self._some_missing(tangents):
                out.append(None)
            else:
                raise FunctionContractError(
                    f"{self.name}.jvp returned None as the tangent of output {i}, which is "
                    f"differentiable: expected a tensor {spec}"
                )
        return out

    def kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that the context keeps."""
        for r in (*self._fixed, *self._attributes):
            yield r.tensor

    def _call_backward(self, grads: Sequence[torch.Tensor | None]) -> Any:
        # Copies, because user code was seen to overwrite what it is handed.
        arguments = [
            self._missing(spec) if g is None else g.clone()
            for g, spec in zip(grads, self.outputs, strict=False)
        ]
        return self.ctx.apply(*arguments)

    def _call_jvp(self, tangents: Sequence[torch.Tensor | None]) -> Any:
        fn = self.registered_jvp
        arguments: list[torch.Tensor | None] = []
        for place, spec in self._places or self._arguments_of_jvp():
            t = None if place < 0 else tangents[place]
            arguments.append(self._missing(spec, fn) if t is None else t.clone())
        saved = self._record.saved_for_forward
        if saved is not None:
            self.ctx.saved_for_forward = tuple(None if r is None else r.tensor for r in saved)
        try:
            # Without grad mode, which PyTorch's forward mode leaves on: there the saved tensors
            # do not require grad, here they do, and NumPy does not take what does.
            if fn is None:
                return self.cls.jvp(self.ctx, *arguments)
            return fn(self.ctx, *self._operator_arguments(arguments))
        except TypeError as error:
            if fn is None and not _takes(self.cls.jvp, 1 + len(arguments)):
                raise FunctionContractError(
                    f"{self.name}.jvp must take ctx and a tangent for each of the "
                    f"{len(arguments)} arguments of forward, None for what is no tensor: {error}"
                ) from error
            raise
        finally:
            if saved is not None:
                self.ctx.saved_for_forward = None

    def _operator_arguments(self, arguments: list[torch.Tensor | None]) -> Sequence[Any]:
        """Undo what `torch.library` does to an operator's arguments."""
        lists = getattr(self.ctx, "_pt_metadata", None)
        if lists is None:
            return arguments[:-1]
        return pytree.tree_unflatten(arguments[:-1], lists.input_spec)[:-1]  # type: ignore[no-any-return]

    def _arguments_of_jvp(self) -> list[tuple[int, TensorSpec | None]]:
        numbers = {position: i for i, position in enumerate(self.positions)}
        seen = self._record.inputs or (None,) * self._count
        places: list[tuple[int, TensorSpec | None]] = []
        for i, spec in enumerate(seen):
            place = numbers.get(i, -1)
            if place >= 0:
                spec = self.inputs[place]
            elif spec is not None and not spec.differentiable:
                spec = None
            places.append((place, spec))
        self._places = places
        return places

    def _some_missing(self, tangents: Sequence[torch.Tensor | None]) -> bool:
        """Whether the jvp was told of an argument that it has no tangent.

        PyTorch takes None for zero; a result can only be meant so where that is the case.
        """
        if self._record.materialize or self.registered_jvp is not None:
            return False
        places, seen = self._places or (), self._record.inputs or ()
        return any(
            spec is not None and spec.differentiable and (place < 0 or tangents[place] is None)
            for (place, _), spec in zip(places, seen, strict=False)
        )

    def _missing(self, spec: TensorSpec | None, registered: Any = None) -> torch.Tensor | None:
        """Return what stands for a direction that is not there.

        A registered jvp always gets zeros: whether a context materializes is no affair of its
        operator's, and differs from one PyTorch to the next.
        """
        whole = self._record.materialize or registered is not None
        return spec.zeros() if spec is not None and whole else None

    def _guarded(
        self,
        call: Callable[[Sequence[torch.Tensor | None]], Any],
        given: Sequence[torch.Tensor | None],
    ) -> Any:
        """Call user code: one call at a time, with checks before and after."""
        if torch.is_inference_mode_enabled():
            with without_inference_mode():
                return self._guarded(call, given)
        with self._lock:
            self._check()
            owned = self._attributes
            versions = [None if r.version is None else r.counter._version for r in owned]
            if self._packed:
                self._pin()
            try:
                return call(given)
            finally:
                self._settle(owned, versions)

    def _check(self) -> None:
        """Raise if something that the methods read was changed."""
        if self._unusable:
            raise StalenessError(f"{self.name} cannot be called: {self._unusable}")
        for kept in (self._fixed, self._attributes):
            if not kept:
                continue
            freed = first_freed(kept)
            if freed is not None:
                freed.check_memory()
            for r in kept:
                changed = r.version is not None and r.counter._version != r.version
                if changed and not _written_by_methods(r.tensor):
                    r.check()

    def _settle(self, owned: list[Residual], versions: list[int | None]) -> None:
        """After a call: what a method changed on its own context is its own affair."""
        for kept in (self._fixed, owned):
            freed = first_freed(kept) if kept else None
            if freed is not None:
                try:
                    freed.check_memory()
                except StalenessError as error:
                    self._unusable = str(error)
        if owned:
            for r, version in zip(owned, versions, strict=True):
                if version is not None and r.counter._version != version:
                    _note_written(r.tensor)
        self._stamp()
        if self._pinned is not None:
            self.ctx.saved_for_forward = None

    def unpack(self) -> None:
        """Have hooks unpack what was saved, once; a checkpoint computes it again each time."""
        if self._packed and self._pinned is None:
            self._pinned = tuple(None if t is None else t.detach() for t in self.ctx.saved_tensors)

    def _pin(self) -> None:
        """Hand out what hooks unpacked before, instead of having it unpacked again."""
        self.unpack()
        if self._pinned is not None:
            self.ctx.saved_for_forward = self._pinned

    def _stamp(self) -> None:
        if not vars(self.ctx):
            self._attributes = []
            return
        found = attributes(self.ctx)
        known = self._attributes
        if len(found) == len(known):
            for r, t in zip(known, found, strict=True):
                if r.tensor is not t or (r.version is not None and t._version != r.version):
                    break
            else:
                return
        source = f"{self.name} (an attribute of ctx)"
        # The tensors themselves: a context holds them anyway.
        self._attributes = [Residual(t, source) for t in found]

    def _stamp_arguments(self) -> None:
        """Let attributes count from when `forward` returned; arguments from when it was called.

        f may have changed them between that and its own end. An argument that `forward`
        itself changed (`mark_dirty`) has this context as its history.
        """
        record = self._record
        called = {id(ref()): version for ref, version in record.versions if ref() is not None}
        ended = {id(ref()): version for ref, version in record.attributes if ref() is not None}
        for r in self._attributes:
            key = id(r.tensor)
            if key in called and r.tensor.grad_fn is not self.ctx:
                r.version = called[key]
            elif key in ended:
                r.version = ended[key]

    def _fit(self, result: Any, spec: TensorSpec, i: int) -> torch.Tensor:
        """Sum and cast a gradient as the engine does."""
        if not isinstance(result, torch.Tensor):
            raise FunctionContractError(
                f"{self.name}.backward returned {_kind(result)} as gradient {i}, expected a "
                f"tensor {spec} or None"
            )
        # A copy, because user code may write to the same buffer at the next call.
        sparse = result.layout is not torch.strided
        t: torch.Tensor = result.to_dense() if sparse else result.clone()
        if spec.matches(t):
            return t
        if t.device != spec.device and t.dim() > 0:
            raise FunctionContractError(
                f"{self.name}.backward returned gradient {i} on {t.device}, expected {spec.device}"
            )
        if t.shape != spec.shape:
            try:
                t = t.sum_to_size(spec.shape)
            except RuntimeError:
                raise FunctionContractError(
                    f"{self.name}.backward returned gradient {i} of shape {tuple(t.shape)}, "
                    f"expected {spec.shape}"
                ) from None
        if t.is_complex() and not spec.dtype.is_complex:
            t = t.real
        return t.to(device=spec.device, dtype=spec.dtype)

    def _exact(self, t: Any, spec: TensorSpec | None, i: int) -> torch.Tensor:
        if not isinstance(t, torch.Tensor) or t.layout is not torch.strided:
            raise FunctionContractError(
                f"{self.name}.jvp returned {_kind(t)} as the tangent of output {i}, "
                f"expected a tensor {spec}"
            )
        if spec is not None and not spec.matches(t):
            raise FunctionContractError(
                f"{self.name}.jvp returned {TensorSpec.of(t)} as the tangent of output {i}, "
                f"expected {spec}"
            )
        return t.clone()


#: Tensors that methods of custom Functions were seen to write to: workspaces, which several
#: contexts may share.
_WORKSPACES: dict[int, weakref.ref[torch.Tensor]] = {}


def _note_written(t: torch.Tensor) -> None:
    key = id(t)
    _WORKSPACES[key] = weakref.ref(t, lambda _: _WORKSPACES.pop(key, None))


def _written_by_methods(t: torch.Tensor) -> bool:
    ref = _WORKSPACES.get(id(t))
    return ref is not None and ref() is t


def _kind(t: Any) -> str:
    if isinstance(t, torch.Tensor) and t.layout != torch.strided:
        return f"a tensor of layout {t.layout}"
    return f"a {type(t).__name__}"


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True
