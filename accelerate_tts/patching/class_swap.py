"""A change that gives modules another `forward` by giving them another class, and takes it away again.

The module's parameters, buffers, hooks, state dict and `__dict__` are not touched, so nothing can become stale. A copy
or a pickle of a changed module is one of its plain class.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from abc import ABCMeta
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from accelerate_tts.events import FellBack, NotApplied, emit
from accelerate_tts.inspection.classes import PLAIN, class_of, plain_class
from accelerate_tts.patching.change import BaseChange

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = [
    "COPY",
    "FUSED",
    "HALF",
    "PACKED",
    "RECORDED",
    "CarryingSwap",
    "ClassSwap",
    "call_patched",
    "copies_of",
    "fused_by",
    "in_fused",
    "is_fused",
    "is_recorded",
    "keeps_copies",
    "make_copies",
    "open_modules",
    "per_class",
    "serves_copies",
    "subclass_with",
    "unannounced",
]

P = ParamSpec("P")

_COPIES = "_accelerate_tts_copies"
_MEMBERS = "_accelerate_tts_members"
FUSED = "_accelerate_tts_fused"
"""An attribute of classes whose objects are served by one kernel, which calls nothing inside them: what serves them.
Its `only_tokens` says whether what is inside such a block still sees the prompts; `copied()` is of which layers it has
copies that could serve them."""
RECORDED = "_accelerate_tts_recorded"
"""An attribute of classes whose objects replay a recording, which knows nothing of what is changed inside them."""
COPY, HALF, PACKED = "_accelerate_tts_copy", "_accelerate_tts_half", "_accelerate_tts_packed"
"""Attributes that a change may set on a module while it is on; copies and pickles of the module are without them."""


class ClassSwap(BaseChange):
    """The change; see `Change`.

    Args:
        modules: What is changed.
        swapped: From a module to the class that it has while the change is on; asked once for each class that it has
            when the change is switched on.
    """

    def __init__(self, modules: list[nn.Module], swapped: Callable[[nn.Module], type]) -> None:
        self._modules = modules
        self._swapped = swapped
        self._changed: list[tuple[nn.Module, type, type]] = []
        self._made: dict[tuple[nn.Module, type], type] = {}

    def on(self) -> None:
        """See `Change.on`. A module whose class somebody else has derived from ours since is left as it is."""
        if not self._changed:
            modules = [module for module in self._modules if type(module) not in _derived]
            # Before any is changed: one may fail.
            self._changed = [(module, type(module), self._class_for(module)) for module in modules]
            for module, _, cls in self._changed:
                module.__class__ = cls

    def _class_for(self, module: nn.Module) -> type:
        # The same class each time: a compiler guards on it, and would compile again at every switch.
        key = (module, type(module))
        if key not in self._made:
            cls = self._made[key] = self._swapped(module)
            if PLAIN in vars(cls) and _MEMBERS not in vars(cls):  # here, since a stage may add some after it is made
                setattr(cls, _MEMBERS, frozenset({*vars(cls), _MEMBERS}))
        return self._made[key]

    def off(self) -> None:
        """See `Change.off`. A class that somebody else gave a module meanwhile stays."""
        for module, before, cls in self._changed:
            if cls in type(module).__mro__:
                module.__class__ = before
                _hand_down(cls, before)
        self._changed = []


class CarryingSwap(ClassSwap):
    """A class swap whose modules carry something each, as an attribute, while the change is on.

    An attribute and not a closure: alike modules then share one class, and a compiler one graph.

    Args:
        modules: See `ClassSwap`.
        swapped: See `ClassSwap`.
        attribute: `COPY`, `HALF` or `PACKED`.
        carried: What each module carries; those that are not in it carry nothing.
    """

    def __init__(
        self, modules: list[nn.Module], swapped: Callable[[nn.Module], type], attribute: str, carried: dict[Any, Any]
    ) -> None:
        super().__init__(modules, swapped)
        self._attribute = attribute
        self._carried = carried
        self._covered: dict[Any, Any] | None = None  # what the modules carried before, while the change is on

    def on(self) -> None:
        """See `Change.on`."""
        if self._covered is None:
            self._covered = {module: vars(module).get(self._attribute) for module in self._carried}
            for module, value in self._carried.items():
                vars(module)[self._attribute] = value
        super().on()

    def off(self) -> None:
        """See `Change.off`."""
        super().off()
        for module, before in (self._covered or {}).items():
            if before is None:
                vars(module).pop(self._attribute, None)
            else:
                vars(module)[self._attribute] = before
        self._covered = None


def fused_by(module: Any) -> Any:
    """What serves a block by one kernel now; or `None`."""
    return getattr(class_of(module), FUSED, None)


def is_fused(module: Any) -> bool:
    """Whether a block is served by one kernel now."""
    return fused_by(module) is not None


def is_recorded(module: nn.Module) -> bool:
    """Whether a module, or one in it, is served by a recording now."""
    return any(hasattr(class_of(inner), RECORDED) for inner in module.modules())


def in_fused(module: nn.Module) -> set[nn.Module]:
    """What of a module is inside blocks that one kernel serves."""
    return {inner for block in module.modules() if is_fused(block) for inner in block.modules()}


def open_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that are still called, and can be changed: all but those inside blocks that one kernel serves.

    What is left of a module depends on what was changed before, by this tuning or by an earlier one of a part of it. So
    the modules are asked, and stages need not know each other.
    """
    fused = in_fused(module)
    return [inner for inner in module.modules() if inner not in fused]


def keeps_copies(module: nn.Module) -> bool:
    """Whether what a module computes now is computed from copies of its weights."""
    return any(map(serves_copies, module.modules()))


def make_copies(module: nn.Module) -> None:
    """Make what the layers of a module carry (`Derived`), now: a compiler cannot trace how it is made."""
    for inner in module.modules():
        for attribute in (COPY, HALF, PACKED):
            carried = vars(inner).get(attribute)
            if carried is not None:
                carried.get()


def serves_copies(module: nn.Module) -> bool:
    """Whether a module itself, not one in it, computes from copies of its weights now."""
    return bool(copies_of(module))


def copies_of(module: Any) -> str:
    """In what the copies are from which a module itself computes now ("bf16", "int8"); "" where there are none."""
    return str(getattr(class_of(module), _COPIES, ""))


def subclass_with(plain: type, forward: Callable[..., Any], *, copies: str = "", method: str = "forward") -> type:
    """A subclass of a module's class with another `forward`, whose copies and pickles are of the plain class.

    It has the plain class's own names: whoever prints or names the type finds what was there.

    Args:
        plain: The module's class.
        forward: The other one.
        copies: In what it has copies of the weights (`Derived`), which a compiler takes for weights; "" without any.
        method: What `forward` stands in for.
    """

    def twin(self: Any) -> Any:
        module: Any = object.__new__(plain)
        module.__dict__ = {name: value for name, value in vars(self).items() if name not in {COPY, HALF, PACKED}}
        return module

    def reduce_ex(self: Any, protocol: int) -> Any:
        if "__reduce_ex__" in vars(plain):  # a class of another stage: its own reduction makes an untouched module
            return twin(self).__reduce_ex__(protocol)
        # Not the twin's own: pickle insists that its __newobj__ makes an object of the module's present class.
        return copyreg._reconstructor, (plain, object, None), twin(self).__getstate__()  # type: ignore[attr-defined]

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(twin(self), memo)

    names: dict[str, Any] = {PLAIN: plain, "__init_subclass__": classmethod(cast("Any", _derive))}
    if copies:
        names[_COPIES] = copies

    def prepare_scriptable(self: Any) -> Any:
        # torch.jit.script compiles the source of a forward, and replaces modules in place by what is returned here.
        emit(NotApplied(f"a tuned {plain.__name__}", "torch.jit.script reads upstream's own code, which it is now"))
        for attribute in (COPY, HALF, PACKED):
            vars(self).pop(attribute, None)
        self.__class__ = plain_class(self)
        return self

    vars(forward).setdefault("__wrapped__", getattr(plain, method))  # what torch.fx and signatures go by
    names |= {method: forward, "__reduce_ex__": reduce_ex, "__prepare_scriptable__": prepare_scriptable}
    if hasattr(plain, "__deepcopy__"):  # else the reduction does it; torch asks whether a class has one
        names["__deepcopy__"] = deepcopy
    return unannounced(plain, names)


# Classes that others have derived from ours: nobody has looked at what they compute.
_derived: weakref.WeakSet[type] = weakref.WeakSet()


def _derive(cls: type, **kwargs: Any) -> None:
    """Somebody derives a class from ours, for a module perhaps (a parametrization, FSDP): it gets the plain one.

    What has that class computes as it was loaded, and is what it would be without us, also once a change is undone.
    """
    bases = cls.__bases__
    cls.__bases__ = tuple(_without_ours(base) for base in bases)
    _derived.add(cls)
    plain: Any = super(cls, cast("Any", cls))
    plain.__init_subclass__(**kwargs)  # which was to be called
    emit(
        FellBack(
            f"a {cls.__bases__[-1].__qualname__}",
            "its tuning",
            f"{cls.__qualname__} was derived from its class after tuning, and what has that class computes as loaded",
        )
    )


def _hand_down(cls: type, before: type) -> None:
    """Give what somebody has put onto a class of ours (torch: a property for a parametrized bias) its place."""
    members = vars(cls)
    for name in set(members) - members.get(_MEMBERS, members.keys()) if before is not cls else ():
        setattr(before, name, members[name])
        delattr(cls, name)


def _without_ours(cls: type) -> type:
    while PLAIN in vars(cls):
        cls = vars(cls)[PLAIN]
    return cls


class _Unannounced:
    def __init_subclass__(cls) -> None:
        """Ends the announcement."""


def unannounced(plain: type, members: dict[str, Any]) -> type:
    """A subclass under the plain class's own names of which no registry is told.

    Whoever prints or names the type finds what was there. Neither an `__init_subclass__` nor a metaclass of the user's
    own is called, which may keep every class that it hears of.
    """
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    kind = type(plain)
    maker = ABCMeta if issubclass(kind, ABCMeta) else type
    made: Any = maker.__new__(kind, plain.__name__, (_Unannounced, plain), {**names, **members})
    made.__bases__ = (plain,)
    return made  # type: ignore[no-any-return]


def call_patched(plain: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a class's forward that somebody has exchanged since a stage took its place; one event says so."""
    forward = plain.forward
    if _patched.get(plain) is not forward:
        _patched[plain] = forward
        emit(FellBack(f"layers of {plain.__name__}", "what tuning made of them", "the class was given another forward"))
    return forward(module, *args, **kwargs)


_patched: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def per_class(make: Callable[P, type]) -> Callable[P, type]:
    """Make a subclass of a class once for as long as anybody has it: a cache that keeps neither of the two alive.

    A class may be one module's own (torch makes one for each parametrized module), and keep that with all its weights.
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
