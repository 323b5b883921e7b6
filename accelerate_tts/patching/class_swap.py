"""Class swaps: changes that replace the `forward` of modules by replacing their class, and undo it.

The module's parameters, buffers, hooks, state dict and `__dict__` are untouched, so nothing can become stale. A copy or
a pickle of a changed module has its plain class.
"""

from __future__ import annotations

import copy
import weakref
from abc import ABCMeta
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from accelerate_tts.events import FellBack, NotApplied, emit
from accelerate_tts.inspection.classes import PLAIN, beneath_swaps, class_of, plain_class, reduction_of, twin_of
from accelerate_tts.patching.change import BaseChange

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

P = ParamSpec("P")

_COPIES = "_accelerate_tts_copies"
_MEMBERS = "_accelerate_tts_members"
FUSED = "_accelerate_tts_fused"
"""Attribute of classes whose objects one kernel computes as a whole. Its value is the object that does so.
`only_tokens` is True if prefill still runs the modules inside; `copied()` returns the layers whose copies could serve
prefill."""
RECORDED = "_accelerate_tts_recorded"
"""Attribute of classes whose objects replay a recording. A recording does not see later changes inside them."""
CARRIED = COPY, HALF, PACKED = "_accelerate_tts_copy", "_accelerate_tts_half", "_accelerate_tts_packed"
"""Attributes that a change may set on a module while it is on. Copies and pickles of the module omit them."""


class ClassSwap(BaseChange):
    """A change that swaps the classes of modules; see `Change`.

    Args:
        modules: The modules.
        swapped: Returns a module's class while the change is on. Called once for each class that the module has when
            the change is switched on.
    """

    def __init__(self, modules: list[nn.Module], swapped: Callable[[nn.Module], type]) -> None:
        self._modules = modules
        self._swapped = swapped
        self._changed: list[tuple[nn.Module, type, type]] = []
        self._made: dict[tuple[nn.Module, type], type] = {}

    def on(self) -> None:
        """See `Change.on`. A module is skipped if other code has derived its class from one of ours."""
        if not self._changed:
            modules = [module for module in self._modules if type(module) not in _derived]
            # All classes are made before any module is changed, since making one may fail.
            self._changed = [(module, type(module), self._class_for(module)) for module in modules]
            for module, _, cls in self._changed:
                module.__class__ = cls

    def _class_for(self, module: nn.Module) -> type:
        # The same class each time: dynamo guards on it, and would recompile at every switch.
        key = (module, type(module))
        if key not in self._made:
            cls = self._made[key] = self._swapped(module)
            if PLAIN in vars(cls) and _MEMBERS not in vars(cls):  # last, since a stage may add members itself
                setattr(cls, _MEMBERS, frozenset({*vars(cls), _MEMBERS}))
        return self._made[key]

    def off(self) -> None:
        """See `Change.off`. A class that other code gave a module meanwhile stays."""
        for module, before, cls in self._changed:
            if cls in type(module).__mro__:
                module.__class__ = before
                _hand_down(cls, before)
        self._changed = []


class CarryingSwap(ClassSwap):
    """A class swap that sets an attribute on each module while the change is on.

    The value is an attribute rather than a closure, so that modules of one kind share one class and one compiled graph.

    Args:
        modules: See `ClassSwap`.
        swapped: See `ClassSwap`.
        attribute: `COPY`, `HALF` or `PACKED`.
        carried: The value for each module. Other modules get none.
    """

    def __init__(
        self, modules: list[nn.Module], swapped: Callable[[nn.Module], type], attribute: str, carried: dict[Any, Any]
    ) -> None:
        super().__init__(modules, swapped)
        self._attribute = attribute
        self._carried = carried
        self._covered: dict[Any, Any] | None = None  # previous values, while the change is on

    def on(self) -> None:
        if self._covered is None:
            self._covered = {module: vars(module).get(self._attribute) for module in self._carried}
            for module, value in self._carried.items():
                vars(module)[self._attribute] = value
        super().on()

    def off(self) -> None:
        super().off()
        for module, before in (self._covered or {}).items():
            if before is None:
                vars(module).pop(self._attribute, None)
            else:
                vars(module)[self._attribute] = before
        self._covered = None


def fused_by(module: Any) -> Any:
    """Return the object that computes a block by one kernel now, or `None`."""
    return getattr(class_of(module), FUSED, None)


def is_fused(module: Any) -> bool:
    """Check that a block is computed by one kernel now."""
    return fused_by(module) is not None


def is_recorded(module: nn.Module) -> bool:
    """Check that a module, or one inside it, replays a recording now."""
    return any(hasattr(class_of(inner), RECORDED) for inner in module.modules())


def in_fused(module: nn.Module) -> set[nn.Module]:
    """Return the modules that belong to fused blocks, the blocks included."""
    return {inner for block in module.modules() if is_fused(block) for inner in block.modules()}


def open_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are still called and can be changed: all except those inside fused blocks.

    The result depends on earlier changes, by this tuning or an earlier one of a part of the module. It is read from the
    modules, so stages need not know each other.
    """
    fused = in_fused(module)
    return [inner for inner in module.modules() if inner not in fused]


def keeps_copies(module: nn.Module) -> bool:
    """Check that a module, or one inside it, computes from copies of its weights now."""
    return any(map(serves_copies, module.modules()))


def make_copies(module: nn.Module) -> None:
    """Compute the values that the layers of a module carry (`Derived`). A compiler cannot trace their computation."""
    for inner in module.modules():
        for carried in [value for name in CARRIED if (value := vars(inner).get(name)) is not None]:
            _compute_weights(inner)
            carried.get()


def _compute_weights(module: Any) -> None:
    """Run torch's own hooks that compute a weight before each call (an old weight norm, pruning): none is under way."""
    import torch

    with torch.inference_mode(mode=False), torch.no_grad():
        for hook in list(module._forward_pre_hooks.values()):
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(module, ())


def serves_copies(module: nn.Module) -> bool:
    """Check that a module itself, not one inside it, computes from copies of its weights now."""
    return bool(copies_of(module))


def copies_of(module: Any) -> str:
    """Return the format of the copies from which a module itself computes now ("bf16", "int8"); "" without copies."""
    return str(getattr(class_of(module), _COPIES, ""))


def subclass_with(plain: type, forward: Callable[..., Any], *, copies: str = "", method: str = "forward") -> type:
    """Make a subclass of a module's class with another `forward`. Its copies and pickles have the plain class.

    It has the names of the plain class, so printing the type shows no difference.

    Args:
        plain: The module's class.
        forward: The replacement.
        copies: Format of its copies of weights (`Derived`), which a compiler treats as weights; "" without copies.
        method: Name of the method that `forward` replaces.
    """

    def reduce_ex(self: Any, protocol: int) -> Any:
        own: Any = plain
        if own.__reduce__ is not object.__reduce__ or own.__reduce_ex__ is not object.__reduce_ex__:
            # The user's own, or that of another stage's class, which makes an untouched module.
            return twin_of(self, plain, CARRIED).__reduce_ex__(protocol)
        return reduction_of(self, plain, CARRIED)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(twin_of(self, plain, CARRIED), memo)

    names: dict[str, Any] = {PLAIN: plain, "__init_subclass__": classmethod(cast("Any", _derive))}
    if copies:
        names[_COPIES] = copies

    def prepare_scriptable(self: Any) -> Any:
        # torch.jit.script compiles the source of a forward, and replaces modules in place by the result.
        emit(NotApplied(f"a tuned {plain.__name__}", "torch.jit.script reads upstream's own code, which it is now"))
        for attribute in CARRIED:
            vars(self).pop(attribute, None)
        self.__class__ = plain_class(self)
        return self

    if forward is not getattr(plain, method):  # a function that wraps itself could not be unwrapped
        vars(forward).setdefault("__wrapped__", getattr(plain, method))  # read by torch.fx and inspect.signature
    names |= {method: forward, "__reduce_ex__": reduce_ex, "__prepare_scriptable__": prepare_scriptable}
    if hasattr(plain, "__deepcopy__"):  # otherwise the reduction is used; torch checks for the attribute
        names["__deepcopy__"] = deepcopy
    return unannounced(plain, names)


# Classes that other code has derived from ours. Their computation is unknown.
_derived: weakref.WeakSet[type] = weakref.WeakSet()


def _derive(cls: type, **kwargs: Any) -> None:
    """Replace our classes by plain ones in the bases of a class that other code derives (a parametrization, FSDP).

    Modules of that class compute as loaded, and stay valid after the change is undone.
    """
    bases = cls.__bases__
    cls.__bases__ = tuple(beneath_swaps(base) for base in bases)
    _derived.add(cls)
    plain: Any = super(cls, cast("Any", cls))
    plain.__init_subclass__(**kwargs)  # the call that this function intercepts
    emit(
        FellBack(
            f"a {cls.__bases__[-1].__qualname__}",
            "its tuning",
            f"{cls.__qualname__} was derived from its class after tuning, and what has that class computes as loaded",
        )
    )


def _hand_down(cls: type, before: type) -> None:
    """Move members that other code set on our class to the class before (torch: a parametrized bias's property)."""
    members = vars(cls)
    for name in set(members) - members.get(_MEMBERS, members.keys()) if before is not cls else ():
        setattr(before, name, members[name])
        delattr(cls, name)


_PARAMETRIZED = "torch.nn.utils.parametrize"
"""Module of the class that torch makes for each module with a parametrization."""


class _Removable(type):
    """Class of our classes of parametrized modules."""

    def __delattr__(cls, name: str) -> None:
        """Delete a member, as torch does to remove a parametrization from a module of this class.

        Its property is a member of the class that torch made. After the last removal torch gives the module the first
        base of its class, which is then the class from before it was parametrized.
        """
        own: Any = beneath_swaps(cls)
        if name in vars(cls) or own is cls:
            super().__delattr__(name)
            return
        delattr(own, name)
        if not any(isinstance(member, property) for member in vars(own).values()):
            cls.__bases__ = own.__bases__
            reason = "its parametrization was removed after tuning, and what had it computes as loaded"
            emit(FellBack(f"a {own.__bases__[0].__qualname__}", "its tuning", reason))


@cache
def _removable(kind: type) -> Any:
    if issubclass(kind, _Removable):
        return kind
    return _Removable if kind is type else type(_Removable.__name__, (_Removable, kind), {})


class _NoLayout:
    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Call no further `__init_subclass__`."""


class _Unannounced:
    def __init_subclass__(cls) -> None:
        """Call no further `__init_subclass__`."""


_LAYOUT = ("__basicsize__", "__itemsize__", "__dictoffset__", "__weakrefoffset__")


def _layout_base(cls: Any) -> Any:
    """Return the base to which `cls` or a class before it adds what its objects hold: `ABC` for `Model(ABC, Module)`.

    Python exchanges bases only between classes that add the same to the same base.
    """
    while all(getattr(cls, name) == getattr(cls.__base__, name) for name in _LAYOUT):
        cls = cls.__base__
    return cls.__base__


def _made(plain: type, members: dict[str, Any], first: type, kind: Any) -> Any:
    maker = ABCMeta if issubclass(kind, ABCMeta) else type
    made: Any = maker.__new__(kind, plain.__name__, (first, plain), members)
    made.__bases__ = (plain,)
    return made


def unannounced(plain: type, members: dict[str, Any]) -> type:
    """Make a subclass with the plain class's names without calling `__init_subclass__` or a user's metaclass.

    Either may register every subclass and keep it alive.
    """
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    base = _layout_base(plain)
    silent: Any = _Unannounced
    # A class that only has more slots than a base with a dictionary gives its objects their layout itself.
    if base is not object and not base.__dictoffset__:
        silent = _made(base, {"__init_subclass__": vars(_NoLayout)["__init_subclass__"]}, _NoLayout, type(base))
    kind = _removable(type(plain)) if beneath_swaps(plain).__module__ == _PARAMETRIZED else type(plain)
    return _made(plain, {**names, **members}, silent, kind)  # type: ignore[no-any-return]


def call_patched(plain: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a class's forward that was replaced after a stage took its place, and emit one event."""
    forward = plain.forward
    if _patched.get(plain) is not forward:
        _patched[plain] = forward
        emit(FellBack(f"layers of {plain.__name__}", "what tuning made of them", "the class was given another forward"))
    return forward(module, *args, **kwargs)


_patched: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def per_class(make: Callable[P, type]) -> Callable[P, type]:
    """Cache a function that makes a subclass of a class. The cache keeps neither class alive.

    A class may belong to one module (torch makes one for each parametrized module) and keep its weights alive.
    """
    known: weakref.WeakKeyDictionary[Any, dict[Any, weakref.ref[type]]] = weakref.WeakKeyDictionary()

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> type:
        entries = known.setdefault(args[0], {})
        key = (args[1:], tuple(sorted(kwargs.items())))
        reference = entries.get(key)
        cls = None if reference is None else reference()
        if cls is None:
            cls = make(*args, **kwargs)
            entries[key] = weakref.ref(cls)
        return cls

    return made
