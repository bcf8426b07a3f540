"""What a module and those inside it hold, found out once and then only looked over.

A network has hundreds of attributes that never change. A `Tree` writes them down, and sees in one
pass without Python code whether one of them is another object than before. It serves the whole
process, and so refers to no tensor, not even weakly: tensors are looked up each time.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeAlias

import torch

from .classes import has_code, is_own
from .state import PLAIN

Module: TypeAlias = torch.nn.Module
#: Of a module's attributes: those that its forward run does not depend on.
_NOT_READ = frozenset(
    "_non_persistent_buffers_set _backward_pre_hooks _backward_hooks _is_full_backward_hook "
    "_state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks "
    "_load_state_dict_post_hooks _compiled_call_impl".split()
)
#: Dicts that it depends on, whoever wrote its class.
_DICTS = (
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
    "_forward_hooks_always_called",
)
#: Those that tell when one of the others changes too.
_dicts_of = operator.attrgetter(*_DICTS[:5])
_tensors_of = operator.attrgetter(*_DICTS[:2])
_dict_of = operator.attrgetter("__dict__")
_TENSOR, _REF = torch.Tensor, weakref.ref


class Tree:
    """A module with those inside it.

    Attributes
    ----------
    tokens
        What is always read, where it is plain; of tensors, where they stand.
    classes
        Of the modules: those with code that can be seen.
    moves
        Whether some have running statistics, which PyTorch moves without raising their version.
    """

    def __init__(self, root: Module) -> None:
        self._tokens: list[Any] = []
        #: By module, name of a dict and key: what is not plain.
        self._others: list[tuple[weakref.ref[Module], str, Any]] = []
        #: Attributes that count if code that can be seen names them.
        self._named: list[tuple[str, weakref.ref[Module], Any]] = []
        modules = list(_modules(root))
        for module in modules:
            self._write_down(module, own=is_own(type(module)))
        self.tokens = tuple(self._tokens)
        kinds = dict.fromkeys(type(m) for m in modules)
        self.moves = any(m.__dict__["_buffers"].get("running_mean") is not None for m in modules)
        self.classes = [weakref.ref(kind) for kind in kinds if has_code(kind)]
        self._kinds = [weakref.ref(kind) for kind in kinds]
        self._modules = [weakref.ref(m) for m in modules]
        self._ids = self._look()
        #: For each module, what gets its plain attributes and how many there are, and what it got.
        self._getters = [_getter(m) for m in modules]
        self._got = list(self._attributes())

    def still_describes(self, root: Module) -> bool:
        """Whether a module holds what it did, or another tensor in the place of a dead one.

        Modules may be equal that are not the same.
        """
        try:
            return (
                self._modules[0]() is root
                and self._look() == self._ids
                and all(map(operator.is_, self._attributes(), self._got))
            )
        except (AttributeError, KeyError):  # a module or an attribute is gone
            return False

    def kinds(self) -> Iterator[type]:
        """Yield the classes of the modules."""
        return filter(None, map(operator.call, self._kinds))

    def tensors(self) -> list[weakref.ref[torch.Tensor]]:
        """Return the parameters and buffers that stand there now."""
        dicts = chain.from_iterable(map(_tensors_of, map(operator.call, self._modules)))
        values = chain.from_iterable(map(dict.values, filter(None, dicts)))
        return [_REF(t) for t in values if isinstance(t, _TENSOR)]

    def others(self, names: set[str], *, any_name: bool) -> Iterator[tuple[str, Any]]:
        """Yield what else is read by these names; with `any_name` by others too."""
        for ref, where, key in self._others:
            module = ref()
            if module is not None:
                yield str(key), _in(module, where).get(key)
        for name, ref, value in self._named:
            if any_name or name in names:
                module = ref()
                if value is not _LATER:
                    yield name, value
                elif module is not None:
                    yield name, module.__dict__.get(name)

    def _look(self) -> list[Any]:
        """Return names and ids of parameters, buffers, modules and hooks."""
        dicts = list(chain.from_iterable(map(_dicts_of, map(operator.call, self._modules))))
        found: list[Any] = list(map(len, dicts))
        filled = list(filter(None, dicts))
        found += chain.from_iterable(filled)
        found += map(id, chain.from_iterable(map(dict.values, filled)))
        return found

    def _attributes(self) -> Iterator[Any]:
        """Return plain attributes, and how many attributes there are."""
        dicts = list(map(_dict_of, map(operator.call, self._modules)))
        values = chain.from_iterable(map(operator.call, self._getters, dicts))
        return chain(values, map(len, dicts))

    def _write_down(self, module: Module, *, own: bool) -> None:
        tokens, ref = self._tokens, weakref.ref(module)
        tokens.append(weakref.ref(type(module)))
        for where in _DICTS:
            for key, value in module.__dict__.get(where, {}).items():
                tokens.append(key)
                if value is None:
                    tokens.append(None)
                elif isinstance(value, torch.Tensor) and where in _DICTS[:2]:
                    tokens.append(_TENSOR)
                elif where != "_modules" or isinstance(value, torch.jit.ScriptModule):
                    self._others.append((ref, where, key))
        for name, value in module.__dict__.items():
            if name in _NOT_READ or name in _DICTS:
                continue
            plain = type(value) in PLAIN
            if own and name != "training":
                self._named.append((name, ref, value if plain else _LATER))
                continue
            tokens.append(name)
            if plain:
                tokens.append(value)
            else:
                self._others.append((ref, "__dict__", name))


_LATER = object()


def _getter(module: Module) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    own = module.__dict__
    names = [n for n, v in own.items() if type(v) in PLAIN and n not in _NOT_READ]
    return operator.itemgetter(*names, "training")  # two names at least: a tuple


def _in(module: Module, where: str) -> dict[Any, Any]:
    held: dict[Any, Any] = module.__dict__ if where == "__dict__" else module.__dict__[where]
    return held


def _modules(root: Module) -> Iterator[Module]:
    """Yield a module and those inside it, each once; TorchScript ones are another matter."""
    seen = {id(root)}
    stack = [root]
    while stack:
        module = stack.pop()
        yield module
        for child in module.__dict__["_modules"].values():
            if (
                child is not None
                and id(child) not in seen
                and not isinstance(child, torch.jit.ScriptModule)
            ):
                seen.add(id(child))
                stack.append(child)
