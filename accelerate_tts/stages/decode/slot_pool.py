"""Slots of one decoder: which of them serves a sequence, and how many there are.

A sequence stays in its slot as long as anybody has a tensor of it, so a slot changes hands only when it is free. A call
that finds none free and no room for another one visits a slot that is kept for that: its sequence is copied in for the
token, and stays where it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate_tts.errors import described
from accelerate_tts.events import FellBack, NotApplied, emit
from accelerate_tts.kernels.weight_formats import MOST_ROWS
from accelerate_tts.stages.decode.joined_slots import JoinedSlots
from accelerate_tts.stages.decode.static_slot import StaticSlot, bytes_of
from accelerate_tts.stages.decode.static_step import StepKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from accelerate_tts.patching.change import Counter
    from accelerate_tts.stages.decode.shared_steps import SharedSteps
    from accelerate_tts.stages.decode.token_call import TokenCall
    from accelerate_tts.stages.decode.token_kernels import TokenBlocks
    from accelerate_tts.stages.graphs.recorder import Recorder

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)
"""Capacities of slots, in positions. Each doubles the one before, so a sequence is moved at most five times."""

_NUMBERS = (2, 4, 8)


class Bounds(NamedTuple):
    """Bounds of the slots of one decoder.

    Attributes:
        slots: Maximum sequences in slots of their own. As many kinds of calls may have a slot for visits besides.
        bytes: Maximum bytes of the former, and of the latter. A slot of T3 for 1,024 positions takes half a gigabyte.
        joined: Maximum bytes of slots side by side, where steps are shared; these do not count as slots above.
    """

    slots: int = 4
    bytes: int = 2 << 30
    joined: int = 4 << 30


class Place(NamedTuple):
    """A slot for one token."""

    slot: StaticSlot
    is_visit: bool
    """True if the sequence does not stay there."""


class SlotPool:
    """The slots of one decoder, and the recordings over them. Not for several threads at once.

    Attributes:
        bounds: Their bounds.
        is_broken: True once nothing could be recorded, so that there are no slots any more.
        slots: All slots but those for visits.

    Args:
        decoder: The module.
        counter: Counts recordings.
        stage: The stage's name in events.
        recorder: Makes the recorder of a slot.
        bounds: See above.
        kernels: Kernels for the blocks of a step, or `None`.
        steps: The meeting point of the decoder's steps.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the decoder, names in events, and the options of the stage
        self,
        decoder: Any,
        counter: Counter,
        stage: str,
        recorder: Callable[[torch.device], Recorder],
        bounds: Bounds,
        kernels: TokenBlocks | None,
        steps: SharedSteps,
    ) -> None:
        self._decoder, self._counter, self._stage = decoder, counter, stage
        self._recorder, self.bounds, self._kernels, self._shared = recorder, bounds, kernels, steps
        self.is_broken = False
        self._slots: dict[Any, list[StaticSlot]] = {}  # least recently used first, in each list and among the keys
        self._joined: dict[Any, JoinedSlots] = {}  # by the same keys
        self._visited: dict[Any, StaticSlot] = {}  # likewise, least recently used first
        self._numbers: tuple[int, ...] = (1,)  # numbers of callers for which there are steps
        self._rows = 1  # of their calls
        self._is_told = False

    # --- which calls may share a step ---

    @property
    def shares(self) -> bool:
        """True if there are steps for several callers."""
        return self._numbers[-1] > 1

    def arrange(self, numbers: tuple[int, ...], rows: int) -> None:
        """Make steps for so many callers each, of so many rows. All slots are made anew."""
        self.clear()
        self._numbers, self._rows = numbers, rows

    def may_join(self, call: TokenCall) -> bool:
        """Check that a call may be computed with others."""
        rows = call.rows
        return (
            self._numbers_for(rows)[-1] > 1
            and self._lanes(rows) * bytes_of(call.past, call.capacity) <= self.bounds.joined
            and all(tensor.shape[0] == rows for tensor in call.inputs.values())
        )

    def _numbers_for(self, rows: int) -> tuple[int, ...]:
        """Return the numbers of callers, of so many rows each, for which there are steps."""
        if rows == self._rows or not self.shares:
            return self._numbers
        most = min(MOST_ROWS, self._numbers[-1] * self._rows) // rows
        return (1, *(number for number in _NUMBERS if number <= most))

    def _lanes(self, rows: int) -> int:
        """Return the number of slots side by side, of so many rows each."""
        most = self._numbers_for(rows)[-1]
        return -(-self.bounds.slots // most) * most

    # --- a slot for a call ---

    def capacity_for(self, length: int) -> int | None:
        """Return the capacity of the slot for the next token. Where steps are shared, its last place stays free."""
        free = length + self.shares
        return next((size for size in CAPACITIES if size > free), None)

    def place(self, call: TokenCall, taken: Sequence[StaticSlot] = ()) -> Place | None:
        """Find the slot of a call.

        Args:
            call: The call, whose cache has growing layers.
            taken: Slots that other calls of the same pass come into.

        Returns:
            The slot; `None` if none could be recorded.
        """
        slots = self._slots.pop(call.key, [])
        self._slots[call.key] = slots
        for other in self.slots:
            if other.is_of(call.past) and not (other in slots and other.holds(call.past)):  # cropped, or outgrown
                other.move_out(call.past, call.stream)
        # First the slot that holds the sequence, then a free one, then a new one.
        slot = next((slot for slot in slots if slot.holds(call.past)), None)
        if slot is None:
            slot = next((slot for slot in _by_lane(slots) if slot not in taken and slot.is_free()), None)
        if slot is None and not slots and self.may_join(call) and self._join(call):
            slot = slots[0]
        if slot is not None:
            slots.remove(slot)
        elif call.key in self._joined or not self._make_room(bytes_of(call.past, call.capacity)):
            return self._visit(call)
        else:
            slot = self._recorded(call)
        if slot is None:
            return None
        self._slots.setdefault(call.key, slots).append(slot)
        return Place(slot, is_visit=False)

    def has(self, call: TokenCall) -> bool:
        """Check that the sequence of a call is in a slot."""
        return any(slot.holds(call.past) for slot in self._slots.get(call.key, ()))

    def joined(self, key: Any) -> JoinedSlots:
        """Return the slots side by side for a kind of calls."""
        return self._joined[key]

    def _visit(self, call: TokenCall) -> Place | None:
        if not self._is_told:
            self._is_told = True
            reason = "every slot holds a sequence in use; a token of another sequence copies its cache"
            emit(NotApplied(f"slots of {self._shared.what}", reason))
        slot = self._visited.pop(call.key, None)
        if slot is None:
            size = bytes_of(call.past, call.capacity)
            while self._visited and _is_full([*self._visited.values()], size, self.bounds):
                self._visited.pop(next(iter(self._visited))).give_up()
            slot = self._recorded(call)
        if slot is None:
            return None
        self._visited[call.key] = slot
        return Place(slot, is_visit=True)

    def _recorded(self, call: TokenCall) -> StaticSlot | None:
        try:
            slot = StaticSlot(self._kind(call), call.past, call.inputs, call.capacity)
        except Exception as error:  # a capture may fail in any way, and so may a decoder that is given another mask
            return self._recorded(call) if self.fall_back(error) else None
        self._count(call.capacity, call.shapes())  # now that the slot is whole: an event's hook may call the model
        return slot

    def _kind(self, call: TokenCall) -> StepKind:
        recorder = self._recorder(call.device)
        return StepKind(self._decoder, call.plain.forward, call.constants, recorder, any_rows=self.shares)

    def fall_back(self, error: Exception) -> bool:
        """Give up the kernels after a failure, or else recordings. Returns True if recording can be tried again."""
        reason = described(error).splitlines()[0]
        if self._kernels is not None and self._kernels.give_up(self._decoder):  # a compiler may be missing
            emit(FellBack(self._counter.what, self._stage, f"{reason}; upstream's own step is recorded"))
            return True
        self.is_broken = True
        emit(FellBack(self._counter.what, self._stage, reason))
        return False

    def _count(self, capacity: int, shapes: str) -> None:
        self._counter.guard = f"a sequence of up to {capacity} positions"
        self._counter.count(shapes)

    # --- slots side by side ---

    def _join(self, call: TokenCall) -> bool:
        """Make slots side by side for a kind of calls, if there is room. Returns False if there is none."""
        lanes, size = self._lanes(call.rows), self._lanes(call.rows) * bytes_of(call.past, call.capacity)
        for key, joined in list(self._joined.items()):
            slots = self._slots.get(key, [])
            is_idle = len(slots) == len(joined.slots) and all(slot.is_free() for slot in slots)
            if is_idle and not self._has_room(size):
                joined.give_up()
                del self._joined[key]
                self._slots.pop(key)
        if not self._has_room(size):
            return False
        try:
            kind = self._kind(call)._replace(told=partial(self._count, call.capacity, call.shapes()))
            joined = JoinedSlots(
                kind, call.past, call.inputs, call.capacity, lanes, self._numbers_for(call.rows),
                partial(self._differs, call.capacity) if self._shared.is_on else None,  # the trial compares by itself
            )  # fmt: skip
        except RuntimeError as error:  # the device's memory is used up
            self._shared.is_on, self._numbers = False, (1,)
            emit(NotApplied(f"shared steps of {self._shared.what}", f"no slots for them: {described(error)}"))
            return False
        self._joined[call.key] = joined
        self._slots[call.key].extend(joined.slots)
        return True

    def _has_room(self, more: int) -> bool:
        used = sum(joined.bytes for joined in self._joined.values())
        return len(self._joined) < max(2, self.bounds.slots) and used + more <= self.bounds.joined

    def _differs(self, capacity: int, callers: int) -> None:
        reason = f"for {callers} callers of up to {capacity} positions it differs in bits from each one's own step"
        emit(NotApplied(f"shared steps of {self._shared.what}", reason))

    # --- slots for prompts ---

    def lend(self, capacity: int | None, rows: int, dtype: Any, device: Any) -> tuple[Any, StaticSlot] | None:
        """Take a free slot out of those that others may use, for a prompt. Returns its key, too."""
        for key, slots in reversed(self._slots.items()):
            for slot in slots if key[:2] == (capacity, rows) else []:
                first = slot.buffers[0][0]
                if slot.is_free() and (first.dtype, first.device) == (dtype, device):
                    slots.remove(slot)
                    return key, slot
        return None

    def take_back(self, key: Any, slot: StaticSlot, *, is_stale: bool) -> None:
        """Take such a slot back, or give it up if its recording is stale."""
        if is_stale or not self._make_room(slot.bytes):
            slot.give_up()
        else:
            self._slots.setdefault(key, []).append(slot)

    # --- their number ---

    @property
    def slots(self) -> list[StaticSlot]:
        """All slots but those for visits."""
        return [slot for slots in self._slots.values() for slot in slots]

    def clear(self) -> None:
        """Give up all slots. Sequences in them stay whole."""
        slots = [*self.slots, *self._visited.values()]
        self._slots, self._joined, self._visited = {}, {}, {}
        for slot in slots:
            slot.give_up()
        if self._kernels is not None:
            self._kernels.forget(self._decoder)

    def _make_room(self, more: int) -> bool:
        """Give up free slots, the least recently used first, until one more has room. Returns False if it has none."""
        for key, slots in list(self._slots.items()):
            for slot in list(slots) if key not in self._joined else []:
                if not self._is_full(more):
                    break
                if slot.is_free():
                    slots.remove(slot)
                    slot.give_up()
        self._slots = {key: slots for key, slots in self._slots.items() if slots or key in self._joined}
        return not self._is_full(more)

    def _is_full(self, more: int) -> bool:
        return _is_full([slot for slot in self.slots if slot.lane is None], more, self.bounds)


def _is_full(slots: Sequence[StaticSlot], more: int, bounds: Bounds) -> bool:
    return len(slots) >= bounds.slots or sum(slot.bytes for slot in slots) + more > bounds.bytes


def _by_lane(slots: list[StaticSlot]) -> list[StaticSlot]:
    """Return slots in the order of their lanes, so that those in use are neighbours; others in their own order."""
    return sorted(slots, key=lambda slot: slot.lane or 0)
