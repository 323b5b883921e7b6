"""Settings: every variable is read, a bad one names itself, and the switch is asked at call time."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from accelerate_tts import environment, inference, is_active, is_testing, set_active, testing
from accelerate_tts.errors import SettingsError
from accelerate_tts.events import Event, NotApplied
from accelerate_tts.settings import Settings, check_mode

OWN = "ACCELERATE_TTS_"
# variable, its text, the option behind it, the option's value; no value is the option's default.
READ = [
    (f"{OWN}DEVICE", "cpu", "device", "cpu"),
    (f"{OWN}DEVICE", "xpu", "device", "xpu"),
    (f"{OWN}TORCH_COMPILE", "0", "compile", False),
    ("TRANSLATOR_TORCH_COMPILE", "off", "compile", False),
    (f"{OWN}COMPILE_MODE", "max-autotune", "compile_mode", "max-autotune"),
    ("TRANSLATOR_COMPILE_MODE", "reduce-overhead", "compile_mode", "reduce-overhead"),
    (f"{OWN}CUDNN_BENCHMARK", "No", "cudnn_benchmark", False),
    ("TRANSLATOR_CUDNN_BENCHMARK", "FALSE", "cudnn_benchmark", False),
    (f"{OWN}TF32", "false", "tf32", False),
    (f"{OWN}THREADS", "3", "threads", 3),
    (f"{OWN}WORKERS", " 4 ", "workers", 4),
    (f"{OWN}MPS_HIGH_WATERMARK_RATIO", "1.4", "mps_high_watermark_ratio", 1.4),
    (f"{OWN}MPS_HIGH_WATERMARK_RATIO", "none", "mps_high_watermark_ratio", None),
    (f"{OWN}PRECISION", "balanced", "precision", "balanced"),
    (f"{OWN}TUNE_SECONDS", "12.5", "tune_seconds", 12.5),
    (f"{OWN}TUNE_PATIENCE", "2.5", "tune_patience", 2.5),
    (f"{OWN}RETUNE", "off", "retune", False),
    (f"{OWN}WARMUP_TIMEOUT", "30", "warmup_timeout", 30.0),
    (f"{OWN}WARMUP_TIMEOUT", "none", "warmup_timeout", None),
    (f"{OWN}PACK", "off", "pack", False),
    (f"{OWN}PACK_FOLDER", "/var/packs", "pack_folder", "/var/packs"),
    (f"{OWN}PACK_LIMIT_MB", "100", "pack_limit_mb", 100),
    (f"{OWN}PACK_KEY", "a shared secret", "pack_key", "a shared secret"),
    (f"{OWN}GUARD", "no", "guard", False),
    (f"{OWN}GUARD_LIMIT", "7", "guard_limit", 7),
    (f"{OWN}GUARD_WEIGHTS", "disk", "guard_weights", "disk"),
    (f"{OWN}GUARD_WEIGHTS", "reload", "guard_weights", "reload"),
]
VARIABLES = sorted({row[0] for row in READ})
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@pytest.mark.parametrize(("variable", "text", "field", "value"), READ)
def test_each_variable_is_read_and_moves_one_option(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(Settings(), field) != value, "a default would prove nothing"
    assert Settings.from_environment({variable: text}) == dataclasses.replace(Settings(), **{field: value})


def test_every_option_has_a_variable() -> None:
    assert {row[2] for row in READ} == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_words_for_yes(text: str) -> None:
    assert Settings.from_environment({f"{OWN}TF32": text}).tf32 is True


@pytest.mark.parametrize("name", ["DEVICE", "COMPILE_MODE", "THREADS"])
def test_auto_is_the_default(name: str) -> None:
    assert Settings.from_environment({OWN + name: "auto"}) == Settings()


def test_os_environ_is_read_when_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{OWN}WORKERS", "5")
    assert Settings.from_environment().workers == 5
    assert Settings.from_environment({}).workers == 1


@pytest.mark.parametrize(
    ("name", "own", "older", "field", "value"),
    [
        ("TORCH_COMPILE", "1", "0", "compile", True),
        ("COMPILE_MODE", "default", "max-autotune", "compile_mode", "default"),
        ("CUDNN_BENCHMARK", "1", "0", "cudnn_benchmark", True),
    ],
)
def test_the_own_prefix_wins_over_the_older_name(name: str, own: str, older: str, field: str, value: Any) -> None:
    both = {f"TRANSLATOR_{name}": older, f"{OWN}{name}": own}
    assert getattr(Settings.from_environment(both), field) == value
    assert getattr(Settings.from_environment({**both, f"{OWN}{name}": ""}), field) != value, "an empty own one counts"
    assert getattr(Settings.from_environment({**both, f"TRANSLATOR_{name}": "rubbish"}), field) == value


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("text", ["", "   ", "\t\n"])
def test_empty_means_not_set(variable: str, text: str) -> None:
    assert Settings.from_environment({variable: text}) == Settings()


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        (f"{OWN}DEVICE", "gpu", ("cuda", "mps", "xpu", "cpu")),
        (f"{OWN}DEVICE", "cuda:1", ("cuda", "mps", "xpu", "cpu")),
        (f"{OWN}TORCH_COMPILE", "maybe", ("true", "false", "on", "off")),
        ("TRANSLATOR_TORCH_COMPILE", "2", ("1", "0")),
        (f"{OWN}COMPILE_MODE", "fast", COMPILE_MODES),
        ("TRANSLATOR_COMPILE_MODE", "fast", COMPILE_MODES),
        ("TRANSLATOR_CUDNN_BENCHMARK", "perhaps", ("yes", "no")),
        (f"{OWN}THREADS", "two", ("whole number",)),
        (f"{OWN}THREADS", "0", ("whole number", "at least 1")),
        (f"{OWN}WORKERS", "1.5", ("whole number",)),
        (f"{OWN}WORKERS", "-1", ("at least 1",)),
        (f"{OWN}WORKERS", "auto", ("at least 1",)),
        (f"{OWN}MPS_HIGH_WATERMARK_RATIO", "2.5", ("between 0.0 and 2.0",)),
        (f"{OWN}MPS_HIGH_WATERMARK_RATIO", "nan", ("between 0.0 and 2.0",)),
        (f"{OWN}TUNE_SECONDS", "soon", ("number",)),
        (f"{OWN}TUNE_SECONDS", "inf", ("number of seconds",)),
        (f"{OWN}TUNE_SECONDS", "none", ("number of seconds",)),
        (f"{OWN}TUNE_PATIENCE", "-1", ("tune_patience=-1.0", "number of seconds")),
        (f"{OWN}WARMUP_TIMEOUT", "0", ("number of seconds", "more than 0")),
        (f"{OWN}WARMUP_TIMEOUT", "soon", ("number",)),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(variable: str, text: str, allowed: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({variable: text})
    message = str(caught.value)
    assert variable in message
    assert repr(text) in message
    for word in allowed:
        assert word in message


def test_an_unknown_variable_is_told_with_the_nearest_name(seen: list[Event]) -> None:
    assert Settings.from_environment({f"{OWN}TREADS": "4", "TRANSLATOR_OTHER": "1", "PATH": "/bin"}) == Settings()
    (event,) = seen
    assert isinstance(event, NotApplied)
    assert event.what == f"{OWN}TREADS"
    assert f"did you mean {OWN}THREADS?" in event.reason


def test_known_variables_are_not_reported(seen: list[Event]) -> None:
    others = [(f"{OWN}DISABLE", "0"), (f"{OWN}KERNELS", "avx2"), (f"{OWN}PURE", "1")]
    for variable, text in [*(row[:2] for row in READ), *others]:
        Settings.from_environment({variable: text})
    assert seen == []


_texts = st.one_of(
    st.text(max_size=20),
    st.from_regex(r"[-+]?[0-9_]{1,6}(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,4})?", fullmatch=True),
    st.sampled_from([row[1] for row in READ] + ["nan", "-inf", "1e999", "-0", "\N{ARABIC-INDIC DIGIT THREE}", "\0"]),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*VARIABLES, f"{OWN}DISABLE", f"{OWN}TREADS"], _texts)))
@example({f"{OWN}THREADS": "9" * 5000})
@example({f"{OWN}TUNE_SECONDS": "9" * 5000})
def test_any_text_gives_settings_or_a_settings_error(environment: dict[str, str]) -> None:
    try:
        settings = Settings.from_environment(environment)
    except SettingsError as error:
        message = str(error)
    else:
        assert dataclasses.replace(settings) == settings, "what was read must pass the checks of construction"
        return
    assert any(variable in message for variable in environment)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("device", value) for value in ("", "CUDA", "rocm", 0, ["cpu"])],
        *[(name, value) for name in ("compile", "cudnn_benchmark", "tf32") for value in (1, 0, None, "yes")],
        *[("compile_mode", value) for value in ("", "fast", True)],
        *[(name, value) for name in ("threads", "workers") for value in (0, -2, 1.0, True, False, "2", float("nan"))],
        ("workers", None),
        *[("mps_high_watermark_ratio", value) for value in (-0.1, 2.01, float("nan"), float("inf"), True, "1")],
        *[("tune_seconds", value) for value in (-1, float("nan"), float("inf"), None, True, "180")],
        *[("warmup_timeout", value) for value in (-1, 0, float("nan"), float("inf"), 1e10, True, "600")],
    ],
)
def test_construction_refuses_and_names_the_option_and_value(field: str, value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**{field: value})
    assert f"{field}={value!r}" in str(caught.value)


def test_construction_takes_the_borders() -> None:
    Settings(device="mps", threads=1, workers=1, mps_high_watermark_ratio=2.0, tune_seconds=0)
    Settings(mps_high_watermark_ratio=0, tune_seconds=1)
    mode: Any
    for mode in COMPILE_MODES:
        assert Settings(compile_mode=mode).compile_mode == mode


def test_settings_are_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().workers = 2  # type: ignore[misc] - that it is refused is the test
    assert len({Settings(), Settings(), Settings(workers=2)}) == 2


def test_check_mode() -> None:
    for mode in ("inference", "no_grad", "none"):
        check_mode(mode)
    with pytest.raises(SettingsError, match=r"mode='eval' is not one of inference, no_grad, none"):
        check_mode("eval")


# --- the switch ----------------------------------------------------------------------------------------------------


@inference
def body() -> bool:
    return torch.is_inference_mode_enabled()


def test_set_active_holds_from_the_next_call_on() -> None:
    assert (is_active(), body()) == (True, True)
    set_active(False)
    assert (is_active(), body()) == (False, False)
    set_active(True)
    assert (is_active(), body()) == (True, True)


def test_disable_is_asked_at_call_time_and_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert body() is True
    monkeypatch.setenv(f"{OWN}DISABLE", "1")
    set_active(True)
    assert (is_active(), body()) == (False, False)
    monkeypatch.setenv(f"{OWN}DISABLE", "no")
    assert (is_active(), body()) == (True, True)
    monkeypatch.setenv(f"{OWN}DISABLE", "")
    assert is_active()
    monkeypatch.delenv(f"{OWN}DISABLE")
    set_active(False)
    assert not is_active()


def test_a_blank_disable_is_not_set_like_every_other_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{OWN}DISABLE", " ")
    assert is_active()


def test_a_bad_disable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{OWN}DISABLE", "perhaps")
    with pytest.raises(SettingsError, match=r"ACCELERATE_TTS_DISABLE='perhaps' must be one of 1, true"):
        is_active()


def test_testing_nests_and_survives_exceptions() -> None:
    with testing():
        with pytest.raises(KeyError), testing():
            raise KeyError
        assert (is_testing(), is_active(), body()) == (True, False, False)
    assert (is_testing(), is_active(), body()) == (False, True, True)


def test_testing_gives_back_a_switch_that_was_off() -> None:
    set_active(False)
    with testing():
        pass
    assert not is_active()


def test_testing_scopes_of_two_threads_overlap() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with testing():
            entered.set()
            assert leave.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with testing():
            future = pool.submit(other)
            assert entered.wait(30)
        assert is_testing(), "the first to leave must not end the other's scope"
        assert not is_active()
        leave.set()
        future.result(30)
    assert not is_testing()
    assert is_active()


def test_testing_counts_right_under_contention() -> None:
    barrier = threading.Barrier(8)

    def enter_often() -> None:
        barrier.wait(30)
        for _ in range(500):
            with testing():
                assert is_testing()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(enter_often) for _ in range(8)]:
            future.result(60)
    assert not is_testing()


CONTRADICTIONS = [
    # The variables that are set, the ones reported as without effect, and the one that overrides them.
    ({f"{OWN}TORCH_COMPILE": "1", "TRANSLATOR_TORCH_COMPILE": "0"}, "TRANSLATOR_TORCH_COMPILE='0'", "TORCH_COMPILE"),
    ({f"{OWN}TORCH_COMPILE": "1", "TRANSLATOR_TORCH_COMPILE": "?"}, "TRANSLATOR_TORCH_COMPILE='?'", "TORCH_COMPILE"),
    ({f"{OWN}COMPILE_MODE": "auto", "TRANSLATOR_COMPILE_MODE": "default"}, "TRANSLATOR_COMPILE_MODE='default'", "MODE"),
    ({f"{OWN}CUDNN_BENCHMARK": "off", "TRANSLATOR_CUDNN_BENCHMARK": "1"}, "TRANSLATOR_CUDNN_BENCHMARK='1'", "CUDNN"),
    ({f"{OWN}TORCH_COMPILE": "0", f"{OWN}COMPILE_MODE": "default"}, f"{OWN}COMPILE_MODE", "TORCH_COMPILE='False'"),
    ({"TRANSLATOR_TORCH_COMPILE": "0", f"{OWN}COMPILE_MODE": "default"}, f"{OWN}COMPILE_MODE", "TRANSLATOR_TORCH_COMP"),
    ({f"{OWN}GUARD": "0", f"{OWN}GUARD_LIMIT": "9"}, f"{OWN}GUARD_LIMIT", f"{OWN}GUARD="),
    ({f"{OWN}THREADS": "2", f"{OWN}WORKERS": "2"}, f"{OWN}WORKERS", f"{OWN}THREADS='2'"),
]


@pytest.mark.parametrize(("environment", "loser", "winner"), CONTRADICTIONS)
def test_variables_that_contradict_each_other_are_told(
    environment: dict[str, str], loser: str, winner: str, seen: list[Event]
) -> None:
    Settings.from_environment(environment)
    (event,) = seen
    assert isinstance(event, NotApplied)
    assert event.what == loser
    assert winner in event.reason
    assert "unset one of the two" in event.reason
    assert "secret" not in str(event)


@pytest.mark.parametrize(
    "environment",
    [
        {f"{OWN}TORCH_COMPILE": "yes", "TRANSLATOR_TORCH_COMPILE": "1"},
        {f"{OWN}TORCH_COMPILE": "1", f"{OWN}COMPILE_MODE": "default"},
        {f"{OWN}THREADS": "auto", f"{OWN}WORKERS": "2"},
        {f"{OWN}PACK": "1", f"{OWN}PACK_KEY": "secret"},
        {f"{OWN}PACK": "0", f"{OWN}PACK_KEY": "secret"},  # `accelerate-tts pack export` signs with it
        {f"{OWN}TORCH_COMPILE": "", "TRANSLATOR_TORCH_COMPILE": "0"},
    ],
)
def test_variables_that_agree_are_not(environment: dict[str, str], seen: list[Event]) -> None:
    Settings.from_environment(environment)
    assert not seen


def test_every_setting_has_a_variable_and_every_variable_a_setting() -> None:
    named = {f"{OWN}{field.name.upper()}" for field in dataclasses.fields(Settings)} - {f"{OWN}COMPILE"}
    assert {name for name in environment.VARIABLES if name.startswith(OWN)} == named | {
        f"{OWN}TORCH_COMPILE",
        f"{OWN}DISABLE",
        f"{OWN}KERNELS",
        f"{OWN}PURE",
    }
