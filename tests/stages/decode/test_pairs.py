"""Caches of plain tensors, before transformers 4.54: any number of sequences may continue from each."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts.patching.normal_tensors import call_normally
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.tuning.cache_delta import without_past
from accelerate_tts.tuning.compare import compare

ROWS, HEADS, SIZE = 2, 3, 4


def holder(length: int = 3, seed: int = 0) -> Any:
    """A layer of a cache: something with keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, HEADS, length, SIZE)
    return SimpleNamespace(keys=torch.randn(shape, generator=generator), values=torch.randn(shape, generator=generator))


def write(place: Any, number: float) -> bool:
    """One position more, as a kernel writes it: behind the sequence, in the buffers."""
    layer = kv_cache.PairLayer(place.keys, place.values, place)
    if not layer.reserve(1):
        return False
    for buffer, sign in zip(layer.buffers(), (1, -1), strict=True):
        buffer[:, :, layer.length()] = sign * number
    layer.advance(1)
    return True


def longer(tensor: torch.Tensor, number: float) -> torch.Tensor:
    return torch.cat([tensor, torch.full((tensor.shape[0], HEADS, 1, SIZE), number)], 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "branch", "crop", "reorder", "give up"]), st.integers(0, 4)), max_size=25
    )
)
def test_any_order_of_writing_and_branching(steps: list[tuple[str, int]]) -> None:
    """Each of several sequences, which share beginnings, stays what it would be if nothing grew in place."""
    first = holder()
    places = [first]
    expected = [(first.keys.clone(), first.values.clone())]
    for number, (what, which) in enumerate(steps, 1):
        at = which % len(places)
        place, (keys, values) = places[at], expected[at]
        if what == "write":
            assert write(place, number)
            expected[at] = (longer(keys, number), longer(values, -number))
        elif what == "branch":  # whoever holds a tuple may go on from it twice
            places.append(SimpleNamespace(keys=place.keys, values=place.values))
            expected.append((keys, values))
        elif what == "crop" and keys.shape[2] > 1:
            place.keys, place.values = place.keys[:, :, :-1], place.values[:, :, :-1]
            expected[at] = (keys[:, :, :-1], values[:, :, :-1])
        elif what == "reorder":
            index = torch.tensor([1, 0])
            place.keys, place.values = place.keys[index], place.values[index]
            expected[at] = (keys[index], values[index])
        elif what == "give up":  # room was taken and written to, and the token was not wanted after all
            layer = kv_cache.PairLayer(place.keys, place.values, place)
            assert layer.reserve(1)
            layer.buffers()[0][:, :, layer.length()] = 99.0
            layer.release()
        for found, (k, v) in zip(places, expected, strict=True):
            assert torch.equal(found.keys, k)
            assert torch.equal(found.values, v)


def test_it_grows_in_place() -> None:
    place = holder()
    write(place, 1.0)
    address = place.keys.data_ptr(), place.values.data_ptr()
    for number in range(50):
        write(place, number)
        assert (place.keys.data_ptr(), place.values.data_ptr()) == address
    assert place.keys.shape == (ROWS, HEADS, 54, SIZE)


def test_two_threads_that_go_on_from_one_tuple() -> None:
    start = holder()
    write(start, 1.0)
    found: list[Any] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        mine = SimpleNamespace(keys=start.keys, values=start.values)
        barrier.wait()
        for _ in range(50):
            write(mine, number)
        found.append((number, mine))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, mine in found:
        assert torch.equal(mine.keys[:, :, 4:], torch.full((ROWS, HEADS, 50, SIZE), float(number)))
        assert torch.equal(mine.keys[:, :, :4], start.keys)


def test_a_pair_that_nobody_gave_room_has_none() -> None:
    keys, values = torch.zeros(1, 1, 8, 2)[:, :, :4], torch.zeros(1, 1, 8, 2)[:, :, :4]
    layer = kv_cache.PairLayer(keys, values)
    assert not layer.reserve(1), "what lies behind it is somebody else's"
    assert [buffer.shape[2] for buffer in layer.buffers()] == [4, 4]


def test_nothing_is_kept_of_a_cache_that_is_gone() -> None:
    place = holder()
    write(place, 1.0)
    before = len(kv_cache.open_buffers)
    del place
    gc.collect()
    assert len(kv_cache.open_buffers) == before - 1


def test_what_is_compared_of_a_tuple_is_what_was_added() -> None:
    def result(past: tuple[Any, ...]) -> Any:
        return without_past((torch.ones(2, 1, 8), past), (torch.ones(2, 1, 8), given_past))

    layers = [holder(seed=seed) for seed in range(2)]
    given_past = tuple((layer.keys.clone(), layer.values.clone()) for layer in layers)
    expected = tuple((longer(keys, 7.0), longer(values, -7.0)) for keys, values in given_past)
    for layer in layers:
        write(layer, 7.0)
    roomy = tuple((layer.keys, layer.values) for layer in layers)
    assert not roomy[0][0].is_contiguous()
    assert compare(result(expected), result(roomy)).error == pytest.approx(0.0)
    roomy[1][0][0, 0, 0, 0] += 1.0
    assert compare(result(expected), result(roomy)).error > 1e-2, "a position that was given is another"


@pytest.mark.parametrize("kind", ["tuple", "lists"])
def test_a_replayed_call_is_given_room_that_it_keeps(kind: str) -> None:
    """Inference tensors lost the room during the timed call, so that growing in place was slower than eager."""
    with torch.inference_mode():
        first, other = holder(), holder(seed=1)
    pairs = ((first.keys, first.values), (other.keys, other.values))
    past = (
        pairs
        if kind == "tuple"
        else SimpleNamespace(key_cache=[k for k, _ in pairs], value_cache=[v for _, v in pairs])
    )
    roomy = kv_cache.give_room(past)
    found = roomy if kind == "tuple" else tuple(zip(roomy.key_cache, roomy.value_cache, strict=True))
    with torch.inference_mode():
        kept = call_normally(lambda *given: given, tuple(found), {})
    for (keys, values), (before, _), pair in zip(found, pairs, kept, strict=True):
        assert not keys.is_inference()
        assert pair[0] is keys
        assert torch.equal(keys, before)
        address = keys.data_ptr()
        place = SimpleNamespace(keys=keys, values=values)
        assert write(place, 1.0)
        assert place.keys.data_ptr() == address
