"""First audio and the whole of a stream against upstream's own call, in turn, with seeded random weights.

    python benchmarks/streaming.py [SYSTEM ...] [--seconds S] [--pairs N] [--tuned] [--tiny] [--overlap] [--json FILE]
        [--first S] [--growth G] [--most S] [--left-context S] [--reference S]

Run nothing else meanwhile. Each pair runs the unstreamed call and the stream after each other, with the same seed. The
ratios are of each pair: first audio of the stream to the whole call, and the whole stream to the whole call. XTTS is
also compared with its own `inference_stream`. Chatterbox's voice has ten seconds of a recording, which upstream's flow
reads in the whole call; it takes no more of a longer one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from accelerate_tts import StreamOptions, optimized_model, receipt_of, stream
from accelerate_tts.storage.files import write_whole
from accelerate_tts.streaming.shares import MeasuredCosts, measurements

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
TEXT = "The quick brown fox jumps over the lazy dog, and every word of it is spoken on your own machine."
Pieces = Callable[[], Iterable[torch.Tensor]]


class Compared(NamedTuple):
    """A system: what is tuned, the whole call, the stream, and upstream's own stream if it has one."""

    model: Any
    whole: Callable[[], Any]
    pieces: Pieces
    upstreams: Pieces | None = None


def asked(options: argparse.Namespace, **more: Any) -> StreamOptions:
    return StreamOptions(options.first, options.growth, options.most, overlap=options.overlap, **more)


def chatterbox(options: argparse.Namespace, variant: str) -> Compared:
    module = importlib.import_module("chatterbox_backend")
    model = module.random("cpu", options.seconds, tiny=options.tiny, variant=variant)
    if not options.tiny:
        model.conds.gen.update(module.recording(options.reference))
    told = {"language_id": "en"} if variant == "multilingual" else {}
    how = asked(options, left_context=options.left_context)
    return Compared(model, lambda: model.generate(TEXT, **told), lambda: stream(model, TEXT, options=how, **told))


def xtts(options: argparse.Namespace) -> Compared:
    loaded = importlib.import_module("xtts_backend").random(options.seconds, tiny=options.tiny)
    model, given = loaded.model, (TEXT, "en", loaded.latents, loaded.speaker)
    how = asked(options)
    return Compared(
        model,
        lambda: model.inference(*given)["wav"],
        lambda: stream(model, *given, options=how),
        lambda: model.inference_stream(*given),
    )


def higgs(options: argparse.Namespace) -> Compared:
    module = importlib.import_module("higgs_backend")
    loaded = module.random("cpu", options.layers, tiny=options.tiny)
    inputs, more = loaded.prepare(TEXT), {"max_new_tokens": round(25 * options.seconds), "do_sample": True}
    how = asked(options)
    return Compared(
        (loaded.model, loaded.codec),
        lambda: loaded.decode(loaded.model.generate(**inputs, **more)),
        lambda: stream(loaded.model, inputs, loaded.codec, options=how, **more),
    )


def mms(options: argparse.Namespace) -> Compared:
    model, tokenize = importlib.import_module("mms_backend").random(tiny=options.tiny)
    ids = tokenize(TEXT)
    how = asked(options)
    return Compared(model, lambda: model(ids).waveform, lambda: stream(model, ids, options=how))


SYSTEMS: dict[str, Callable[[argparse.Namespace], Compared]] = {
    "english": lambda options: chatterbox(options, "english"),
    "multilingual": lambda options: chatterbox(options, "multilingual"),
    "turbo": lambda options: chatterbox(options, "turbo"),
    "xtts": xtts,
    "higgs": higgs,
    "mms": mms,
}


def timed(pieces: Pieces) -> tuple[float, float]:
    """Seconds to the first piece, and to the last."""
    torch.manual_seed(0)
    start, first = time.perf_counter(), 0.0
    for _ in pieces():
        first = first or time.perf_counter() - start
    return first, time.perf_counter() - start


def measured(compared: Compared, pairs: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"whole": [], "first": [], "stream": []}
    for number in range(pairs + 1):
        print(f"pair {number} of {pairs}" if number else "warming up", flush=True)
        with torch.inference_mode():
            _, whole = timed(lambda: [compared.whole()])
            first, streamed = timed(compared.pieces)
            for name, value in (("whole", whole), ("first", first), ("stream", streamed)):
                found[name].append(value)
            if compared.upstreams is not None:
                first, streamed = timed(compared.upstreams)
                found.setdefault("upstream first", []).append(first)
                found.setdefault("upstream stream", []).append(streamed)
    return {name: values[1:] for name, values in found.items()}  # the first pair warms up, and measures the fields


def shown(found: dict[str, list[float]], name: str) -> str:
    """Median ratio to the whole call with its spread."""
    if name not in found:
        return "-"
    ratios = sorted(value / whole for value, whole in zip(found[name], found["whole"], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"


def shared(model: Any) -> list[MeasuredCosts]:
    """Return the costs of tokens and sound that streams with `--overlap` measured."""
    model = model[0] if isinstance(model, tuple) else model
    return measurements(getattr(model, "t3", model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=[[], *SYSTEMS], default=[])
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech; MMS speaks as long as its text is")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--left-context", type=float, default=2.0, help="seconds that Chatterbox's flow sees")
    parser.add_argument("--reference", type=float, default=10.0, help="seconds of the recording of Chatterbox's voice")
    usual = StreamOptions()
    parser.add_argument("--first", type=float, default=usual.first, help="seconds of the first piece")
    parser.add_argument("--growth", type=float, default=usual.growth, help="each piece against the one before")
    parser.add_argument("--most", type=float, default=usual.most, help="seconds of the longest piece")
    parser.add_argument("--layers", type=int, default=28, help="of Higgs Audio")
    parser.add_argument("--overlap", action="store_true", help="make tokens while sound is made")
    parser.add_argument("--tuned", action="store_true", help="tune each system first")
    parser.add_argument("--tiny", action="store_true", help="small classes: only to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    table = Table("system", "whole", "first audio / whole", "stream / whole", "upstream's first", "upstream's stream")
    results: dict[str, Any] = {}
    for name in options.systems or SYSTEMS:
        torch.manual_seed(0)
        compared = SYSTEMS[name](options)
        if options.tuned:
            optimized_model(warmup=lambda _model, whole=compared.whole: whole())(lambda model=compared.model: model)()
            print(receipt_of(compared.model))
        found = results[name] = measured(compared, options.pairs)
        for known in shared(compared.model):
            print(known)
        whole = f"{statistics.median(found['whole']):.2f} s"
        ratios = [shown(found, ratio) for ratio in ("first", "stream", "upstream first", "upstream stream")]
        table.add_row(name, whole, *ratios)
        if options.json is not None:  # also if a later system is interrupted
            told = {name: str(value) for name, value in vars(options).items() if name != "json"}
            write_whole(options.json, json.dumps({"options": told, **results}, indent=1))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
