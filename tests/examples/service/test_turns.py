"""The bounded queue: in any order of arrivals, departures and cancellations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import serving  # noqa: F401 - skips this file where the service cannot run
from service.problems import Busy, Unavailable
from service.turns import Turns

STEPS = st.lists(st.tuples(st.sampled_from(["arrive", "leave", "cancel"]), st.integers(0, 9)), max_size=60)


@given(STEPS, st.integers(1, 3))
def test_turns_are_given_in_order_and_none_is_lost(steps: list[tuple[str, int]], at_once: int) -> None:
    async def play() -> None:
        turns = Turns(at_once, most=1000)
        tasks: dict[int, asyncio.Task[Callable[[], None]]] = {}
        order: list[int] = []
        leaves: list[Callable[[], None]] = []

        async def enter(number: int) -> Callable[[], None]:
            leave = await turns.enter(1000)
            order.append(number)
            return leave

        for number, (step, which) in enumerate(steps):
            if step == "arrive":
                tasks[number] = asyncio.create_task(enter(number))
            elif step == "leave" and leaves:
                leave = leaves.pop(which % len(leaves))
                leave()
                leave()  # a second time changes nothing
            elif step == "cancel" and tasks:
                tasks.pop(list(tasks)[which % len(tasks)]).cancel()
            if which % 2:  # otherwise the next step comes before anybody has noticed this one
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            for known, task in list(tasks.items()):
                if task.done():
                    leaves.append(tasks.pop(known).result())
            assert turns.running <= at_once
        for _ in range(10 * (len(steps) + 1)):  # a turn that is passed on takes some steps of the loop
            await asyncio.sleep(0)
            for known, task in list(tasks.items()):
                if task.done():
                    leaves.append(tasks.pop(known).result())
            while leaves:
                leaves.pop()()
        assert not tasks, "somebody waits for ever"
        assert (turns.running, turns.waiting) == (0, 0)
        if at_once == 1:  # of two turns that are given in one step of the loop, the later may be noticed first
            assert order == sorted(order)

    asyncio.run(play())


async def test_places_and_waits_are_bounded() -> None:
    turns = Turns(1, most=2)
    with turns.place(), turns.place():
        with pytest.raises(Busy) as caught, turns.place():
            pass
        assert caught.value.retry_after is not None
        leave = await turns.enter(1)
        with pytest.raises(Unavailable):
            await turns.enter(0.01)
        leave()
        assert await turns.enter(0.01)
    assert turns.inside == 0
