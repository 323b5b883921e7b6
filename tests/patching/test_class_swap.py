"""Class swaps: what somebody does to a swapped class stays, no registry hears of ours, and none of them is kept."""

from __future__ import annotations

import abc
import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from accelerate_tts import Event
from accelerate_tts.events import FellBack
from accelerate_tts.patching.class_swap import COPY, CarryingSwap, ClassSwap, per_class, subclass_with
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.weight_norm import FoldStage

T = TypeVar("T")
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
MEL = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum() + self.conv(mel).sum()


STAGES: dict[str, Callable[[], Any]] = {
    "few rows": FewRowsStage,
    "channels last": ChannelsLastStage,
    "half": lambda: HalfStage(torch.bfloat16, carried=False),
    "carried half": lambda: HalfStage(torch.bfloat16, carried=True),
}


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def remade(sizes: tuple[int, int], state: dict[str, torch.Tensor]) -> Remade:
    made = Remade(*sizes)
    made.load_state_dict(state)
    return made


class Remade(nn.Linear):
    """A layer that is pickled by how it is made."""

    def __reduce__(self) -> Any:
        return remade, ((self.in_features, self.out_features), dict(self.state_dict()))


class Again(Remade):
    pass


@pytest.mark.parametrize("kind", [Remade, Again])
@pytest.mark.parametrize("name", ["few rows", "half"])
def test_a_class_with_a_reduction_of_its_own_is_copied_and_pickled_by_it(kind: type[Remade], name: str) -> None:
    model = nn.Sequential(kind(8, 8))
    expected = model(X)
    STAGES[name]().prepare(Part("model", "vocoder", model)).on()
    assert type(model[0]) is not kind
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(clone[0]) is Remade
        assert torch.equal(clone(X), expected)


def orthogonal(module: nn.Module) -> None:
    torch.manual_seed(5)
    parametrizations.orthogonal(module)


def doubled(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Doubled())


def spectral(module: nn.Module) -> None:
    torch.manual_seed(5)
    parametrizations.spectral_norm(module)


def sharded(module: nn.Module) -> None:
    """Make a class of two bases, as FSDP2 does."""
    base = type(module)
    module.__class__ = type(f"FSDP{base.__name__}", (Sharded, base), {})


class Sharded:
    def reshard(self) -> str:
        return "done"


CHANGES = {"orthogonal": orthogonal, "doubled": doubled, "spectral": spectral, "sharded": sharded}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_class_that_is_derived_after_tuning_stays(stage: Any, change: Any, seen: list[Event]) -> None:
    net, twin = Net().eval(), Net().eval()
    tuned = stage().prepare(Part("net", "model", net))
    tuned.on()
    change(net.linear), change(twin.linear)
    with torch.no_grad():
        expected = twin(X, MEL)
        for switch in (lambda: None, tuned.off, tuned.on, tuned.off, tuned.on, tuned.on, tuned.off, tuned.off):
            switch()
            assert torch.allclose(net(X, MEL), expected, rtol=5e-2, atol=0.5)
        assert torch.equal(net(X, MEL), expected), "it is not what is there without us"
    assert type(net.linear).__name__ == type(twin.linear).__name__
    assert [cls.__module__ for cls in type(net.linear).__mro__] == [cls.__module__ for cls in type(twin.linear).__mro__]
    assert type(net.linear).__mro__[1:] == type(twin.linear).__mro__[1:]
    assert type(net.conv) is nn.Conv1d
    told = [event for event in seen if isinstance(event, FellBack)]
    assert len(told) == (1 if stage is not STAGES["channels last"] else 0), told
    if parametrize.is_parametrized(net.linear):
        clone, reference = copy.deepcopy(net.linear), copy.deepcopy(twin.linear)
        assert torch.equal(clone(X), reference(X))
        parametrize.remove_parametrizations(net.linear, "weight")
        assert type(net.linear) is nn.Linear
    else:
        assert net.linear.reshard() == "done"


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_second_parametrization_stays(stage: Any) -> None:
    """torch then puts a property onto the class that is there, which is ours."""
    net, twin = Net().eval(), Net().eval()
    for each in (net, twin):
        doubled(each.linear)
    tuned = stage().prepare(Part("net", "model", net))
    tuned.on()
    for each in (net, twin):
        parametrize.register_parametrization(each.linear, "bias", Doubled())
    with torch.no_grad():
        expected = twin(X, MEL)
        for switch in (tuned.off, tuned.on, tuned.off):
            switch()
            assert torch.allclose(net(X, MEL), expected, rtol=5e-2, atol=0.5)
        assert torch.equal(net(X, MEL), expected)
        assert torch.equal(net.linear.bias, twin.linear.bias)
    parametrize.remove_parametrizations(net.linear, "bias")
    parametrize.remove_parametrizations(net.linear, "weight")
    assert type(net.linear) is nn.Linear


def test_a_class_of_its_own_that_a_module_is_given_stays() -> None:
    class Mine(nn.Linear):
        pass

    net = Net().eval()
    tuned = FewRowsStage().prepare(Part("net", "model", net))
    tuned.on()
    net.linear.__class__ = Mine
    tuned.off()
    assert type(net.linear) is Mine


def test_copies_of_a_module_with_a_derived_class_are_whole() -> None:
    net = Net().eval()
    HalfStage(torch.bfloat16, carried=True).prepare(Part("net", "model", net)).on()
    doubled(net.linear)
    clone = copy.deepcopy(net)
    expected = net(X, MEL)
    assert torch.allclose(clone(X, MEL), expected, rtol=5e-2, atol=0.5)
    assert type(clone.linear).__bases__ == (nn.Linear,)


def test_copies_of_classes_with_a_copy_of_their_own() -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            made = Own(8, 8)
            made.copied = type(self).__name__
            return made

    holder = nn.Sequential(Own(8, 8)).eval()
    tuned = FewRowsStage().prepare(Part("net", "model", holder))
    tuned.on()
    assert copy.deepcopy(holder)[0].copied == "Own"
    plain = nn.Sequential(nn.Linear(8, 8)).eval()
    FewRowsStage().prepare(Part("net", "model", plain)).on()
    assert type(copy.deepcopy(plain)[0]) is nn.Linear
    assert type(pickle.loads(pickle.dumps(plain))[0]) is nn.Linear


class Registered(nn.Linear):
    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls)


class Meta(type):
    known: ClassVar[list[type]] = []

    def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        made = super().__new__(cls, name, bases, members)
        Meta.known.append(made)
        return made

    def __init__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> None:
        super().__init__(name, bases, members)
        Meta.known.append(cls)


class WithMeta(nn.Linear, metaclass=Meta):
    pass


class Abstract(nn.Linear, abc.ABC):
    @abc.abstractmethod
    def say(self) -> str: ...


class Concrete(Abstract):
    def say(self) -> str:
        return "it"


class AbstractFirst(abc.ABC, nn.Linear):
    pass


class GenericFirst(Generic[T], nn.Linear):  # noqa: PYI059 - users write it so
    pass


class Slotted(nn.Linear):
    __slots__ = ("more",)


@pytest.mark.parametrize("plain", [AbstractFirst, GenericFirst, Slotted])
def test_a_class_whose_first_base_is_no_module_is_swapped(plain: Any) -> None:
    # Python exchanges the bases of a class only for others of the same layout base, which is `ABC` here.
    layer = plain(8, 8)
    before = plain.__bases__[0].__subclasses__()
    swap = ClassSwap([layer], lambda module: subclass_with(type(module), lambda self, x: self.weight @ x + 1))
    swap.on()
    assert type(layer).__mro__[1:] == plain.__mro__
    assert torch.equal(layer(torch.zeros(8)), torch.ones(8))
    swap.off()
    assert type(layer) is plain
    del swap
    gc.collect()
    assert plain.__bases__[0].__subclasses__() == before


def test_no_registry_hears_of_our_classes(seen: list[Event]) -> None:
    net = nn.Sequential(Registered(8, 8), WithMeta(8, 8), Concrete(8, 8)).eval()
    before = len(Registered.known), len(Meta.known)
    expected = net(X)
    stages = [FewRowsStage(), HalfStage(torch.bfloat16, carried=True)]
    changes = []
    for stage in stages:
        changes.append(stage.prepare(Part("net", "model", net)))
        changes[-1].on()
    assert type(net[0]) is not Registered
    assert (len(Registered.known), len(Meta.known)) == before
    assert isinstance(net[2], Concrete)
    assert isinstance(net[2], Abstract)
    assert not isinstance(net[0], Abstract)

    class Derived(type(net[0])):  # type: ignore[misc]
        pass

    assert Registered.known[before[0] :] == [Derived], "a user's own class is announced as it would be"
    assert Derived.__bases__ == (Registered,)
    for change in reversed(changes):
        change.off()
    assert torch.equal(net(X), expected)
    assert [type(module) for module in net] == [Registered, WithMeta, Concrete]


def loaded(stage: Callable[[], Any], norm: Callable[[nn.Module], Any]) -> list[weakref.ref[Any]]:
    net = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(8 * 14, 8))).eval()
    for module in (net[0], net[1][1]):
        norm(module)
    change = stage().prepare(Part("net", "model", net))
    change.on()
    net(MEL)
    classes = [type(module) for module in net.modules()]
    change.off()
    change.on()
    return [weakref.ref(item) for item in (*net.modules(), *net.parameters(), *classes) if item not in KEPT]


KEPT: list[Any] = [nn.Sequential, nn.Flatten, nn.ModuleDict]


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm, lambda module: module])
@pytest.mark.parametrize("stage", [*STAGES.values(), FoldStage], ids=[*STAGES, "fold"])
def test_no_class_nor_module_is_kept(stage: Any, norm: Any) -> None:
    left: dict[str, int] = {}
    for _ in range(3):
        references = loaded(stage, norm)
        gc.collect()
        for item in (reference() for reference in references):
            if isinstance(item, nn.Module) or (isinstance(item, type) and "Parametrized" in item.__name__):
                left[str(item)] = left.get(str(item), 0) + 1
    assert not left


def test_a_class_is_made_once_for_as_long_as_anybody_has_it() -> None:
    made = []

    @per_class
    def swapped(plain: type, *, times: int) -> type:
        made.append(times)
        return subclass_with(plain, lambda self, x: plain.forward(self, x) * times)  # type: ignore[attr-defined]

    first = swapped(nn.Linear, times=2)
    assert swapped(nn.Linear, times=2) is first
    assert swapped(nn.Linear, times=3) is not first
    assert made == [2, 3]
    module = nn.Linear(8, 8)
    change = ClassSwap([module], lambda module: swapped(type(module), times=2))
    for _ in range(3):
        change.on()
        assert type(module) is first
        change.off()
    reference = weakref.ref(first)
    del first, change
    gc.collect()
    assert reference() is None


def test_upstreams_own_forward_may_be_the_replacement() -> None:
    """The class once wrapped itself, for the whole process, and no voice of a model with such a layer was cached."""
    cls = subclass_with(nn.Linear, nn.Linear.forward)
    assert inspect.unwrap(cls.forward) is nn.Linear.forward  # type: ignore[attr-defined]
    assert not hasattr(nn.Linear.forward, "__wrapped__")


def test_what_a_swap_carries_covers_what_another_one_carries() -> None:
    layer = nn.Linear(2, 2)
    before = dict(vars(layer))
    swaps = [
        CarryingSwap([layer], lambda m: subclass_with(type(m), lambda self, x: x), COPY, {layer: name})
        for name in ("first", "second")
    ]
    for swap in swaps:
        swap.on()
        swap.on()
    assert vars(layer)[COPY] == "second"
    for swap, left in zip(reversed(swaps), ("first", None), strict=True):
        swap.off()
        swap.off()
        assert vars(layer).get(COPY) == left
    assert vars(layer) == before
