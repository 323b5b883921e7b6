"""The decode step of full-size speech models, tuned against upstream's own eager loop, and the memory's floor.

    python benchmarks/decode.py [chatterbox] [xtts] [higgs] [--precision exact|balanced|fast] [--layers N] [--json FILE]

Run nothing else meanwhile. The true classes of Chatterbox (the package that is installed), coqui-tts and transformers
(Higgs Audio v2, in bf16 as it is shipped) with random weights and seed 0. Two copies of the model are loaded, one is
tuned by `@optimized_model` on a short sequence; then prompts and single tokens of the two are run in turn. `floor` is
the time in which the memory, as measured here, gives once the loaded weights that a token needs: all but the tables
of embeddings. `sampled` is how many of 300 tokens, sampled with one seed from what the two make of them (with
guidance where the system has it), are the same up to the first that is not. `divergence` is that of the next token's
probabilities, given the same past, over 40 steps: the largest and the mean, in nats. Higgs needs `--layers 8` or so
on a machine of 24 GB.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.modeling_outputs import BaseModelOutputWithPast as Step

from accelerate_tts import Receipt, get_performance_optimizer, optimized_model, receipt_of
from accelerate_tts.cli.bench.floors import bandwidth
from accelerate_tts.cli.bench.measure import bytes_of_a_token, device_type, held_bytes
from accelerate_tts.cli.tables import table
from accelerate_tts.plan import Head
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.kl_divergence import divergence
from accelerate_tts.tuning.timing import synchronize

PROMPT, TOKENS, PAIRS, SAMPLED = 100, 12, 7, 300


class Decoder:
    """A decoder and its loop, as the system around it drives it."""

    def __init__(self, model: torch.nn.Module, head: Head, batch: int, width: int, **asked: Any) -> None:
        self.model = model.eval().to(device_type())
        self.head = Head(tuple(module.to(device_type()) for module in head.modules), head.codebooks, head.guidance)
        self.batch = batch
        self.width = width
        self.asked = asked

    def prompt(self) -> Any:
        x = torch.randn(self.batch, PROMPT, self.width, generator=torch.Generator().manual_seed(1))
        return self.model(inputs_embeds=x.to(self.like), use_cache=True, **self.asked)

    @property
    def like(self) -> torch.Tensor:
        return next(self.model.parameters())

    def token(self, past: Any, number: int) -> Any:
        x = torch.randn(self.batch, 1, self.width, generator=torch.Generator().manual_seed(number + 2))
        return self.model(inputs_embeds=x.to(self.like), past_key_values=past, use_cache=True, **self.asked)

    def speak(self, count: int = TOKENS) -> list[torch.Tensor]:
        out = self.prompt()
        states = [out.last_hidden_state]
        for number in range(count):
            out = self.token(out.past_key_values, number)
            states.append(out.last_hidden_state)
        return states


def chatterbox(layers: int | None) -> Decoder:
    from chatterbox.models.t3 import T3

    t3 = T3()
    if layers is not None:
        t3.tfmr.layers = t3.tfmr.layers[:layers]
        t3.tfmr.config.num_hidden_layers = layers
    # Classifier-free guidance is two rows; the loop asks for all hidden states at every step, and in the released
    # packages (0.1.1 to 0.1.7) for the attention weights, at which nobody looks.
    head = Head((t3.speech_head.eval(),), guidance=0.5)
    weights = "output_attentions=True" in inspect.getsource(T3.inference)
    asked = {"output_hidden_states": True, "output_attentions": weights, "return_dict": True}
    return Decoder(t3.tfmr, head, 2, t3.cfg.hidden_size, **asked)


def xtts(layers: int | None) -> Decoder:
    from TTS.tts.configs.xtts_config import XttsConfig
    from TTS.tts.models.xtts import Xtts

    config = XttsConfig()
    arguments = config.model_args
    arguments.gpt_number_text_tokens, arguments.gpt_start_text_token, arguments.gpt_stop_text_token = 6681, 261, 0
    arguments.gpt_num_audio_tokens, arguments.gpt_start_audio_token, arguments.gpt_stop_audio_token = 1026, 1024, 1025
    arguments.gpt_use_perceiver_resampler = True
    if layers is not None:
        arguments.gpt_layers = layers
    model = Xtts(config)
    model.init_models()
    model.gpt.init_gpt_for_inference(kv_cache=True)
    head = Head((model.gpt.final_norm, model.gpt.mel_head))
    return Decoder(model.gpt.gpt_inference.transformer, head, 1, arguments.gpt_n_model_channels)


def higgs(layers: int | None) -> Decoder:
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    config = HiggsAudioV2Config(num_hidden_layers=layers or 28)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # made so from the start, in half the memory
    try:
        model = HiggsAudioV2ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    return Decoder(model.model, Head((model.audio_lm_head,), config.num_codebooks), 1, config.hidden_size)


@torch.inference_mode()
def guided_logits(decoder: Decoder, out: Any) -> torch.Tensor:
    """Logits of the last state, fp32, (rows, vocabulary): guided rows where the system has classifier-free guidance."""
    logits: torch.Tensor = decoder.head(out.last_hidden_state[:, -1:])[:, -1].float()
    if decoder.head.guidance is None:
        return logits
    conditioned, unconditioned = logits.chunk(2)
    return conditioned + decoder.head.guidance * (conditioned - unconditioned)


def sampled(decoder: Decoder, count: int) -> torch.Tensor:
    """Tokens of a loop as the systems have it: logits of the last state, guidance, temperature, a seeded draw.

    Returns:
        (count, codebooks) of the tokens.
    """
    generator = torch.Generator().manual_seed(3)
    table: torch.Tensor | None = None
    drawn: list[torch.Tensor] = []
    out = decoder.prompt()
    for _ in range(count):
        logits = guided_logits(decoder, out)
        logits = logits[0].view(decoder.head.codebooks, -1).cpu()  # one generator for all devices
        token = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator).flatten()
        drawn.append(token)
        if table is None:
            table = torch.randn(logits.shape[-1], decoder.width, generator=torch.Generator().manual_seed(4))
        x = table[token].sum(0).expand(decoder.batch, 1, -1).to(decoder.like)
        out = decoder.model(inputs_embeds=x, past_key_values=out.past_key_values, use_cache=True, **decoder.asked)
    return torch.stack(drawn)


def same_until(one: torch.Tensor, other: torch.Tensor) -> int:
    differing = (one != other).any(-1).nonzero()
    return int(differing[0]) if len(differing) else len(one)


SYSTEMS: dict[str, Callable[[int | None], Decoder]] = {"chatterbox": chatterbox, "xtts": xtts, "higgs": higgs}
DEFAULT = ("chatterbox", "xtts")


@torch.inference_mode()
def timed_prompt(decoder: Decoder) -> float:
    synchronize(device_type())
    start = time.perf_counter()
    decoder.prompt()
    synchronize(device_type())
    return time.perf_counter() - start


@torch.inference_mode()
def timed_token(decoder: Decoder) -> float:
    past = decoder.prompt().past_key_values
    past = decoder.token(past, 0).past_key_values
    synchronize(device_type())
    start = time.perf_counter()
    for number in range(1, TOKENS):
        past = decoder.token(past, number).past_key_values
    synchronize(device_type())
    return (time.perf_counter() - start) / (TOKENS - 1)


def against(first: Decoder, second: Decoder, timed: Callable[[Decoder], float], pairs: int) -> dict[str, float]:
    timed(first), timed(second)  # warm
    seconds = [(timed(first), timed(second)) for _ in range(pairs)]
    ratios = sorted(a / b for a, b in seconds)
    return {
        "before": statistics.median(a for a, _ in seconds), "after": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
    }  # fmt: skip


def measure(name: str, precision: str, layers: int | None) -> dict[str, Any]:
    make = SYSTEMS[name]
    torch.manual_seed(0)
    plain = make(layers)
    torch.manual_seed(0)
    tuned = make(layers)
    get_performance_optimizer().cleanup_memory(force=True)  # what building the two left behind
    before = held_bytes(device_type())
    optimized_model(warmup=lambda _model: tuned.speak(), precision=precision)(lambda: tuned.model)()  # type: ignore[call-overload]
    after = held_bytes(device_type())
    receipt = receipt_of(tuned.model)
    assert isinstance(receipt, Receipt)
    print(receipt, flush=True)
    with torch.inference_mode():
        states = plain.speak(40), tuned.speak(40)
        error = max(float((a - b).norm() / a.norm()) for a, b in zip(*states, strict=True))
        steps = [divergence([Step(a)], [Step(b)], plain.head) or 0.0 for a, b in zip(*states, strict=True)]
        drawn = [sampled(decoder, SAMPLED) for decoder in (plain, tuned)]
    size = sum(parameter.numel() * parameter.element_size() for parameter in plain.model.parameters())
    read = bytes_of_a_token(plain.model)
    step = against(plain, tuned, timed_token, PAIRS)
    prompt = against(plain, tuned, timed_prompt, PAIRS)
    floor = read / bandwidth(device_type())
    return {
        "step": step, "prompt": prompt, "floor": floor, "step_over_floor": step["after"] / floor, "error": error,
        "sampled": {"tokens": SAMPLED, "same": same_until(*drawn)}, "weights_bytes": size, "read_bytes": read,
        "memory_over_weights": 1 + (after - before) / size, "tuning_seconds": receipt.seconds,
        "divergence": {"largest": max(steps), "mean": statistics.mean(steps)},
        "recompiles": receipt.recompiles, "kept": [f"{stage.part}: {stage.stage}" for stage in receipt.kept],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=[*SYSTEMS, []], help="all if none is given")
    parser.add_argument("--precision", default="exact", choices=["exact", "balanced", "fast"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to look at it quickly")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("ACCELERATE_TTS_PACK", "0")  # of a warm pack, nothing would be tuned
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("accelerate_tts").setLevel(logging.INFO)
    results: dict[str, Any] = {}
    rows = [("system", "what", "eager", "tuned", "ratio", "lowest .. highest", "over floor", "error")]
    for name in options.systems or DEFAULT:
        print(f"{name} ...", flush=True)
        found = results[name] = measure(name, options.precision, options.layers)
        for what in ("step", "prompt"):
            row = found[what]
            rows.append((
                name, f"one {what}", f"{1e3 * row['before']:.0f} ms", f"{1e3 * row['after']:.0f} ms",
                f"{row['ratio']:.2f}x", f"{row['lowest']:.2f} .. {row['highest']:.2f}",
                f"{found['step_over_floor']:.2f}" if what == "step" else "", f"{found['error']:.0e}",
            ))  # fmt: skip
    title = f"Decoders, {options.precision}"
    Console(width=140, highlight=False).print(table(rows, title, {"eager", "tuned", "ratio", "over floor", "error"}))
    for name, found in results.items():
        print(
            f"{name}: {found['sampled']['same']} of {found['sampled']['tokens']} sampled tokens are the same;"
            f" a step diverges by {found['divergence']['largest']:.1e} nats at most,"
            f" {found['divergence']['mean']:.1e} in the mean; tuned in {found['tuning_seconds']:.0f} s,"
            f" memory {found['memory_over_weights']:.2f}x the weights,"
            f" {found['recompiles']} recompiles, kept: {', '.join(found['kept']) or 'nothing'}"
        )
    if options.json:
        write_whole(options.json, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
