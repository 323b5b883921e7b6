"""Eight threads over four slots, as far as a CPU can show it: who writes to a slot's buffers has its turn.

On a device the turns of a slot are ordered by an event, whichever streams they are on (`GraphRecorder.in_turn`). So no
buffer is written to too early if prompts, moves and tokens come in turns. Nothing here ran on a device.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_decoders import WIDTH, llama

from accelerate_tts import Event
from accelerate_tts.events import FellBack
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.kv_cache.layers import growing_class
from accelerate_tts.stages.decode.slot_pool import Bounds
from accelerate_tts.stages.decode.static_slot import StaticSlot
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("layered_caches", "one_thread")

THREADS, SLOTS = 8, 4


class Slow(Reruns):
    """Recordings that run again, with pauses in which other threads come; it knows whose turn it is."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device, watched=False)
        self._random = random.Random(seed)
        self.holder: int | None = None

    @contextmanager
    def in_turn(self, *, stream: Any = None) -> Iterator[None]:
        pauses = [self._random.choice([0.0, 0.0, 0.001]) for _ in range(2)]
        with super().in_turn():
            before, self.holder = self.holder, threading.get_ident()
            time.sleep(pauses[0])
            try:
                yield
            finally:
                time.sleep(pauses[1])
                self.holder = before


def watch(monkeypatch: pytest.MonkeyPatch, slots: dict[int, Slow], wrong: list[str]) -> None:
    """Have all that a growing layer does with its buffers checked: in a slot it is the turn of the thread."""

    def checked(name: str) -> None:
        plain = getattr(growing_class(), name)

        def method(layer: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain(layer, *args, **kwargs)
            for buffer in layer.buffers():
                recorder = slots.get(buffer.untyped_storage().data_ptr())
                if recorder is not None and recorder.holder != threading.get_ident():
                    wrong.append(f"{name} of a layer in a slot out of its turn")
            return result

        monkeypatch.setattr(growing_class(), name, method)

    for name in ("update", "move_to", "advance"):
        checked(name)


def requests(model: Any, seed: int, pause: bool) -> list[torch.Tensor]:
    """Some requests of one thread, the sequences of two of them in turn, cropped or ended early now and then."""
    chance, pauses, generator = random.Random(seed), random.Random(seed), torch.Generator().manual_seed(seed)
    pasts: list[Any] = [None, None]
    found = []
    with torch.inference_mode():
        for _ in range(30):
            which = chance.randrange(2)
            begins = pasts[which] is None or chance.random() < 0.2
            x = torch.randn(1, chance.randint(2, 7) if begins else 1, WIDTH, generator=generator)
            past = None if begins else pasts[which]
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
            pasts[which] = out.past_key_values
            found.append(out.last_hidden_state.clone())
            if chance.random() < 0.1:
                pasts[which].crop(-1)
            if pause and pauses.random() < 0.3:
                time.sleep(0.001)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_eight_threads_over_four_slots(seed: int, seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    seeds = range(100 * seed, 100 * seed + THREADS)
    expected = [requests(model, each, pause=False) for each in seeds]
    slots: dict[int, Slow] = {}
    wrong: list[str] = []
    made = StaticSlot.__init__

    def init(slot: StaticSlot, *args: Any, **named: Any) -> None:
        made(slot, *args, **named)
        for pair in slot.buffers:
            slots.update({tensor.untyped_storage().data_ptr(): args[0].recorder for tensor in pair})

    given_up = StaticSlot.give_up

    def give_up(slot: StaticSlot) -> None:
        given_up(slot)
        for tensor in (tensor for pair in slot.buffers for tensor in pair):
            del slots[tensor.untyped_storage().data_ptr()]  # memory of the sequence in it alone, if there is one

    monkeypatch.setattr(StaticSlot, "__init__", init)
    monkeypatch.setattr(StaticSlot, "give_up", give_up)
    watch(monkeypatch, slots, wrong)
    numbers = iter(range(1000))
    stage = CapturedStepStage(lambda device: Slow(device, next(numbers)), bounds=Bounds(slots=SLOTS))
    change: Any = stage.prepare(Part("model", "decoder", model))
    change.on()
    start = threading.Barrier(THREADS)
    interval = sys.getswitchinterval()

    def ask(each: int) -> list[torch.Tensor]:
        start.wait()
        return requests(model, each, pause=True)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for whole, found in zip(expected, pool.map(ask, seeds), strict=True):
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, found, strict=True))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert 0 < len(change.slots) <= SLOTS
    assert not [event for event in seen if isinstance(event, FellBack)]
