"""Callers in several threads of one tuned decoder: tokens a second of all together, against one tuned caller.

    python benchmarks/callers.py [chatterbox] [xtts] [higgs] [--precision exact|balanced|fast] [--layers N]
        [--callers 1 2 4 8] [--tokens 40] [--rounds 5] [--json FILE]

Run nothing else meanwhile. The models are those of `benchmarks/decode.py`, tuned with their heads. Each caller is a
thread with a prompt, a cache and a seed of its own, in a plain loop: a step, the head, guidance, a draw. All callers
have their prompts before the clock starts. In each round every number of callers runs once with shared steps and once
with a pass for each step; ratios are of one round, and the median round counts.

`together` is tokens a second of all callers, against one caller. `latency` is the seconds of one caller's token,
against one caller. `alone each` is `together` without shared steps. `floor` is the time in which the memory, as
measured here, gives once the weights that a token needs, against the time of a pass. `between` is the share of the time
in which no pass runs: upstream's Python of all callers, serial under the GIL, with its small operators, and the wait
for callers who come back. `same bits` says that the states and tokens of every caller equal those that it computes
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from decode import SYSTEMS, TOKENS, guided_logits
from rich.console import Console

from accelerate_tts import Receipt, optimized_model, receipt_of
from accelerate_tts.cli.bench.floors import bandwidth
from accelerate_tts.cli.bench.measure import bytes_of_a_token
from accelerate_tts.cli.tables import table
from accelerate_tts.patching.class_swap import fused_by
from accelerate_tts.stages.decode.shared_steps import SharedSteps
from accelerate_tts.storage.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from decode import Decoder

PROMPT = 100


class Caller:
    """One caller's loop.

    Attributes:
        seconds: Mean seconds of a token.
        made: Its tokens and states.
    """

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self.decoder, self.seed = decoder, seed
        self.seconds = 0.0
        self.made: list[torch.Tensor] = []

    @torch.inference_mode()
    def run(self, count: int, ready: threading.Barrier) -> None:
        decoder, generator = self.decoder, torch.Generator().manual_seed(self.seed)
        # Prompts of different lengths, as callers have them.
        x = torch.randn(decoder.batch, PROMPT + 7 * self.seed, decoder.width, generator=generator)
        out = decoder.model(inputs_embeds=x.to(decoder.like), use_cache=True, **decoder.asked)
        voices = torch.randn(2048, decoder.width, generator=generator)
        ready.wait()
        start = time.perf_counter()
        for _ in range(count):
            logits = guided_logits(decoder, out)
            token = torch.multinomial((logits[0].flatten() / 0.8).softmax(-1), 1, generator=generator)
            x = voices[token % len(voices)].expand(decoder.batch, 1, -1).to(decoder.like)
            out = decoder.model(inputs_embeds=x, past_key_values=out.past_key_values, use_cache=True, **decoder.asked)
            self.made += [token, out.last_hidden_state.clone()]
        self.seconds = (time.perf_counter() - start) / count


class Voice(torch.nn.Module):
    """A decoder and its head, as one model holds them.

    Args:
        decoder: The decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.head = decoder.model, torch.nn.ModuleList(decoder.head.modules)


class Passes:
    """Time of a decoder's passes, which never overlap while steps are shared.

    Attributes:
        seconds: Seconds in all passes so far.

    Args:
        steps: The decoder's shared steps.
    """

    def __init__(self, steps: SharedSteps) -> None:
        self.seconds = 0.0
        rules = steps.rules
        steps.rules = rules._replace(alone=self._timed(rules.alone), together=self._timed(rules.together))

    def _timed(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(*given: Any) -> torch.Tensor:
            start = time.perf_counter()
            try:
                return function(*given)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def together(decoder: Decoder, count: int, tokens: int) -> tuple[float, float, list[list[torch.Tensor]]]:
    """Return tokens a second of all callers, seconds of one's token, and what each made."""
    callers = [Caller(decoder, seed) for seed in range(count)]
    ready = threading.Barrier(count)
    threads = [threading.Thread(target=caller.run, args=(tokens, ready)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = [caller.seconds for caller in callers]
    return count / max(seconds), statistics.mean(seconds), [caller.made for caller in callers]


def same(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> bool:
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other, strict=True))


def shared_steps(decoder: Decoder) -> SharedSteps | None:
    found = (fused_by(module) for module in decoder.model.modules())
    return next((fused.steps for fused in found if fused is not None and hasattr(fused, "steps")), None)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    decoder = SYSTEMS[name](options.layers)
    voice = Voice(decoder).eval()

    def warmup(_voice: Voice) -> list[torch.Tensor]:
        caller = Caller(decoder, 0)
        caller.run(TOKENS, threading.Barrier(1))
        return caller.made[1::2]  # states; a precision may draw other tokens

    optimized_model(warmup=warmup, precision=options.precision)(lambda: voice)()
    receipt = receipt_of(voice)
    assert isinstance(receipt, Receipt)
    print(receipt, flush=True)
    steps = shared_steps(decoder)
    if steps is None:
        raise SystemExit(f"{name}: its blocks are not fused on this machine, so there are no steps to share")
    is_kept, passes = steps.is_on, Passes(steps)
    steps.is_on = False
    expected = [together(decoder, 1, 2)[2]]  # warm
    expected = []
    for seed in range(max(options.callers)):
        caller = Caller(decoder, seed)
        caller.run(options.tokens, threading.Barrier(1))
        expected.append(caller.made)
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in options.callers}
    equal = dict.fromkeys(options.callers, True)
    for _ in range(options.rounds):
        steps.is_on = False
        one, latency, _made = together(decoder, 1, options.tokens)
        for count in options.callers:
            steps.is_on, passes.seconds = True, 0.0
            all_shared, each_shared, made = together(decoder, count, options.tokens)
            between = 1 - passes.seconds / (count * options.tokens / all_shared)
            equal[count] = equal[count] and same(made, expected[:count])
            steps.is_on = False
            all_alone, _, _ = together(decoder, count, options.tokens)
            rows[count].append({
                "together": all_shared / one, "latency": each_shared / latency, "alone": all_alone / one,
                "seconds": each_shared, "between": between,
            })  # fmt: skip
            print(f"{name}, {count} callers: {all_shared / one:.2f}x", flush=True)
    steps.is_on = is_kept
    floor = bytes_of_a_token(decoder.model) / bandwidth("cpu")
    found: dict[str, Any] = {
        "floor": floor, "kept": is_kept, "most_rows": steps.rules.most_rows,
        "notes": receipt.notes, "threads": torch.get_num_threads(), "precision": options.precision,
    }  # fmt: skip
    for count, each in rows.items():
        figures = {key: statistics.median(row[key] for row in each) for key in each[0]}
        spread = [f(row["together"] for row in each) for f in (min, max)]
        found[str(count)] = {**figures, "spread": spread, "same_bits": equal[count]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=[*SYSTEMS, []], help="chatterbox and xtts if none is given")
    parser.add_argument("--precision", default="exact", choices=["exact", "balanced", "fast"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to look at it quickly")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("ACCELERATE_TTS_PACK", "0")  # of a warm pack, nothing would be tuned
    warnings.simplefilter("ignore")
    results = {name: measure(name, options) for name in options.systems or ("chatterbox", "xtts")}
    rows = [
        (
            "system",
            "callers",
            "together",
            "lowest .. highest",
            "alone each",
            "latency",
            "a token",
            "floor",
            "between",
            "same bits",
        )
    ]
    for name, found in results.items():
        for count in options.callers:
            row = found[str(count)]
            rows.append((
                name, str(count), f"{row['together']:.2f}x", "{:.2f} .. {:.2f}".format(*row["spread"]),
                f"{row['alone']:.2f}x", f"{row['latency']:.2f}x", f"{1e3 * row['seconds']:.1f} ms",
                f"{1e3 * found['floor']:.1f} ms", f"{100 * row['between']:.0f} %", "yes" if row["same_bits"] else "NO",
            ))  # fmt: skip
    title = f"Callers in threads, {options.precision}"
    Console(width=140, highlight=False).print(table(rows, title, set(rows[0][2:])))
    for name, found in results.items():
        kept = "kept" if found["kept"] else "not kept"
        print(f"{name}: shared steps were {kept} at load, up to {found['most_rows']} rows")
    if options.json:
        write_whole(options.json, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
