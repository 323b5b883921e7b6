"""Watch on the structure of modules that a kernel or a graph computes as a whole, without calling those inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import (
    foreign_hooks,
    global_hooks,
    has_hooks,
    hooks_of,
    is_capture,
    module_of,
)

_KINDS = (bool, int, float, str, tuple, type(None), FunctionType, BuiltinFunctionType)
"""Types of attributes that a forward reads beside tensors and modules: sizes, epsilons, factors, activations."""


class Calls:
    """Code that runs at the calls inside a module beside what it was traced with: hooks, and its classes' forwards.

    dynamo guards on modules, their classes and their attributes, but not on these. Hooks that were there from the
    start are a part of the graph.

    Args:
        module: The module.
        itself: Watch the hooks of the module itself, too.
    """

    def __init__(self, module: nn.Module, *, itself: bool = True) -> None:
        modules = [inner for inner in module.modules() if itself or inner is not module]
        self._hooks = [*hooks_of(*modules), *global_hooks()]
        self._found = foreign_hooks(self._hooks)
        self._forwards = [(cls, cls.forward) for cls in {*map(plain_class, modules), plain_class(module)}]

    def altered(self) -> str | None:
        """Return the obstacle if other code runs at these calls than at the start, else `None`."""
        if foreign_hooks(self._hooks) != self._found:
            return "the hooks on what is inside it are others than when it was compiled"
        return _other_forward(self._forwards)


def _other_forward(forwards: list[tuple[Any, Any]]) -> str | None:
    for cls, before in forwards:
        if cls.forward is not before:
            return f"{cls.__name__} was given another forward"
    return None


class Inside:
    """State inside a block that a kernel relies on: modules, their classes, forwards, hooks and plain attributes.

    Args:
        block: The block.
        watched: Further pairs of an object and the name of an attribute that must not change.
        read: A module in it whose outputs transformers may collect. The caller serves these itself.
    """

    def __init__(
        self, block: nn.Module, watched: Iterable[tuple[Any, str]] = (), read: nn.Module | None = None
    ) -> None:
        self._read = [read]
        self._inner = [inner for inner in block.modules() if inner is not block]
        # Also modules without children, since a linear layer may be given an adapter.
        self._places = [(inner._modules, list(inner._modules.values())) for inner in block.modules()]
        self._watched = [(vars(holder), name, vars(holder).get(name)) for holder, name in watched]
        self._watched += [
            (vars(inner), name, value)
            for inner in block.modules()
            if plain_class(inner) is not nn.Linear  # the most frequent module, of which only the tensors matter
            for name, value in plain_attributes(inner, training=inner is not block)
        ]
        self._classes = list(map(plain_class, self._inner))
        self._types = list(map(type, self._inner))
        self._forwards = [(cls, cls.forward) for cls in {*self._classes, plain_class(block)}]
        self._functions = Functions(self._forwards)
        self._watched += [
            (vars(config), name, vars(config)[name])
            for config in {id(config): config for config in map(_config_of, block.modules())}.values()
            for name in self._functions.names & vars(config).keys() - _NOT_OF_A_BLOCK
            if isinstance(vars(config)[name], _KINDS)
        ]
        self._global_hooks = global_hooks()

    @classmethod
    def joined(cls, each: Sequence[Inside]) -> Inside:
        """Return one watch for what several watch, in the state in which they found it. A check of it costs less."""
        made = cls.__new__(cls)
        for name in ("_read", "_inner", "_places", "_classes", "_types"):
            setattr(made, name, [item for one in each for item in getattr(one, name)])
        # Blocks share a configuration, classes and functions.
        watched = {(id(holder), name): (holder, name, value) for one in each for holder, name, value in one._watched}
        made._watched = list(watched.values())
        made._forwards = list(dict(pair for one in each for pair in one._forwards).items())
        made._functions = Functions.joined([one._functions for one in each])
        made._global_hooks = global_hooks()
        return made

    def altered(self) -> str | None:
        """Return the obstacle if the block has changed in a way that the kernel would ignore, else `None`."""
        return self._hooked() or self.changed()

    def changed(self) -> str | None:
        """Return the same without hooks, for callers that watch them by `Calls`."""
        return self._exchanged() or self._rewritten()

    def _hooked(self) -> str | None:
        if has_hooks(*self._inner):
            return "there are hooks on what is inside a block, and nothing inside it is called"
        if self._global_hooks[0] or self._global_hooks[1]:
            return "there are hooks on the calls of all modules, and nothing inside a block is called"
        return None

    def _exchanged(self) -> str | None:
        if [1 for holder, before in self._places if list(holder.values()) != before] or [
            1
            for inner in self._inner
            if "forward" in inner.__dict__ and not (inner in self._read and is_capture(inner.__dict__["forward"]))
        ]:  # lists: this runs for each block at each token, and a generator is slower
            return "a module inside a block was exchanged, or given a forward of its own"  # an adapter, perhaps
        if self._types != (types := list(map(type, self._inner))):
            if self._classes != list(map(plain_class, self._inner)):
                return "a module inside a block was given another class"
            self._types = types  # another stage's
        return None

    def _rewritten(self) -> str | None:
        if (obstacle := _other_forward(self._forwards)) is not None:
            return obstacle
        for holder, name, before in self._watched:
            if (value := holder.get(name)) is not before and _is_other(value, before):
                return f"{name} of a module inside a block is another"
        return self._functions.replaced()


def _is_other(value: Any, before: Any) -> bool:
    """Check that an attribute has another value. A tensor or an array in its place cannot be compared with it."""
    if type(value) is not type(before):
        return True
    if isinstance(value, tuple):
        return len(value) != len(before) or any(
            one is not other and (not isinstance(one, _KINDS) or _is_other(one, other))
            for one, other in zip(value, before, strict=True)
        )
    return bool(value != before)


_BASES = vars(nn.Module).keys()  # its own methods are followed for no class
_NOT_OF_A_BLOCK = {"output_attentions", "output_hidden_states", "use_cache", "return_dict", "dtype", "torch_dtype"}
"""Options of a configuration that are defaults of a call's arguments, or that saving a model writes."""
_ATTENTIONS = ("eager", "sdpa")


class Functions:
    """Functions that forwards find by global names when they run, and that other code may replace there.

    These are functions of the forwards' modules, of modules that they name (`torch.nn.functional`), and the attention
    functions in a registry of transformers. The functions of transformers, and methods, are followed in turn.

    Args:
        forwards: Pairs of a class and its forward.

    Attributes:
        names: Names of all attributes and globals that they read.
    """

    def __init__(self, forwards: Iterable[tuple[Any, Any]]) -> None:
        found: dict[tuple[int, str], tuple[Callable[[str], Any], str]] = {
            (0, name): (vars(nn.Module).get, name) for name in ("__call__", "_wrapped_call_impl", "_call_impl")
        }
        self.names: set[str] = set()
        pending, followed = list(forwards), set()
        while pending:
            cls, function = pending.pop()
            function = inspect.unwrap(function)
            if function in followed or not isinstance(function, FunctionType):
                continue
            followed.add(function)
            self.names.update(function.__code__.co_names)
            pending += [(cls, getattr(cls, name, None)) for name in function.__code__.co_names if name not in _BASES]
            for mapping, name in _places(function):
                found[id(mapping), name] = mapping.get, name
                if module_of(mapping.get(name)).startswith("transformers."):
                    pending.append((None, mapping[name]))
        self._keep({at: (get, name, get(name)) for at, (get, name) in found.items()})

    @classmethod
    def joined(cls, each: Sequence[Functions]) -> Functions:
        """Return one watch for the functions of several, in the state in which they found them."""
        made = cls.__new__(cls)
        made.names = set().union(*(one.names for one in each))
        made._keep({at: place for one in each for at, place in one._found.items()})
        return made

    def _keep(self, found: dict[tuple[int, str], tuple[Callable[[str], Any], str, Any]]) -> None:
        self._found = found
        self._places = [(get, name) for get, name, _ in found.values()]
        self._before = [before for _, _, before in found.values()]

    def replaced(self) -> str | None:
        """Return the obstacle if one of them is another function now, else `None`."""
        now = [get(name) for get, name in self._places]  # this runs for each block at each token
        if now == self._before:
            return None
        name = next(
            name for (_, name), one, other in zip(self._places, now, self._before, strict=True) if one is not other
        )
        return f"{name}, which a block calls, was replaced"


def _config_of(module: Any) -> Any:
    config = vars(module).get("config")
    return config if hasattr(config, "__dict__") else _NO_CONFIG


_NO_CONFIG = SimpleNamespace()


def _places(function: FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the dictionaries in which a function looks for others, with their names there."""
    holders: list[dict[str, Any]] = [function.__globals__]
    for name in function.__code__.co_names:
        for holder in [holder for holder in holders if name in holder]:
            value = holder[name]
            if isinstance(value, ModuleType):
                holders.append(vars(value))
            elif isinstance(value, (FunctionType, BuiltinFunctionType, torch.jit.ScriptFunction)):
                yield holder, name
            else:  # the registry is a dictionary, or an object with two
                each = [value, *(getattr(value, inner, None) for inner in ("_local_mapping", "_global_mapping"))]
                yield from ((mapping, how) for mapping in each if isinstance(mapping, dict) for how in _ATTENTIONS)


_NOT_READ = {"_is_full_backward_hook", "_version", "_compiled_call_impl", "call_super_init", "dump_patches"}


def plain_attributes(module: nn.Module, *, training: bool = False) -> list[tuple[str, Any]]:
    """Return the names and values of the attributes that a forward may read beside tensors and modules.

    Args:
        module: The module.
        training: Include its mode.
    """
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _NOT_READ and isinstance(value, _KINDS) and (training or name != "training")
    ]
