"""Leftovers of a system's calls: hooks, attributes, tensors, memory, and the time of the last calls.

    python benchmarks/leftovers.py [--calls N] [--json FILE] [NAME ...]

The true classes of the packages that are installed, tiny, with random weights and seed 0; each untouched, and with the
changes that stay on a tuned one: fused blocks, which bring growing caches. Hooks are counted on all modules,
attributes on all modules and whatever holds them, tensors in the process. `time` is the median of the last ten calls
against that of the ten after the first ten.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from accelerate_tts.cli.bench.systems import SYSTEMS
from accelerate_tts.cli.tables import table
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.storage.files import write_whole

CALLS, FEW = 200, 10


class System(NamedTuple):
    """A call that speaks, and its modules."""

    model: Any
    call: Callable[[], object]


class State(NamedTuple):
    """Counts after some calls."""

    hooks: int
    attributes: int
    tensors: int
    megabytes: float


def t3(name: str) -> System:
    """Chatterbox's T3 of another kind than the bench's: multilingual, or turbo."""
    from chatterbox.models.t3 import T3
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
    from chatterbox.models.t3.modules.cond_enc import T3Cond
    from chatterbox.models.t3.modules.t3_config import T3Config

    turbo = name == "turbo"
    config = T3Config(text_tokens_dict_size=704) if turbo else T3Config.multilingual()
    config.use_perceiver_resampler = False
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 14, "head_dim": 4}
    if turbo:
        small = {"n_embd": 64, "hidden_size": 64, "n_layer": 4, "n_head": 4}
        config.input_pos_emb, config.emotion_adv, config.speech_tokens_dict_size = None, False, 6563
    LLAMA_CONFIGS["small"] = {**LLAMA_CONFIGS["GPT2_medium" if turbo else "Llama_520M"], **small}
    config.llama_config_name = "small"
    model: Any = T3(config).eval()
    emotion = None if turbo else 0.5 * torch.ones(1, 1, 1)
    voice = T3Cond(torch.rand(1, 256), None, torch.randint(0, 6561, (1, 10)), emotion_adv=emotion)
    text = torch.nn.functional.pad(torch.randint(1, 250, (1, 8)), (1, 0), value=255)
    text = torch.nn.functional.pad(text, (0, 1), value=0)

    def call() -> object:
        if turbo:
            return model.inference_turbo(voice, text, max_gen_len=8)
        return model.inference(t3_cond=voice, text_tokens=text.repeat(2, 1), max_new_tokens=8)

    return System(model, call)


def of_the_bench(name: str) -> System:
    """A system as `accelerate-tts bench` builds it."""
    built = SYSTEMS[name].build("tiny", None, "cpu")
    return System(built.model, lambda: built.speak(0.4))


NAMES: dict[str, Callable[[str], System]] = {**dict.fromkeys(SYSTEMS, of_the_bench), "multilingual": t3, "turbo": t3}


def modules(model: Any) -> list[torch.nn.Module]:
    roots = model.values() if isinstance(model, dict) else [model]
    found = [inner for root in roots if isinstance(root, torch.nn.Module) for inner in root.modules()]
    return list(dict.fromkeys(found))


def state(model: Any) -> State:
    gc.collect()
    found = modules(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in found)
    # By type: isinstance() asks a proxy of something that is gone already.
    tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return State(hooks, sum(len(vars(m)) for m in found), tensors, peak)


def watch(system: System, calls: int) -> dict[str, Any]:
    """Call it, and report the growth since the tenth call."""
    seconds: list[float] = []
    before = None
    with torch.inference_mode():
        for number in range(calls):
            if number == FEW:
                before = state(system.model)
            torch.manual_seed(number)
            start = time.perf_counter()
            system.call()
            seconds.append(time.perf_counter() - start)
    after = state(system.model)
    assert before is not None
    early, late = statistics.median(seconds[FEW : 2 * FEW]), statistics.median(seconds[-FEW:])
    grown = {field: round(b - a, 1) for field, a, b in zip(State._fields, before, after, strict=True)}
    return {**grown, "first": early, "last": late, "time": round(late / early, 2)}


def tune(model: Any) -> None:
    """Switch on the changes that stay on a tuned model, wherever they apply."""
    roots = model.values() if isinstance(model, dict) else [model]
    for root in roots:
        part = Part("model", "decoder", root)
        stage = FusedBlocksStage()
        if isinstance(root, torch.nn.Module) and stage.applies(part) is None:
            stage.prepare(part).on()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(NAMES)}; all that are installed without")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, Any]] = {}
    for name in given.names or NAMES:
        for tuned in (False, True):
            torch.manual_seed(0)
            try:
                system = NAMES[name](name)
            except Exception as error:
                rows[name] = {"not built": f"{type(error).__name__}: {error}".splitlines()[0]}
                break
            if tuned:
                tune(system.model)
            rows[f"{name}, {'tuned' if tuned else 'untouched'}"] = watch(system, given.calls)
            del system
    columns = [*State._fields, "first", "last", "time", "not built"]

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [[name, *(cell(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    console = Console(width=160)
    console.print(table([["system", *columns], *body], f"grown within {given.calls} calls", set(columns[:-1])))
    if given.json:
        write_whole(given.json, json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
