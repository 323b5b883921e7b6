"""Models of twelve families without a plan, and MMS: never slower, never outside the tolerance.

    python benchmarks/models.py [--compile] [--precision exact|balanced|fast] [--json FILE] [NAME ...]

Fails if one is slower than 1.05 times the untouched model (beyond doubt: by the upper bound) or outside its tolerance.
Run nothing else meanwhile. The true classes of transformers, built from their configs with random weights and seed 0.
Each is copied, the copy is tuned by `@optimized_model`, and the two are timed in turn under `no_grad` as the user would
call them; the ratio is the median of the pairs. Without --compile the torch.compile stage is left out: minutes less.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from rich.console import Console

from accelerate_tts import optimized_model, receipt_of
from accelerate_tts.cli.tables import table
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.settings import Precision
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.compare import TOLERANCES, compare
from accelerate_tts.tuning.timing import compare_speed

Call = Callable[[Any], Any]
IDS = torch.randint(1, 38, (1, 100), generator=torch.Generator().manual_seed(0))
AUDIO = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))


def generating(batch: int) -> Call:
    prompt = torch.ones(batch, 8, dtype=torch.long)
    return lambda model: model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, min_new_tokens=24, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def llama(layers: int) -> torch.nn.Module:
    config = tf.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, vocab_size=2000
    )
    return tf.LlamaForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Call]] = {
    "MMS (VITS), 100 characters": (lambda: tf.VitsModel(tf.VitsConfig(vocab_size=38)), lambda m: m(IDS).waveform),
    "SpeechT5 HiFi-GAN, 1.6 s": (
        lambda: tf.SpeechT5HifiGan(tf.SpeechT5HifiGanConfig()), lambda m: m(torch.ones(1, 100, 80)),
    ),
    "UnivNet vocoder": (
        lambda: tf.UnivNetModel(tf.UnivNetConfig()),
        lambda m: m(torch.ones(1, 60, 100), noise_sequence=torch.ones(1, 60, 64)).waveforms,
    ),
    "Encodec, 1 s": (lambda: tf.EncodecModel(tf.EncodecConfig()), lambda m: m(AUDIO[None, :, :]).audio_values),
    "DAC codec, 1 s": (
        lambda: tf.DacModel(tf.DacConfig(encoder_hidden_size=32, decoder_hidden_size=512)),
        lambda m: m(AUDIO[None, :, :]).audio_values,
    ),
    "wav2vec 2.0, 1 s": (
        lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(num_hidden_layers=4)), lambda m: m(AUDIO).last_hidden_state,
    ),
    "Whisper tiny encoder": (
        lambda: tf.WhisperModel(tf.WhisperConfig(encoder_layers=4, decoder_layers=1)).encoder,
        lambda m: m(torch.ones(1, 80, 3000)).last_hidden_state,
    ),
    "Llama, 8 layers, batch 1": (lambda: llama(8), generating(1)),
    "Llama, 8 layers, batch 2 (as CFG)": (lambda: llama(8), generating(2)),
    "BERT, 4 layers, 5 tokens": (
        lambda: tf.BertModel(tf.BertConfig(num_hidden_layers=4)), lambda m: m(IDS[:, :5]).last_hidden_state,
    ),
    "GPT-2, 6 layers, batch 1": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=6, vocab_size=2000, bos_token_id=1, eos_token_id=2)),
        generating(1),
    ),
    "T5, 4 + 4 layers": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(num_layers=4, num_decoder_layers=4, vocab_size=2000, decoder_start_token_id=0)
        ),
        generating(1),
    ),
    "Mimi codec, 1 s": (
        lambda: tf.MimiModel(tf.MimiConfig(num_hidden_layers=2)),
        lambda m: m.decode(torch.ones(1, 8, 13, dtype=torch.long)).audio_values,
    ),
    "ViT, 4 layers": (
        lambda: tf.ViTModel(tf.ViTConfig(num_hidden_layers=4)),
        lambda m: m(torch.ones(1, 3, 224, 224)).last_hidden_state,
    ),
}  # fmt: skip


def measure(make: Callable[[], torch.nn.Module], call: Call, precision: Precision) -> dict[str, Any]:
    torch.manual_seed(0)
    untouched = make().eval()
    tuned = optimized_model(warmup=call, precision=precision)(lambda: copy.deepcopy(untouched))()
    receipt = receipt_of(tuned)
    assert receipt is not None

    def run(model: torch.nn.Module) -> Any:
        with seeded("cpu"), torch.no_grad():
            return call(model)

    difference = compare(run(untouched), run(tuned))
    state = {"model": untouched}
    timing = compare_speed(
        lambda: run(state["model"]),
        lambda: state.update(model=untouched),
        lambda: state.update(model=tuned),
        "cpu",
        12.0,
    )
    return {
        "before": timing.before, "after": timing.after, "ratio": timing.ratio, "low": timing.low, "high": timing.high,
        "pairs": timing.pairs, "error": difference.error, "objection": TOLERANCES[precision].objection(difference),
        "tuning_seconds": receipt.seconds, "kept": [f"{stage.part}: {stage.stage}" for stage in receipt.kept],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all models if none is given")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=list(TOLERANCES), default="exact")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.compile:
        os.environ["ACCELERATE_TTS_TORCH_COMPILE"] = "0"
    results: dict[str, dict[str, Any]] = {}
    rows = [("model", "before", "after", "ratio", "95 % bounds", "error", "kept")]
    for name, (make, call) in MODELS.items():
        if options.names and not any(part.lower() in name.lower() for part in options.names):
            continue
        print(f"{name} ...", flush=True)
        found = results[name] = measure(make, call, options.precision)
        kept = ", ".join(sorted({item.rpartition(": ")[2] for item in found["kept"]})) or "nothing"
        rows.append((
            name, f"{1e3 * found['before']:.0f} ms", f"{1e3 * found['after']:.0f} ms", f"{found['ratio']:.2f}x",
            f"{found['low']:.2f} .. {found['high']:.2f}", f"{found['error']:.0e}", kept,
        ))  # fmt: skip
    Console(width=140, highlight=False).print(table(rows, "Tuned as strangers", {"before", "after", "ratio", "error"}))
    if options.json:
        write_whole(options.json, json.dumps(results, indent=2))
    failed = [
        f"{name}: {found['ratio']:.2f}x {found['objection']}"
        for name, found in results.items()
        if found["high"] < 1 / 1.05 or found["objection"]
    ]
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
