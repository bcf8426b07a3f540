"""What does not show all that it does: it is watched while it is called.

Some graph nodes keep things that Python cannot see, and nobody can see what a method of a custom
Function depends on. But what they do can be watched, operation by operation. Where that is the
same as what was recorded at another point, with the same static arguments, the same constants in
the same places, shapes and shared memory, the recording holds here too, with the constants that
were met on the way. A recording depends on nothing else: where numbers decided something it is
`fixed`, and not shared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from .._capture.custom import CustomNode
from .._capture.custom_operations import direction_of
from .._capture.graph import Graph
from .._programs.aten import schema_of
from .._programs.origins import Saved
from .._programs.residuals import Residual
from .._spaces.compare import exact
from .._spaces.nested import leaves
from .._spaces.space import TensorSpec
from .._torch.graphs import input_metadata
from .._torch.modes import DispatchMode, lazy_bits_respected
from .._torch.names import OpOverload, aten, has_memory, storage_token
from ..errors import LinearizeError
from .by_tensor import ByTensor
from .calls import called
from .node_programs import placeholder_like

#: How the names begin under which stands what was met in a call.
MET = "met in"
#: What lies in memory by its strides, as long as its layout says so.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: What a call did, operation by operation.
Trace: TypeAlias = tuple[Any, ...]
#: What calls met, by the places of the origins.
Met: TypeAlias = dict[Hashable, Residual]
#: What watched a call, and what was done; None if that cannot be described.
Done: TypeAlias = "tuple[Witness, Unseen | None]"


class _BlindError(LinearizeError):
    """Raised at a tensor of which more matters than its strides and the memory that it is in."""


@dataclasses.dataclass(frozen=True)
class Unseen:
    """A call that was recorded, of something that does not show what it does.

    Attributes
    ----------
    place
        The node's place in the graph.
    method
        Of the custom Function that it is; empty for a node of PyTorch's.
    how
        For PyTorch's: which gradients came in, and how these lay in memory. For a method: which
        of its arguments, or results, there are.
    trace
        What it did.
    asked
        Which of the tensors that were met the recording reads.
    facts
        What it found in some of them: their content, or that there is a number that is not zero.
    """

    place: int
    method: str
    how: tuple[Any, ...]
    trace: Trace = dataclasses.field(hash=False)
    asked: frozenset[int] = dataclasses.field(hash=False)
    facts: tuple[Any, ...] = dataclasses.field(hash=False)


class Witness(DispatchMode):
    """Writes down the operations that run inside, and what tensors they met.

    Parameters
    ----------
    place, method, how
        Of the call, see `Unseen`.
    asked
        Which of the tensors are wanted, by their numbers.

    Attributes
    ----------
    asked
        The same.
    kept
        These tensors, by their numbers, as they were when they were met.
    blind
        What it met that it cannot describe; empty if there was nothing.
    of_method
        Whether the call is that of a method of a custom Function.
    """

    def __init__(self, place: int, method: str, how: tuple[Any, ...], asked: Collection[int] = ()):
        super().__init__()
        self.kept: dict[int, torch.Tensor] = {}
        self.blind = ""
        self.asked = frozenset(asked)
        self._call = place, method, how
        self.of_method = bool(method)
        self._name = f"{MET} {method}{how}"
        self._origins: dict[int, Saved] = {}
        self._facts: dict[tuple[int, bool], Hashable] = {}
        #: What is being overwritten.
        self._written: list[torch.Tensor] = []
        self._trace: list[Any] = []
        self._numbers: ByTensor[int] = ByTensor()
        self._count = 0
        self._new: weakref.ref[torch.Tensor] | None = None
        #: A token that nothing else has as long as it is held, and the place, of each storage.
        self._storages: dict[int, tuple[Any, int, int]] = {}

    def begin(self, given: Iterable[torch.Tensor | None]) -> None:
        """Take in the tensors with which the call begins."""
        for t in given:
            if t is not None:
                self._describe("begun", t)

    def origin(self, t: torch.Tensor) -> Saved | None:
        """Return how a constant is found that was met, None if it was not met."""
        if t not in self._numbers:
            return None
        number = self._numbers[t]
        return self._origins.setdefault(number, Saved(self._call[0], self._name, number))

    def relies(
        self, t: torch.Tensor, before: torch.Tensor | None = None, *, some: bool = False
    ) -> bool:
        """Note that the numbers in a constant decided something, if it was met.

        `before` and `some` as of `Constants.decided_by`.
        """
        if t not in self._numbers or (before is None and self._numbers.sharing(self._written)):
            return False
        number = self._numbers[t]
        self._facts[number, some] = _content(t if before is None else before, some=some)
        self.origin(t)
        return True

    def holds(self, call: Unseen) -> bool:
        """Whether what decided something then does so here."""
        for key, content in call.facts:
            if key not in self._facts:  # once, though several calls are held against it
                number, some = key
                self._facts[key] = _content(self.kept[number], some=some)
            if self._facts[key] != content:
                return False
        return True

    def ended(self, results: Sequence[torch.Tensor | None]) -> Unseen | None:
        """Return what was done, given what was returned; None if that cannot be described."""
        self._describe("returned", tuple(results))
        if self.blind:
            return None
        facts = tuple(self._facts.items())
        return Unseen(*self._call, tuple(self._trace), frozenset(self._origins), facts)

    def met(self, call: Unseen, source: str) -> Met:
        """Return what a call asks for, by the places of its origins, as it is in the end."""
        return {
            Saved(call.place, self._name, n).place: Residual(self.kept[n], source).settle()
            for n in call.asked
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default and self._is_new(args[0]):
            return self._taken(args[0])
        self._describe(func, args, kwargs)
        writes = schema_of(func).writes and not self.blind
        self._written = schema_of(func).targets(args, kwargs) if writes else []
        if self._written:
            self._before_writing()
        with lazy_bits_respected():
            out = func(*args, **kwargs)
        if self._written:  # it is met anew
            for t in self._numbers.sharing(self._written):
                self._numbers.pop(t)
            self._written = []
        self._describe("gives", out)
        made = isinstance(out, torch.Tensor) and not any(
            isinstance(x, torch.Tensor) for x in leaves((args, kwargs))
        )
        self._new = weakref.ref(out) if made else None
        return out

    def _is_new(self, t: torch.Tensor) -> bool:
        """Whether nothing was done since an operation made a tensor of nothing."""
        return self._new is not None and self._new() is t and t in self._numbers

    def _taken(self, t: torch.Tensor) -> torch.Tensor:
        """Return a tensor that was just made, detached, as the same one.

        PyTorch's functions that make tensors do so if somebody holds it, as is done here if it is
        asked for.
        """
        with lazy_bits_respected():
            out: torch.Tensor = aten.detach.default(t)
        number = self._numbers[out] = self._numbers[t]
        if number in self.kept:
            self.kept[number] = out
        return out

    def _describe(self, done: Any, *what: Any) -> None:
        """Write down what is done with what, as long as all of it can be described."""
        if not self.blind:
            try:
                self._trace.append((done, *[self._described(x) for x in what]))
            except _BlindError as error:
                self.blind = str(error)

    def _described(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return "tensor", self._met(x)
        if isinstance(x, (list, tuple)):
            return tuple([self._described(y) for y in x])
        if isinstance(x, dict):
            return tuple([(k, self._described(y)) for k, y in x.items()])
        return type(x), exact(x)

    def _met(self, t: torch.Tensor) -> int:
        return self._numbers[t] if t in self._numbers else self._define(t)

    def _define(self, t: torch.Tensor) -> int:
        if t.layout != torch.strided or t.is_nested or type(t) not in _PLAIN:
            kind = "a nested tensor" if t.is_nested else str(t.layout)
            kind = kind if type(t) in _PLAIN else type(t).__name__
            raise _BlindError(f"it computes with a tensor of another kind ({kind})")
        number, self._count = self._count, self._count + 1
        self._numbers[t] = number
        self._trace.append((number, _layout(t), self._lies(t)))
        if number in self.asked:
            self.kept[number] = t
        return number

    def _lies(self, t: torch.Tensor) -> Any:
        """Return which storage a tensor lies on, and how far from the first tensor there."""
        if not has_memory(t):
            return None
        key, token = storage_token(t)
        begin = int(t.storage_offset()) * t.element_size()
        _, place, first = self._storages.setdefault(key, (token, len(self._storages), begin))
        return place, begin - first

    def _before_writing(self) -> None:
        """Save what is to be overwritten."""
        for t in self._written:  # of memory that is partly written more matters than how it lies
            whole = t.untyped_storage().nbytes() if has_memory(t) else 0
            self._trace.append(("written", t.storage_offset(), whole))
        for t in self._numbers.sharing(self._written):
            number = self._numbers[t]
            if number in self.kept:
                self.kept[number] = t.detach().clone()


def _content(t: torch.Tensor, *, some: bool) -> Hashable:
    """Return what stands for the numbers in a tensor, or for some of them not being zero."""
    if some:
        return bool(t.any())
    plain = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return hashlib.sha1(plain.flatten().view(torch.uint8).numpy().tobytes()).digest()


def _layout(t: torch.Tensor) -> Any:
    return t.shape, t.stride(), t.dtype, t.device, t.is_conj(), t.is_neg(), has_memory(t)


def attend(graph: Graph, call: Unseen, done: dict[Hashable, Done]) -> tuple[Met, str]:
    """Call what was called when a graph of the same structure was recorded, `walking`.

    Parameters
    ----------
    graph
        The graph.
    call
        What was recorded.
    done
        What was called of this graph already, and what it did; receives what is called now.

    Returns
    -------
    met, reason
        The tensors that are asked for, and what was done otherwise; empty if nothing was.
    """
    name, what = label(graph, call), (call.place, call.method, call.how)
    for again in (False, True):
        if what not in done or again:
            asked = call.asked.union(done[what][0].asked if again else ())
            witness = Witness(*what, asked)
            try:
                done[what] = witness, witness.ended(_called(graph, call, witness))
            except (LinearizeError, RuntimeError, TypeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                return {}, f"{name}: {str(error).partition(chr(10))[0]}"
        witness, now = done[what]
        if now is None:
            return {}, f"{name}: {witness.blind}"
        if now.trace != call.trace:
            return {}, f"{name}: {_difference(now.trace, call.trace)}"
        if call.asked <= witness.asked:
            break
    if not witness.holds(call):
        return {}, f"{name}: numbers decide what it does"
    return witness.met(call, name), ""


def label(graph: Graph, call: Unseen) -> str:
    """Return what a call is called in messages."""
    name = graph.label(graph.order[call.place])
    return f"{name}, {call.method}" if call.method else name


def _called(graph: Graph, call: Unseen, witness: Witness) -> Sequence[torch.Tensor | None]:
    node = graph.order[call.place]
    generator = torch.Generator().manual_seed(3)
    if call.method:
        custom = graph.custom[node]
        assert isinstance(custom, CustomNode)
        if call.method == "backward":
            custom.know_outputs([i for i, here in enumerate(call.how) if here])
        custom.unpack()
        fn, ins, _ = direction_of(custom, call.method, call.how)
        arguments = [spec.random(generator) for spec in ins]
        witness.begin(arguments)
        with witness:
            return fn(*arguments)
    layouts = dict(call.how)
    grads = [
        placeholder_like(layouts[i], TensorSpec.received(meta).random(generator))
        if i in layouts
        else None
        for i, meta in enumerate(input_metadata(node))
    ]
    witness.begin(grads)
    with witness:
        return called(node, grads, graph.label(node))


def _difference(now: Trace, before: Trace) -> str:
    """Return where a call parts from what it did before."""
    doing = ""
    for a, b in zip(now, before, strict=False):
        if isinstance(a[0], OpOverload):
            doing = schema_of(a[0]).name
        if a != b:
            return f"does something else than when it was recorded, at {doing or 'its beginning'}"
    return "does more or less than when it was recorded"
