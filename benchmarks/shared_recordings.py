"""Callers that share recorded steps of a decoder of T3's size on a CUDA device, against callers that take turns.

    python benchmarks/shared_recordings.py [--layers 30] [--callers 1,2,4] [--tokens 60] [--rows 2]

Run nothing else meanwhile. transformers' Llama with random weights, seed 0, in fp32 without TF32. Each caller is a
thread with a stream and a cache of its own, which reads a number from the device at each token, as a loop that draws
does. `together` is the tokens a second of all callers, against one caller without sharing; `latency` is the time of one
of its tokens against that; `turns` is `together` where steps are not shared; `same` says that all states are bit for
bit those of each caller alone. `left_out` has the numbers of callers whose bits differ. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from importlib.util import find_spec
from typing import Any

import torch
from token_kernels import WIDTH, decoder

from accelerate_tts.events import NotApplied, hooked
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.token_kernels import TokenKernels

PROMPT, NUMBERS = 60, (1, 2, 4)


class Caller:
    """One loop over the decoder, in a thread of its own."""

    def __init__(self, model: Any, seed: int, rows: int) -> None:
        self._model, self._rows = model, rows
        self._generator = torch.Generator().manual_seed(seed)
        self.states: list[torch.Tensor] = []
        self.seconds = 0.0

    def _input(self, positions: int) -> torch.Tensor:
        return torch.randn(self._rows, positions, WIDTH, generator=self._generator).cuda()

    @torch.inference_mode()
    def run(self, tokens: int, ready: threading.Barrier) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            past = self._model(inputs_embeds=self._input(PROMPT), use_cache=True).past_key_values
            torch.cuda.current_stream().synchronize()
            ready.wait()
            start = time.perf_counter()
            for _ in range(tokens):
                out = self._model(inputs_embeds=self._input(1), past_key_values=past, use_cache=True)
                past = out.past_key_values
                float(out.last_hidden_state[0, 0, 0])
                self.states.append(out.last_hidden_state)
            self.seconds = time.perf_counter() - start


def spoken(model: Any, seeds: range, tokens: int, rows: int) -> tuple[float, float, list[list[torch.Tensor]]]:
    """Return the tokens a second of all callers, seconds of one's token, and all states."""
    callers = [Caller(model, seed, rows) for seed in seeds]
    ready = threading.Barrier(len(callers))
    threads = [threading.Thread(target=caller.run, args=(tokens, ready)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    longest = max(caller.seconds for caller in callers)
    return len(callers) * tokens / longest, longest / tokens, [caller.states for caller in callers]


def measure(model: Any, kernels: TokenKernels | None, counts: list[int], tokens: int, rows: int) -> dict[str, Any]:
    left_out: list[str] = []
    with hooked(lambda event: left_out.append(event.reason) if isinstance(event, NotApplied) else None):
        change: Any = CapturedStepStage(kernels=kernels).prepare(Part("decoder", "decoder", model))
        change.on()
        (steps,) = change.steps
        for _ in range(2):  # the second one is warm
            one, latency, _ = spoken(model, range(1), tokens, rows)
        turns = {}
        for count in counts:
            spoken(model, range(count), 2, rows)
            turns[count] = spoken(model, range(count), tokens, rows)[0] / one
        steps.usual.arrange(NUMBERS, rows)
        steps.rules = steps.usual._replace(most_rows=NUMBERS[-1] * rows)
        steps.is_on = True
        alone = [spoken(model, range(seed, seed + 1), tokens, rows)[2][0] for seed in range(max(counts))]
        found: dict[str, Any] = {"one": {"tokens_a_second": one, "ms": 1000 * latency}}
        for count in counts:
            spoken(model, range(count), 12, rows)  # recorded, and compared
            before = steps.counts
            speed, each, states = spoken(model, range(count), tokens, rows)
            passes, made, _ = (now - then for now, then in zip(steps.counts, before, strict=True))
            pairs = [pair for x, y in zip(states, alone, strict=False) for pair in zip(x, y, strict=True)]
            found[f"{count} callers"] = {
                "together": speed / one, "latency": each / latency, "turns": turns[count],
                "callers_a_pass": made / max(1, passes),
                "same": all(torch.equal(a, b) for a, b in pairs),
            }  # fmt: skip
        change.off()
    return {**found, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--callers", default="1,2,4")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "there is no CUDA device"}))
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    model = decoder(given.layers)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "layers": given.layers, "rows": given.rows}
    ways: dict[str, TokenKernels | None] = {"upstream's": None}
    if find_spec("triton") is not None:
        ways["kernels, fp32"] = TokenKernels("fp32")
    for name, kernels in ways.items():
        counts = [int(count) for count in given.callers.split(",")]
        found[name] = measure(model, kernels, counts, given.tokens, given.rows)
        print(name, found[name], flush=True)
        print(json.dumps(found), flush=True)  # what is known, should there be no time for the others


if __name__ == "__main__":
    main()
