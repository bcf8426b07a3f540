"""Gradients that are differentiated again, with an eye on what gets lost.

A custom Function's `backward` need not be differentiable: it may run over NumPy, under
`once_differentiable`, or use what `forward` kept without history. PyTorch's double backward
takes what it cannot see for constant. Here the Python side of custom Functions is watched while
f and its backward run, and where a dependence leaves the graph there is an error.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._capture.contexts import custom_name
from .._capture.dependence import warn_independent
from .._capture.graph import as_seed, between
from .._torch.contexts import applied_late, calls_watched, contexts_told
from .._torch.graphs import (
    Node,
    accumulators,
    beneath,
    children,
    forward_class,
    gradient_edge,
    is_custom,
    packed_by_hooks,
    vmapped,
)
from .._torch.modes import functions_as_they_are, functorch_active, set_grad_mode
from .._torch.names import pytree, unwrapped
from ..errors import UnsupportedError

_TENSOR = torch.Tensor


class Sight:
    """What is seen of one run of f: where numbers went that derivatives by `inputs` do not follow.

    With `through` operations under `no_grad` have a history all the same, as forward mode sees
    them.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], *, through: bool = False) -> None:
        self._inputs = list(inputs)
        self.through = through
        #: A custom Function that was applied under `no_grad`, and so has no node.
        self.unseen: str | None = None
        self._ends: list[Node] | None = None
        self._known: dict[Node, bool] = {}
        self.lost = _Lost()
        #: The contexts of custom Functions; those in a node that writes into a view are no nodes.
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._depends = False
        #: Through what a number left PyTorch inside some custom Function's `forward`.
        self.left: str | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch f, which must run inside of this."""
        watch = _Watch(self)
        with watch, contexts_told(watch.applied):
            yield

    def check_regions(self, outputs: Any, what: str) -> None:
        """Raise if an output of f depends on the inputs through a region under `no_grad`.

        `what` is whose counterpart in PyTorch differentiates through such a region.
        """
        if not self.lost and self.unseen is None:
            return
        with functions_as_they_are():
            leaves = pytree.tree_leaves(outputs)
            constant = any(isinstance(t, _TENSOR) and self.lost.by_choice(t) for t in leaves)
        if constant or self.unseen is not None:
            how = "a write" if self.unseen is None else self.unseen
            how = f", by {how}" if self.through else ""
            raise UnsupportedError(
                f"{what}: the output depends on the primals through a region of f under "
                f"torch.no_grad(){how}. PyTorch's forward mode differentiates through it, a graph "
                "takes it for constant: leave no_grad out, or detach() what is meant to be "
                "constant; vjp, jacrev and Linearizer take it for constant as it is"
            )

    def descend(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether one of some tensors has a history that leads to the inputs."""
        return any(map(self._descends, tensors))

    def _descends(self, t: torch.Tensor) -> bool:
        if not t.requires_grad:
            return False
        node = t.grad_fn
        if node is None:
            return any(t is x for x in self._inputs)
        if self._ends is None:
            self._ends = accumulators([x for x in self._inputs if x.requires_grad and x.is_leaf])
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = bool(between([node], self._ends))
        return known

    def gradients(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        cotangents: Sequence[torch.Tensor],
        **options: Any,
    ) -> tuple[Any, ...]:
        """Return gradients that can be differentiated again, as of `torch.autograd.grad`.

        Raises `UnsupportedError` if the backward of a custom Function depends on something in a
        way that its derivative would not know.
        """
        roots = [gradient_edge(y).node for y in outputs]
        ends = [gradient_edge(x).node for x in inputs if x.requires_grad]
        contexts = self._between(roots, ends)
        with contextlib.ExitStack() as watches:
            if contexts:
                cotangents = [u if u.requires_grad else as_seed(u) for u in cotangents]
            for ctx in contexts:
                watches.enter_context(calls_watched(ctx, functools.partial(self._called, ctx)))
            results = torch.autograd.grad(
                outputs, inputs, cotangents, create_graph=True, allow_unused=True, **options
            )
        self._depends = self._depends or any(g is not None for g in results)
        return results

    def warn_if_independent(self) -> None:
        """Warn if no gradient asked for so far depended on its inputs."""
        if not self._depends:
            warn_independent("the value")

    def _between(self, roots: Sequence[Node], ends: Sequence[Node]) -> list[Node]:
        """Return the custom Functions whose backward may be called on the way."""
        nodes = between(roots, ends)
        found = [n for n in nodes if is_custom(n)]
        if any(n.name() == "torch::autograd::CopySlices" for n in nodes):
            found += [ctx for ctx in self.contexts if ctx not in found]
        return [n for n in found if not _is_ours(n)]

    def _called(
        self, ctx: Any, backward: Callable[..., Any], cotangents: tuple[torch.Tensor | None, ...]
    ) -> Any:
        """Run one custom Function's backward, and see that its derivative is all there."""
        wary = packed_by_hooks(ctx) or vmapped(forward_class(ctx)) is not None
        watch = _Watch(self, strict=True, wary=wary)
        with watch:
            result = backward(*cotangents)
        with functions_as_they_are():
            reason = (
                watch.left or self._hidden(ctx) or self._missing(ctx, result, cotangents, watch)
            )
        if reason:
            name = custom_name(forward_class(ctx))
            raise UnsupportedError(
                f"{name} has no second derivative that can be seen: {reason}; write its backward "
                "in PyTorch operations on the inputs and outputs that it saved, or as a Function "
                "of its own (a jvp of which serves here)"
            )
        return result

    def _hidden(self, ctx: Any) -> str | None:
        """Return what a context keeps that its `forward` computed outside of PyTorch."""
        if self.left is None:
            return None
        for name, kept in vars(ctx).items():
            for x in pytree.tree_leaves(kept):
                if _is_outside(x):
                    return f"ctx.{name} was computed outside of PyTorch ({self.left})"
        if any(t is not None and _is_outside(t) for t in ctx.saved_tensors):
            return f"what it saved was computed outside of PyTorch ({self.left})"
        return None

    def _missing(
        self, ctx: Any, result: Any, cotangents: Sequence[torch.Tensor | None], watch: _Watch
    ) -> str | None:
        """Return in which way a gradient is not what its history says."""
        given = [u for u in cotangents if u is not None and u.requires_grad]
        starts = {gradient_edge(u).node for u in given}
        below = set(children(ctx))
        for r in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(r, _TENSOR) or not _continuous(r) or not r.numel():
                continue
            if self.lost.of(r):
                return "its backward depends on something that has no history"
            if r.requires_grad:
                if not _leads_to(gradient_edge(r).node, starts, below | {ctx}):
                    return "its backward can be differentiated once only"
            elif given and not (watch.made_here(r) and not bool(r.any())):
                return "its backward leaves PyTorch"
        return None


def seen(
    f: Callable[..., Any], args: Sequence[Any], *, through: bool = False
) -> tuple[Any, Sight]:
    """Return what f returns, and what was seen of it."""
    inputs = [t for t in pytree.tree_leaves(args) if isinstance(t, _TENSOR)]
    sight = Sight(inputs, through=through)
    with sight.running():
        return applied_late(f)(*args), sight


class _Lost:
    """Tensors that depend on something without a history that says so, by identity."""

    def __init__(self) -> None:
        #: The tensor, whether it had a history all the same, and whether f chose so (`no_grad`).
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], bool, bool]] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, t: torch.Tensor, by_choice: bool) -> None:
        chosen = by_choice or self.by_choice(t)
        self._known[id(t)] = (weakref.ref(t), t.requires_grad, chosen)

    def of(self, t: torch.Tensor) -> bool:
        return self._get(t) is not None

    def by_choice(self, t: torch.Tensor) -> bool:
        found = self._get(t)
        return found is not None and found[2]

    def _get(self, t: torch.Tensor) -> tuple[Any, bool, bool] | None:
        found = self._known.get(id(t))
        if found is None or found[0]() is not t:
            return None
        if t.requires_grad and not found[1] and t.grad_fn is not None and is_custom(t.grad_fn):
            return None  # an output of a custom Function, which has its history since
        return found


class _Watch(TorchFunctionMode):
    """Follows numbers through what runs without grad mode.

    With `strict`, around a backward, it follows them everywhere. With `wary` tensors from
    elsewhere count as lost: those that a checkpoint computed again, or that `torch.vmap` wrapped.
    """

    def __init__(self, sight: Sight, *, strict: bool = False, wary: bool = False) -> None:
        super().__init__()
        self._wary = wary
        self._sight = sight
        self._lost = sight.lost
        self._strict = strict
        #: Whether the code itself switched grad mode off; `Function.apply` does so unseen.
        self._chosen = False
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}
        #: Through what a number left PyTorch in the backward.
        self.left: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is set_grad_mode:
            self._chosen = not args[0]
            return func(*args)
        kwargs = kwargs or {}
        on = torch.is_grad_enabled()
        if on and not self._strict and not self._lost:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        if not on and self._chosen and not self._strict and self._continues(func, given, kwargs):
            with torch.enable_grad():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        with functions_as_they_are():
            self._note(func, given, result, on)
        return result

    def applied(self, ctx: Any, arguments: Sequence[Any] | None) -> None:
        """Take note of a custom Function that is applied."""
        self._sight.contexts.add(ctx)
        if not self._sight.through or torch.is_grad_enabled() or not self._chosen:
            return
        with functions_as_they_are():
            if self._sight.descend([t for t in arguments or () if isinstance(t, _TENSOR)]):
                self._sight.unseen = custom_name(forward_class(ctx))

    def _continues(self, func: Any, given: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether an operation under `no_grad` is one to get a history, as without.

        Those that write do not: what they write into may be somebody else's.
        """
        name = getattr(func, "__name__", "")
        with functions_as_they_are():
            tensors = list(_tensors(given))
            if functorch_active():
                if self._sight.descend(tensors):
                    self._sight.unseen = "a torch.func transform"
                return False
            return (
                self._sight.through
                and not (name.endswith("_") or name in _DETACHING or func in _DATA)
                and "out" not in kwargs
                and not any(_continuous(t) and self._lost.of(t) for t in tensors)
                and self._sight.descend(tensors)
            )

    def made_here(self, t: torch.Tensor) -> bool:
        """Whether the backward made `t` of nothing that it depends on."""
        made = self._made.get(id(t))
        return made is not None and made() is t

    def _note(self, func: Any, args: Sequence[Any], result: Any, on: bool) -> None:
        name = getattr(func, "__name__", "")
        if on:
            self._chosen = False
        given = [t for t in _tensors(args) if _continuous(t)]
        if self._wary:
            for t in given:
                if not t.requires_grad and not self.made_here(t):
                    self._lost.add(t, by_choice=False)
        lost = [t for t in given if self._lost.of(t)]
        chosen = any(self._lost.by_choice(t) for t in lost)
        explicit = not on and self._chosen
        if explicit and not self._strict:
            if name in _DETACHING or func in _DATA:
                return  # as constant for `torch.func` as it is here
            follows = bool(lost) or self._sight.descend(given)
        else:
            follows = bool(lost) or any(t.requires_grad for t in given)
        if not follows or name in _CONSTANT:
            if self._strict:
                self._made.update({id(t): weakref.ref(t) for t in _tensors((result,))})
            return
        if name in _LEAVING:
            self._leaves(name, on)
        chosen = chosen or (explicit and not self._strict)
        for t in _tensors((result,)) if name != "__setitem__" else args[:1]:
            if _continuous(t) and (lost or not on or (self._strict and not t.requires_grad)):
                self._lost.add(t, chosen)

    def _leaves(self, name: str, on: bool) -> None:
        if self._strict and (on or self._chosen):
            self.left = f"its backward calls Tensor.{name}"
        elif not on and not self._strict:
            self._sight.left = f"Tensor.{name}"


#: Functions whose derivative is zero, or whose result depends on shapes alone.
_CONSTANT = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
    "new_ones new_empty new_full new_tensor zero_ fill_ sign sgn floor ceil round trunc "
    "bernoulli".split()
)
_DETACHING = frozenset(("detach", "detach_"))
_DATA = (torch.Tensor.data.__get__,)  # type: ignore[attr-defined]
_LEAVING = frozenset(
    "item tolist numpy __array__ __float__ __complex__ data_ptr __dlpack__ "
    "__cuda_array_interface__".split()
)


def _is_ours(ctx: Node) -> bool:
    """Whether a context is of a Function of this package, which sees to its derivatives itself."""
    return str(forward_class(ctx).__module__).startswith(__name__.partition(".")[0] + ".")


def _tensors(items: Sequence[Any]) -> Iterator[torch.Tensor]:
    for x in items:
        if isinstance(x, _TENSOR):
            yield unwrapped(x)
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x)


def _continuous(t: Any) -> bool:
    return isinstance(t, _TENSOR) and (t.is_floating_point() or t.is_complex())


def _is_outside(x: Any) -> bool:
    """Whether something that a context keeps may hold numbers that came from elsewhere."""
    if isinstance(x, _TENSOR):
        # Memory that NumPy and others lend cannot be resized.
        return (
            _continuous(x)
            and not x.requires_grad
            and x.layout == torch.strided
            and not x.untyped_storage().resizable()
        )
    plain = (bool, int, str, bytes, type(None), torch.dtype, torch.device, type)
    return not isinstance(x, plain) and not callable(x)


def _leads_to(start: Node, ends: set[Node], stops: set[Node]) -> bool:
    """Whether a graph leads from a node to one of `ends`, without going beyond `stops`."""
    return any(node in ends for node in beneath([start], stops - ends))
