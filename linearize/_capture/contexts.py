"""What is seen of the contexts of custom Functions while f runs.

PyTorch drops some of it after `forward`, and a context does not tell all of the rest. The
records are keyed weakly by context, which is the graph's node, and so go with the graph.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._programs.residuals import Residual
from .._spaces.nested import leaves
from .._spaces.space import TensorSpec
from .._text.labels import Line
from .._torch.contexts import ContextWatcher
from .._torch.graphs import forward_class, has_outputs, input_metadata, library_name
from .._torch.ranks import collective_kind, group_of, members
from .._torch.sharded import WAITING, groups_of, is_sharded, mesh_of, own_function
from ..errors import UnsupportedError
from .state import Stamp, stamps


@dataclasses.dataclass(slots=True)
class ContextRecord:
    """What was seen of one context while `forward` ran."""

    inputs: tuple[TensorSpec | None, ...] | None = None
    #: The arguments that are no tensors, of collectives only.
    settings: tuple[Any, ...] | None = None
    versions: Sequence[Stamp] = ()
    #: Tensors among the attributes, with their versions when `apply` had returned.
    attributes: Sequence[Stamp] = ()
    saved_for_forward: tuple[Residual | None, ...] | None = None
    #: What was given to `save_for_forward`, and to `mark_dirty`.
    given: tuple[weakref.ref[torch.Tensor] | None, ...] = ()
    dirty: tuple[weakref.ref[torch.Tensor], ...] = ()
    materialize: bool = True
    line: Line | None = None


class ContextRecords:
    """Records of the contexts made during one forward run, keyed weakly by context.

    Attributes
    ----------
    locate
        Tells the line of f that is being executed; None if nobody wants to know.
    collectives
        The contexts of collectives, in order; these are kept, as other ranks wait for them.
    meshes
        The process groups of the meshes on which there are DTensors.
    pending
        Contexts whose `apply` had not returned when they were looked at last.
    """

    def __init__(self) -> None:
        self.locate: Callable[[], Line | None] | None = None
        self.pending: list[weakref.ref[Any]] = []
        self._records: weakref.WeakKeyDictionary[Any, ContextRecord]
        self._records = weakref.WeakKeyDictionary()
        self.collectives: list[Any] = []
        self.meshes: dict[Any, None] = {}
        self._conversions: list[weakref.ref[Any]] = []

    def watching(self) -> ContextWatcher:
        """Return the context manager inside which contexts are recorded."""
        told: dict[str, Callable[..., None]] = {
            "save_for_forward": self._saved,
            "set_materialize_grads": self._materialize,
            "mark_dirty": self._dirtied,
        }
        return ContextWatcher(self._created, told)

    def get(self, ctx: Any) -> ContextRecord:
        """Return the record of `ctx`, an empty one if none was made."""
        return self._records.get(ctx) or ContextRecord()

    def communicating(self) -> list[Any]:
        """Return the contexts of collectives that products have to run, in order."""
        return [
            ctx for ctx in self.collectives if any(ctx.needs_input_grad) and not is_identity(ctx)
        ]

    def communicates(self) -> bool:
        """Whether products have to communicate."""
        return bool(self.meshes or self.communicating())

    def note_conversions(self) -> None:
        """Take note of the meshes of DTensors that f made of local tensors, or the reverse."""
        found = [ctx for ctx in (ref() for ref in self._conversions) if ctx is not None]
        for ctx in found:
            if any(ctx.needs_input_grad):
                self.note_mesh(mesh_of(ctx))
        self._conversions = []

    def note_mesh(self, mesh: Any) -> None:
        """Take note of a mesh.

        Raises
        ------
        UnsupportedError
            If no group has its ranks: inner products are sums over them.
        """
        if mesh.ndim > 1 and mesh.size() != len(members(group_of(None))):
            raise UnsupportedError(
                f"a DTensor on {mesh}: a mesh of several dimensions must have all ranks; put it "
                "on one of its dimensions, mesh[name]"
            )
        self.meshes |= dict.fromkeys(groups_of(mesh))

    def __len__(self) -> int:
        return len(self._records)

    def settle(self) -> None:
        """Note the versions of what contexts refer to, once their `apply` has returned.

        f may change it in place afterwards, an output or a view of one for instance.
        """
        contexts = [(ref, ref()) for ref in self.pending]
        self.pending = [ref for ref, ctx in contexts if ctx is not None and not has_outputs(ctx)]
        for _, ctx in contexts:
            if ctx is not None and has_outputs(ctx):
                self._records[ctx].attributes = stamps(map(weakref.ref, attributes(ctx)))

    def _created(self, ctx: Any, arguments: tuple[Any, ...] | None) -> None:
        cls = forward_class(ctx)
        if own_function(cls):
            self._conversions.append(weakref.ref(ctx))
            return
        if any(map(is_sharded, arguments or ())):
            raise UnsupportedError(
                f"{custom_name(cls)}: a custom Function was called inside f with a DTensor, and "
                "its methods would have to be told how gradients lie on the mesh; call it with "
                "to_local(), and make a DTensor of what it returns (DTensor.from_local)"
            )
        if self.pending:
            self.settle()
        self.pending.append(weakref.ref(ctx))
        record = self._records[ctx] = ContextRecord()
        if self.locate is not None:
            record.line = self.locate()
        if is_collective(ctx):
            self.collectives.append(ctx)
            record.settings = tuple(
                None if isinstance(a, torch.Tensor) else a for a in arguments or ()
            )
        if arguments is not None:
            record.inputs = tuple(
                TensorSpec.of(a) if isinstance(a, torch.Tensor) else None for a in arguments
            )
            record.versions = tuple(
                (weakref.ref(a), a._version)
                for a in arguments
                if isinstance(a, torch.Tensor) and not a.is_inference()
            )

    def _saved(self, ctx: Any, *tensors: torch.Tensor | None) -> None:
        # Aliases without history: a saved output would otherwise hold its own node alive.
        source = f"{custom_name(forward_class(ctx))} (save_for_forward)"
        record = self._records.setdefault(ctx, ContextRecord())
        record.saved_for_forward = tuple(
            None if t is None else Residual(t.detach(), source) for t in tensors
        )
        record.given = tuple(None if t is None else weakref.ref(t) for t in tensors)
        _expect_steps(record)

    def _dirtied(self, ctx: Any, *tensors: torch.Tensor) -> None:
        record = self._records.setdefault(ctx, ContextRecord())
        record.dirty = tuple(map(weakref.ref, tensors))
        _expect_steps(record)

    def _materialize(self, ctx: Any, value: bool) -> None:
        if not own_function(forward_class(ctx)):
            self._records.setdefault(ctx, ContextRecord()).materialize = value


def is_collective(ctx: Any) -> bool:
    """Whether a context is that of a collective, or of what stands beside one."""
    return bool(collective_kind(forward_class(ctx)))


def is_identity(ctx: Any) -> bool:
    """Whether a context is that of a Function which only waits."""
    return collective_kind(forward_class(ctx)) in WAITING


def _expect_steps(record: ContextRecord) -> None:
    """Let for the step that PyTorch adds to the version of what `forward` marked as changed."""
    marked = [t for t in (ref() for ref in record.dirty) if t is not None]
    for r, ref in zip(record.saved_for_forward or (), record.given, strict=True):
        t = None if ref is None else ref()
        if r is not None and r.version is not None and any(t is m for m in marked):
            r.version += 1


def fitted(grad: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Do what the autograd engine does to a gradient before it hands it on."""
    if grad.shape != spec.shape:
        grad = grad.sum_to_size(spec.shape)
    if grad.is_complex() and not spec.dtype.is_complex:
        grad = torch.view_as_real(grad.resolve_conj()).select(-1, 0)
    if grad.dtype != spec.dtype or grad.device != spec.device:
        grad = grad.to(device=spec.device, dtype=spec.dtype)
    return grad


def input_specs(ctx: Any) -> tuple[TensorSpec, ...]:
    """Return what is known of the arguments of `forward` that required grad, in order."""
    edges = [(node, nr) for node, nr in ctx.next_functions if node is not None]
    return tuple([TensorSpec.received(input_metadata(node)[nr]) for node, nr in edges])


def output_specs(ctx: Any) -> tuple[TensorSpec, ...]:
    """Return what is known of the results of `forward`."""
    return tuple(map(TensorSpec.received, input_metadata(ctx)))


def attributes(ctx: Any) -> list[torch.Tensor]:
    """Return the tensors that a context refers to by its attributes."""
    found: list[torch.Tensor] = []
    for x in tuple(vars(ctx).values()):
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple, dict)):
            found += [t for t in leaves(x) if isinstance(t, torch.Tensor)]
    return found


def custom_name(cls: Any) -> str:
    """Return the name of a custom Function, or of the operator that it was made for."""
    return library_name(cls) or str(cls.__qualname__).replace("<locals>.", "")
