"""Slots side by side, so that the recorded steps of several sequences are one step of more rows.

Buffers of all slots are one set of tensors. A step over neighbouring slots computes a token of each of their sequences,
which have positions and masks of their own; it reads the weights once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.stages.decode.static_slot import StaticSlot
from accelerate_tts.stages.decode.static_step import Memory, StaticStep, own_result, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate_tts.stages.decode.static_step import StepKind


COMPARED = 8
"""Number of steps of several that are compared with each one's own, bit by bit, before others are not."""


class Work(NamedTuple):
    """A token of one of several sequences."""

    slot: StaticSlot
    past: Any
    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    stream: Any
    """The stream of the caller's thread."""


class JoinedSlots:
    """Slots side by side, so that the steps of several sequences are one step of more rows, without a copy.

    A step of several computes neighbouring slots. Rows of those that are absent are computed, too; see `ABSENT`.

    Attributes:
        slots: The slots.

    Args:
        kind: The kind of steps, each of which is recorded when it is needed for the first time.
        past: A growable cache, for the shapes of its layers.
        inputs: Tensor arguments of the decoder for one token, without the mask; the first dimension is the batch.
        capacity: Maximum positions.
        lanes: Number of slots, a multiple of the largest of `numbers`.
        numbers: Numbers of slots for which a step of several may be recorded, powers of two, from 1 on.
        differs: Called with a number of slots for which a step differs in bits from each slot's own. It is not used any
            more. `None` if steps are not compared.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a call consists of
        self,
        kind: StepKind,
        past: Any,
        inputs: dict[str, torch.Tensor],
        capacity: int,
        lanes: int,
        numbers: tuple[int, ...],
        differs: Callable[[int], object] | None,
    ) -> None:
        self._kind, self._recorder = kind, kind.recorder
        self._numbers, self._differs = numbers, differs
        with torch.inference_mode(mode=False), torch.no_grad():  # as in a slot
            self._memory = Memory.of_lanes(past, inputs, capacity, lanes)
            self._rows = len(self._memory.position) // lanes
            known = past.layers[0].state()
            self.slots = [
                StaticSlot.of_lane(kind, lane, self._memory.part(lane * self._rows, self._rows), known)
                for lane in range(lanes)
            ]
        self.bytes = sum(slot.bytes for slot in self.slots)
        self._several: dict[tuple[int, int], StaticStep] = {}  # by the number of slots, and the first one's lane
        self._compared: dict[StaticStep, int] = {}  # how often a step was compared

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Run a token of several sequences.

        Returns:
            The decoder's results as `StaticSlot.run` has them, each in memory of its caller's stream.

        Raises:
            Exception: A step cannot be recorded, or has failed. No sequence has grown.
        """
        results: dict[int, Any] = {}
        with torch.inference_mode(mode=False), torch.no_grad():
            lengths = []
            for work in works:
                work.slot.make_way(work.past)
                with self._recorder.in_turn(stream=work.stream):
                    lengths.append(work.slot.enter(work.past, work.inputs, work.mask, work.stream))
            for step, first, here in self._divided([int(work.slot.lane or 0) for work in works]):
                with self._recorder.in_turn():
                    for slot in self.slots[first : first + step.rows // self._rows]:
                        if not any(slot is works[number].slot for number in here):
                            slot.step_aside()
                made = [*self._replayed(step, first, [(works[number], lengths[number]) for number in here])]
                if step.rows > self._rows and self._differs is not None and self._compared.get(step, 0) < COMPARED:
                    alone = []
                    for number in here:
                        slot = works[number].slot
                        alone += self._replayed(slot, int(slot.lane or 0), [(works[number], lengths[number])])
                    if all(map(_same, made, alone)):
                        self._compared[step] = self._compared.get(step, 0) + 1
                    else:
                        made, size = alone, step.rows // self._rows
                        self._numbers = tuple(each for each in self._numbers if each != size)
                        self._differs(size)
                results.update(zip(here, made, strict=True))
        for work in works:
            for layer in work.past.layers:
                layer.advance(1)
        return [results[number] for number in range(len(works))]

    def _replayed(self, step: StaticStep, first: int, works: list[tuple[Work, int]]) -> list[Any]:
        """Run a step; return the results of sequences, whose present lengths are given."""
        with self._recorder.in_turn():
            recording = step.recording()
            _check_rows(recording.outputs, step.rows)
            recording.replay()
        found = []
        for work, length in works:
            row = (int(work.slot.lane or 0) - first) * self._rows
            with self._recorder.in_turn(stream=work.stream):
                found.append(own_result(recording.outputs, work.past, length + 1, slice(row, row + self._rows)))
        return found

    def _divided(self, lanes: list[int]) -> list[tuple[StaticStep, int, list[int]]]:
        """Find the fewest steps for some lanes. Returns each with its first lane, and the places of its lanes here."""
        left, found = list(range(len(lanes))), []
        while left:
            size, first, here = self._largest(lanes, left)
            left = [number for number in left if number not in here]
            found.append((self._of_several(size, first), first, here))
        return found

    def _largest(self, lanes: list[int], left: list[int]) -> tuple[int, int, list[int]]:
        """Return the step for most of the lanes that are left, and of these the smallest."""
        steps = []
        for size in self._numbers:
            for first in sorted({lanes[number] // size * size for number in left}):
                here = [number for number in left if lanes[number] // size * size == first]
                steps.append((len(here), -size, -first, here))
        _, size, first, here = max(steps)
        return -size, -first, here

    def _of_several(self, size: int, first: int) -> StaticStep:
        if size == 1:
            return self.slots[first]
        if (size, first) not in self._several:
            memory = self._memory.part(first * self._rows, size * self._rows)
            self._several[size, first] = StaticStep(self._kind, memory)
        return self._several[size, first]

    def give_up(self) -> None:
        """Wait for all work on the slots so far, which are not used any more. See `StaticSlot.give_up`."""
        for slot in self.slots:
            slot.give_up()


def _check_rows(result: Any, rows: int) -> None:
    """Check that each tensor of a result has these rows.

    Raises:
        ValueError: One has not.
    """
    if not all(tensor.dim() and tensor.shape[0] == rows for tensor in tensors_of(result)):
        raise ValueError("the decoder returns tensors that are not divided into rows")


def _same(one: Any, other: Any) -> bool:
    """Check that two results have the same tensors, a NaN for a NaN."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
