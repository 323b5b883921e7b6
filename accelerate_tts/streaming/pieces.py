"""A vocoder that is run on frames as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_tts.inspection.receptive_field import ReceptiveField, Vocoder


class Pieces:
    """Runs a convolutional vocoder on overlapping pieces. The joined samples equal the whole to rounding.

    A sample is made once all frames that it depends on are there, and with all of them; nothing is cross-faded.

    Args:
        vocoder: Takes tensors of shape (1, ..., frames) and returns samples of shape (1, 1, samples).
        field: Its receptive field; `None` to make all samples with the last frames.

    Attributes:
        computed: Samples that the vocoder made at the last `push`, those of the overlap included.
    """

    def __init__(self, vocoder: Vocoder, field: ReceptiveField | None) -> None:
        self._vocoder = vocoder
        self._field = field
        self._held: tuple[Tensor, ...] = ()
        self._before = 0  # frames that are held and whose samples were made
        self.computed = 0

    def push(self, *frames: Tensor, last: bool = False) -> Tensor:
        """Add frames, and return the samples that are final now.

        Args:
            *frames: The next frames, shape (1, ..., frames), and for each further input of the vocoder as many values a
                frame as in every other call.
            last: True if no frames follow.

        Returns:
            The samples after those of the call before, shape (1, 1, samples), perhaps none.
        """
        if self._held:
            frames = tuple(torch.cat(both, dim=-1) for both in zip(self._held, frames, strict=True))
        count, field = frames[0].shape[-1], self._field
        ready = count if last else 0 if field is None else count - field.right
        if ready <= self._before and not (last and count):
            self._held, self.computed = frames, 0
            return frames[0].new_zeros(1, 1, 0)
        samples = self._vocoder(*frames)
        self.computed = samples.shape[-1]
        if field is None:
            self._held = ()
            return samples
        end = samples.shape[-1] if last else ready * field.hop
        samples = samples[..., self._before * field.hop : end]
        unneeded = max(0, ready - field.left)
        # Cloned: a view would keep all frames.
        self._held = () if last else tuple(each[..., unneeded * (each.shape[-1] // count) :].clone() for each in frames)
        self._before = 0 if last else ready - unneeded
        return samples
