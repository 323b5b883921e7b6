"""Wrong values of every kind at every public door: the library's own errors, each showing the value."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from accelerate_tts import (
    AccelerateTTSError,
    ModelError,
    Settings,
    SettingsError,
    WarmupError,
    add_hook,
    batched,
    cached_embedding,
    carry_mode,
    cli,
    fast_inference,
    inference,
    optimized_model,
    own_random,
    set_active,
)
from accelerate_tts.errors import abridged, shown
from accelerate_tts.settings import check_folder


class Odd:
    """Equal to nothing, without a truth, and with a repr like any other."""

    def __eq__(self, other: object) -> Any:
        raise ArithmeticError("no comparison")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ArithmeticError("no truth")


class Unshown:
    def __repr__(self) -> str:
        raise ArithmeticError("no repr")


HUGE = 10**5000  # more digits than Python shows
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 10**30, HUGE, -HUGE, 0.0, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf,
    1j, Fraction(1, 3), "", " ", "cpu", "\0", "\ud800", b"", b"bytes", (), [], {}, set(), [1, 2], (1, 2), {"a": 1},
    range(3), np.array([1, 2]), np.array("cpu"), np.float64("nan"), np.int64(3), torch.tensor([1.0, 2.0]),
    torch.tensor(math.nan), Path(), object(), Odd(), Unshown(), int, len, lambda: 0,
]  # fmt: skip
values = st.one_of(
    st.sampled_from(STRANGE),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.binary(max_size=10),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    ),
)


def failure(call: Callable[[], Any], *kinds: type[Exception]) -> Exception | None:
    """The error of a call, which may only be one of these; `None` if there was none."""
    try:
        call()
    except kinds as error:
        return error
    return None


def refused(call: Callable[[], Any], value: Any, *kinds: type[Exception]) -> bool:
    """Check that the call raises, and that its error shows the value."""
    error = failure(call, SettingsError, *kinds)
    if error is None:
        return False
    assert shown(value) in str(error) or abridged(value) in str(error)
    assert error.__context__ is None or error.__suppress_context__, "another library's error shows through"
    return True


@given(field=st.sampled_from(sorted(Settings.__dataclass_fields__)), value=values)
@example("tune_seconds", HUGE)
@example("threads", HUGE)
@example("workers", -HUGE)
@example("device", np.array("cpu"))
@example("precision", Odd())
@example("pack_folder", "a\0b")
@example("pack_folder", "\ud800")
def test_settings(field: str, value: Any) -> None:
    if field == "pack_key" and isinstance(value, str):
        with_key(value)
        return
    if not refused(lambda: Settings(**{field: value}), value):
        taken = Settings(**{field: value})
        assert getattr(taken, field) is value
        assert isinstance(value, (str, int, float, type(None)))
        assert hash(taken) == hash(Settings(**{field: value}))


def with_key(key: str) -> None:
    """A secret is never shown."""
    error = failure(lambda: Settings(pack_key=key), SettingsError)
    if error is None:
        assert key.encode(errors="surrogateescape")
        assert Settings(pack_key=key).pack_key == key
    else:
        assert key not in str(error) or not key


VARIABLES = ["ACCELERATE_TTS_THREADS", "ACCELERATE_TTS_DEVICE", "TRANSLATOR_TORCH_COMPILE"]


@given(variable=st.sampled_from(VARIABLES), value=values)
def test_an_environment_of_other_things_than_texts(variable: str, value: Any) -> None:
    environment: Any = {variable: value, 5: "x"}
    if not isinstance(value, str):
        assert refused(lambda: Settings.from_environment(environment), value)


@given(value=values)
def test_an_environment_that_is_no_mapping(value: Any) -> None:
    if not (value is None or isinstance(value, dict)):
        assert refused(lambda: Settings.from_environment(value), value)


def test_a_secret_that_cannot_be_used_is_not_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({"ACCELERATE_TTS_PACK_KEY": "hidden\ud800"})
    assert "hidden" not in str(caught.value)
    assert "ACCELERATE_TTS_PACK_KEY" in str(caught.value)


def test_the_secret_is_shown_by_neither_settings_nor_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PACK_KEY", "hidden")
    chosen = Settings.from_environment()
    assert chosen.pack_key == "hidden"
    for text in (repr(chosen), str(chosen), f"{chosen}"):
        assert "workers" in text
        assert "hidden" not in text
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["accelerate-tts", "doctor", *words])
        with pytest.raises(SystemExit):
            cli.main()
    out, errors = capsys.readouterr()
    assert "kernels" in out
    assert "hidden" not in out + errors


@given(value=values)
def test_modes(value: Any) -> None:
    good = isinstance(value, str) and value in {"inference", "no_grad", "none"}
    for door in (inference, fast_inference, optimized_model):
        assert refused(lambda door=door: door(mode=value), value) is not good  # type: ignore[misc]


@given(value=values)
def test_what_is_decorated(value: Any) -> None:
    for door in (inference, optimized_model(warmup="Hello."), cached_embedding()):
        if value is None and door is inference:
            continue  # the called form, `@inference()`
        decorated = refused(lambda door=door: door(value), value, TypeError)  # type: ignore[misc]
        assert decorated is not (callable(value) and not isinstance(value, type))


@given(value=values)
@example(HUGE)
def test_limits_of_inference(value: Any) -> None:
    if not refused(lambda: inference(concurrency=value), value):
        assert value is None or value >= 1


@pytest.mark.parametrize(
    "lengths", [(1, 10**30), (10**7, 10**7 + 1), (1, HUGE), (HUGE, HUGE), (-HUGE, 5)], ids=abridged
)
def test_lengths_beyond_any_input_fail_at_decoration(lengths: tuple[int, int]) -> None:
    with pytest.raises(SettingsError, match=r"^lengths=.* must be two whole numbers, .* from 1 to 10000000, such as"):
        optimized_model(warmup="Hello.", lengths=lengths)
    assert optimized_model(warmup="Hello.", lengths=(1, 10**7))


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "value",
    [
        list(range(10**6)),
        "x" * 10**6,
        b"x" * 10**6,
        {n: n for n in range(10**5)},
        [[HUGE] * 1000],
        [ENDLESS],
        [Unshown()] * 500,
    ],
    ids=["numbers", "text", "bytes", "dict", "huge numbers", "a list in itself", "no repr"],
)
def test_large_values_are_abridged(value: Any) -> None:
    assert len(abridged(value)) < 300
    for option in ({"warmup": [[value]]}, {"warmup": {1, *map(str, range(10**5))}}, {"lengths": value, "warmup": "x"}):
        with pytest.raises((SettingsError, WarmupError)) as caught:
            optimized_model(**option)
        assert len(str(caught.value)) < 600


@given(value=values)
def test_what_is_short_is_shown_whole(value: Any) -> None:
    text = shown(value)
    assert abridged(value) == text if len(text) <= 100 else len(abridged(value)) <= max(len(text), 300)


@given(option=st.sampled_from(["precision", "tune_seconds"]), value=values)
@example("tune_seconds", HUGE)
def test_options_of_optimized_model(option: str, value: Any) -> None:
    if not refused(lambda: optimized_model(**{option: value}), value):
        assert value is None or isinstance(value, (int, float) if option == "tune_seconds" else str)


@given(value=values)
def test_lengths(value: Any) -> None:
    if (
        value is not None
        and "cannot be shown" not in shown(value)
        and not refused(lambda: optimized_model(warmup="Hello.", lengths=value), value)
    ):
        assert 1 <= value[0] <= value[1]


@given(value=values)
@example([])
@example([[1]])
@example(["  "])
@example([5])
def test_warmups(value: Any) -> None:
    if "cannot be shown" in shown(value):
        return
    items = value if isinstance(value, list) else [value]
    error = failure(lambda: optimized_model(warmup=value), WarmupError)
    if error is None:
        good = (str, tuple, dict, torch.Tensor, type(None))
        assert all(isinstance(item, good) or callable(item) for item in items)
    else:
        assert any(abridged(wrong) in str(error) for wrong in (value, *items))


@given(option=st.sampled_from(["limit_mb", "folder", "sets", "encoder"]), value=values)
@example("limit_mb", 1e308)
@example("limit_mb", HUGE)
@example("folder", 5)
@example("folder", "")
@example("folder", "a\0b")
@example("sets", 5)
def test_options_of_cached_embedding(option: str, value: Any) -> None:
    if not refused(lambda: cached_embedding(**{option: value}), value):
        cached_embedding(**{option: value})(lambda x: x).cache_info()  # what was taken can be used


@given(option=st.sampled_from(["limit", "recover_after"]), value=values)
def test_options_of_batched(option: str, value: Any) -> None:
    options: Any = {option: value}
    if not refused(lambda: batched(list, **options), value):
        assert batched(list, **options)(range(3)) == [0, 1, 2]


@given(value=values)
def test_what_is_batched(value: Any) -> None:
    assert refused(lambda: batched(value), value, TypeError) is not callable(value)
    run = batched(lambda items: items)
    if not refused(lambda: run(value), value, TypeError) and not isinstance(value, (torch.Tensor, np.ndarray)):
        assert run(value) == list(value)


@given(value=values)
def test_other_doors(value: Any) -> None:
    assert refused(lambda: set_active(value), value) is not isinstance(value, bool)
    set_active(True)
    refused(lambda: own_random(value), value)
    for door in (carry_mode, add_hook):
        if not callable(value):
            assert refused(lambda door=door: door(value), value, TypeError)  # type: ignore[misc]


@given(value=values)
def test_a_folder_that_passes_can_be_asked_for(value: Any) -> None:
    if not refused(lambda: check_folder("folder", value), value):
        Path(value).exists()


def test_the_errors_are_one_family() -> None:
    for kind in (SettingsError, WarmupError, ModelError):
        assert issubclass(kind, AccelerateTTSError)
    assert shown(Unshown()) == "<a Unshown that cannot be shown>"
    assert shown(-HUGE).startswith("<a int")
