"""Calls of a decoder that a recorded prompt serves: those that begin a sequence in an empty cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.stages.decode.call_args import attention_of
from accelerate_tts.stages.decode.token_call import OWN, POSITIONS, CallReader, Prompt, tensors_in
from accelerate_tts.stages.graphs.recorded_parts import modes_of

if TYPE_CHECKING:
    from collections.abc import Hashable

BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Positions of recorded prompts. A prompt is computed in the next larger one, so at most a third to a half more."""


def bucket_for(length: int) -> int | None:
    """Return the bucket of a prompt, which has at least one position more; `None` if there is none."""
    return next((size for size in BUCKETS if size > length), None)


class PromptCall(NamedTuple):
    """A prompt of one caller that can be computed in a bucket."""

    prompt: Prompt
    """Its rows and length, and its empty cache."""
    inputs: dict[str, torch.Tensor]
    """Tensor arguments besides the cache, the mask and the positions, (rows, length, ...)."""
    constants: dict[str, Any]
    """The other arguments."""
    mask: torch.Tensor | None
    """Attended positions, (rows, length); `None` attends all."""
    positions: torch.Tensor | None
    """Position ids, (1 or rows, length); `None` counts from 0."""
    bucket: int
    """Positions of the recording."""
    key: Hashable
    """Kind of call that one recording serves. It does not depend on the length, but through the bucket."""


class PromptReader(CallReader):
    """Reads a decoder's prompts, and reports why one is not served. See `CallReader`."""

    def recordable(self, named: dict[str, Any]) -> PromptCall | None:
        """Describe a prompt that a recording can serve; return `None` for any other call."""
        prompt = self.prompt(named)
        if prompt is None or not prompt.length or named.get("return_dict") is False:
            return None
        rows, length = prompt.rows, prompt.length
        if self.is_odd(named, rows, length):
            return None
        mask, positions, bucket = named.get("attention_mask"), named.get(POSITIONS), bucket_for(length)
        inputs = {name: tensor for name, tensor in tensors_in(named).items() if name != POSITIONS}
        is_wrong = mask is not None and tuple(mask.shape) != (rows, length)
        if is_wrong or any(tensor.device != prompt.device for tensor in inputs.values()):
            return None  # upstream raises its own error
        if bucket is None:
            self._obstacles.report(f"a prompt has as many positions as the largest bucket, {BUCKETS[-1]}, or more", 0)
            return None
        if positions is not None and (
            positions.dim() != 2  # noqa: PLR2004
            or positions.shape[0] not in {1, rows}
            or positions.shape[1] != length
            or positions.is_floating_point()
        ):
            self._obstacles.report(f"its position ids have the shape {tuple(positions.shape)}", 0)
            return None
        constants = {name: value for name, value in named.items() if name not in {*OWN, *inputs, POSITIONS}}
        config = self._decoder.config
        asked = tuple(getattr(config, f"output_{what}", False) for what in ("attentions", "hidden_states"))
        kinds = tuple((name, tuple(tensor.shape[2:]), tensor.dtype) for name, tensor in inputs.items())
        with torch.inference_mode(mode=False):  # a recording serves callers in either mode
            modes = modes_of(prompt.device.type)
        told = (*sorted(constants.items()), positions is None, *asked, attention_of(config), modes, prompt.device)
        return PromptCall(prompt, inputs, constants, mask, positions, bucket, (rows, bucket, kinds, told))
