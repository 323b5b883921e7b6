"""The catalogue finds the stages, filters them by what they declare, and sorts them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts import Event, SettingsError
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.device.graphs import graphs_of
from accelerate_tts.device.setup import compile_mode
from accelerate_tts.plan import Part
from accelerate_tts.settings import Precision, Settings
from accelerate_tts.stages import BaseStage, Change, Stage, Target, register_stage
from accelerate_tts.stages.catalogue import STAGES, default_stages, in_order
from accelerate_tts.stages.graphs.stage import RecordingStage

HALVES = {"cpu": torch.bfloat16, "cuda": torch.bfloat16, "mps": torch.float16, "xpu": torch.bfloat16}
PRECISIONS: tuple[Precision, ...] = ("exact", "balanced", "fast")
MODES = (None, "default", "max-autotune", "reduce-overhead")
# In the order in which they are tried: the name, behind the first precision that has it; those with a "+" need a
# compiler. Which int8 kernels there are depends on the machine.
ORDERS = {
    "cpu": """
        exact     fold weight norm
        exact     one OpenBLAS thread
        exact     fewer operators
        balanced  fewer operators (bfloat16)
        exact     durations in fewer operators, checked by margin
        exact     text encoder in fewer operators, checked by margin
        exact     channels-last convolutions
        fast      fused decoder blocks (int8)
        balanced  fused decoder blocks (bf16)
        exact     fused decoder blocks (fp32)
        balanced  bf16 prompts
        balanced  fused transformer blocks (bf16)
        balanced  fused residual blocks (bf16)
        exact     growing cache
        balanced  bf16 layers
        balanced  bf16 part
        exact     convolutions in fewer products
        fast      skinny linear layers (int8)
        balanced  skinny linear layers (bf16)
        exact     skinny linear layers (fp32)
        exact     few-row linear layers
        fast      int8 linear layers (*)
        fast      int8 recurrent layers
        exact     + torch.compile, frozen
        exact     + compiled blocks
        exact     + torch.compile
    """,
    "cuda": """
        exact     fold weight norm
        exact     captured decode step
        fast      + captured decode step, token kernels (int8)
        balanced  + captured decode step, token kernels (bf16)
        exact     + captured decode step, token kernels (fp32)
        balanced  captured decode step, bf16 part
        exact     recorded in pieces
        balanced  recorded in pieces, bf16 part
        exact     recorded by shape
        balanced  recorded by shape, bf16 part
        balanced  bf16 layers
        balanced  bf16 part
        exact     recorded prompts
        exact     + compiled blocks
        exact     + torch.compile
    """,
    "mps": """
        exact     fold weight norm
        exact     growing cache
        balanced  fp16 layers
        balanced  fp16 part
        exact     + compiled blocks
        exact     + torch.compile
    """,
    "xpu": """
        exact     fold weight norm
        exact     captured decode step
        fast      + captured decode step, token kernels (int8)
        balanced  + captured decode step, token kernels (bf16)
        exact     + captured decode step, token kernels (fp32)
        balanced  captured decode step, bf16 part
        exact     growing cache
        exact     recorded in pieces
        balanced  recorded in pieces, bf16 part
        exact     recorded by shape
        balanced  recorded by shape, bf16 part
        balanced  bf16 layers
        balanced  bf16 part
        exact     recorded prompts
        exact     + compiled blocks
        exact     + torch.compile
    """,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ORDERS)
def test_the_order_on_each_device(
    device: str, mode: str | None, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate_tts.device.half_dtypes.half_dtypes", lambda kind: (HALVES[kind],))
    lines = (line.split(maxsplit=1) for line in ORDERS[device].strip().splitlines())
    wanted = [name for least, name in lines if PRECISIONS.index(least) <= PRECISIONS.index(precision)]
    expected = [name.removeprefix("+ ") for name in wanted if mode is not None or not name.startswith("+")]
    found = [re.sub(r"(int8 linear layers) \(.*\)", r"\1 (*)", s.name) for s in default_stages(device, mode, precision)]
    once = [name for number, name in enumerate(found) if name not in found[max(0, number - 1) : number]]
    assert once == expected


def test_nothing_is_compiled_or_recorded_on_mps() -> None:
    """As it is set up: inductor's code for MPS is a prototype, and torch has no graphs for it."""
    found = {}
    for kind in ("cuda", "rocm", "xpu", "mps"):
        device = DeviceInfo(kind, "stand-in")
        stages = default_stages(device.type, compile_mode(device, Settings(compile_mode="max-autotune")))
        found[kind] = {stage.name for stage in stages}
        assert graphs_of(device.type) is not None or not any(isinstance(stage, RecordingStage) for stage in stages)
    assert found["mps"] == {"fold weight norm", "growing cache"}
    assert found["rocm"] == found["cuda"]
    assert found["xpu"] - found["cuda"] == {"growing cache"}
    assert found["cuda"] - found["xpu"] == set()


# --- what declarations mean -------------------------------------------------------------------------------------------


class Nothing(BaseStage):
    """A stage that changes nothing."""

    def applies(self, part: Part) -> str | None:
        return "nothing to do"

    def prepare(self, part: Part) -> Change:
        raise AssertionError


def stage(name: str, **declared: Any) -> type[BaseStage]:
    return type(name, (Nothing,), {"name": name, "__module__": "elsewhere", **declared})


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    with STAGES.scope():
        yield


def names(classes: Any) -> list[str]:
    return [cls.name for cls in classes]


def test_whom_ours_want_to_follow_is_there() -> None:
    found = STAGES.entries()
    assert {name for cls in found.values() for name in (*cls.after, *cls.before)} <= found.keys()


@given(st.data())
def test_the_order_does_not_depend_on_who_was_registered_first(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 8))
    after = [data.draw(st.sets(st.integers(0, i))) - {i} for i in range(number)]
    classes = [stage(f"stage {i}", after=tuple(f"stage {j}" for j in after[i])) for i in range(number)]
    shuffled = data.draw(st.permutations(classes))
    order = names(in_order(shuffled))
    assert order == names(in_order(classes))
    for cls in classes:
        assert all(order.index(name) < order.index(cls.name) for name in cls.after)


def test_a_stage_of_another_package_comes_last_or_where_it_wants_to_be() -> None:
    ours = names(in_order(STAGES.entries().values()))
    with STAGES.scope():
        register_stage(stage("anywhere", after=("nobody's", "fold weight norm")))
        assert names(in_order(STAGES.entries().values())) == [*ours, "anywhere"]
    register_stage(stage("between", before=("torch.compile",)))
    assert names(in_order(STAGES.entries().values())) == [*ours[:-1], "between", ours[-1]]


def test_a_circle_is_named_and_costs_nobody_a_load(seen: list[Event]) -> None:
    ours = [made.name for made in default_stages("cpu", None)]
    for name, after in (("egg", "hen"), ("hen", "egg"), ("bystander", "egg")):
        register_stage(stage(name, after=(after,)))
    with pytest.raises(SettingsError, match=r"order: (egg after hen after egg|hen after egg after hen); mend"):
        in_order(STAGES.entries().values())
    assert [made.name for made in default_stages("cpu", None)] == ours
    (event,) = seen
    assert "egg after hen" in str(event)


def test_a_stage_is_made_for_what_it_declares() -> None:
    register_stage(stage("for GPUs", devices=("cuda", "xpu"), precisions=("fast",), needs_compiler=True))
    tried = {
        (device, mode, precision)
        for device in ORDERS
        for mode in (None, "default")
        for precision in PRECISIONS
        if "for GPUs" in [made.name for made in default_stages(device, mode, precision)]
    }
    assert tried == {("cuda", "default", "fast"), ("xpu", "default", "fast")}


def test_a_stage_that_cannot_be_made_is_left_out(seen: list[Event]) -> None:
    def variants(target: Target) -> tuple[Stage, ...]:
        raise RuntimeError(f"no {target.device} today")

    register_stage(stage("moody", variants=staticmethod(variants)))
    assert "moody" not in [made.name for made in default_stages("cpu", None)]
    assert [str(event) for event in seen] == ["the stage moody was not applied: RuntimeError: no cpu today"]


def test_the_same_class_may_be_registered_again_and_no_other_under_its_name() -> None:
    assert register_stage(stage("mine")).name == "mine"
    again = register_stage(stage("mine"))
    assert STAGES.entries()["mine"] is again, "a cell of a notebook that is run again"
    with pytest.raises(ValueError, match="'mine' is registered already, as .*choose another name"):
        register_stage(type("Other", (Nothing,), {"name": "mine"}))


@pytest.mark.parametrize(
    ("thing", "error", "message"),
    [
        (lambda: None, TypeError, "needs a subclass of BaseStage, got <function"),
        (type("Plain", (), {}), TypeError, "needs a subclass of BaseStage"),
        (type("Idle", (BaseStage,), {"name": "idle"}), TypeError, "Idle has no applies, prepare"),
        (stage(""), TypeError, "has no name"),
        (stage("a", devices="cpu"), ValueError, "a.devices must be a tuple of names, got 'cpu'"),
        (stage("b", precisions=("quick",)), ValueError, "b.precisions has 'quick', which is none of exact, bal"),
    ],
)
def test_what_cannot_be_registered(thing: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_stage(thing)
