"""Values by the identity of objects: one a live object, whatever its class says of equality, and gone with it."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts.identity_map import IdentityMap

WAIT = 30.0


class Alike:
    """All objects are equal, and none has a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)


@given(st.lists(st.tuples(st.sampled_from(["put", "set", "remove", "drop"]), st.integers(0, 3)), max_size=30))
def test_it_holds_what_a_dict_by_id_would_as_long_as_the_objects_live(steps: list[tuple[str, int]]) -> None:
    items: dict[int, Any] = {number: Alike() for number in range(4)}
    known: dict[int, int] = {}
    values = IdentityMap[int]()
    for count, (step, number) in enumerate(steps):
        item = items[number]
        if step == "put":
            values.put(item, count)
            known[number] = count
        elif step == "set":
            assert values.setdefault(item, lambda count=count: count) == known.setdefault(number, count)
        elif step == "remove":
            values.remove(item)
            known.pop(number, None)
        else:
            items[number] = item = Alike()
            known.pop(number, None)
        del item
        assert {number: values.get(item) for number, item in items.items()} == {n: known.get(n) for n in items}
        assert len(values) == len(known)
        assert sorted(value for _, value in values.items()) == sorted(known.values())


def test_a_cycle_that_is_collected_is_forgotten() -> None:
    values = IdentityMap[str]()
    item = Alike()
    vars(item)["itself"] = item
    values.put(item, "known")
    del item
    gc.collect()
    assert len(values) == 0


def test_one_of_many_threads_makes_the_value() -> None:
    values, meeting = IdentityMap[object](), threading.Barrier(8)
    item = Alike()

    def work(_number: int) -> object:
        meeting.wait(WAIT)
        return values.setdefault(item, object)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(8)))) == 1


def test_an_object_that_takes_no_weak_reference_is_refused() -> None:
    values = IdentityMap[int]()
    for store in (lambda: values.put((), 1), lambda: values.setdefault((), lambda: 1)):
        with pytest.raises(TypeError, match="weak reference"):
            store()
    assert values.get(()) is None
