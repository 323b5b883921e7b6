"""transformers' VITS (MMS voices): a spectrogram at once, its sound in pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from accelerate_tts.errors import SettingsError, abridged
from accelerate_tts.streaming.pieces import Pieces
from accelerate_tts.streaming.receptive_field import field_of
from accelerate_tts.streaming.tokens import twin

if TYPE_CHECKING:
    from accelerate_tts.streaming.options import StreamOptions
    from accelerate_tts.streaming.systems import Body


class _Caught(nn.Module):
    """Stands in for the vocoder, and keeps what it is given."""

    given: tuple[Any, ...] = ()

    def forward(self, spectrogram: Tensor, *more: Any) -> Tensor:
        self.given = (spectrogram, *more)
        return spectrogram.new_zeros(1, 1, 1)


def body(model: Any, input_ids: Tensor, *, options: StreamOptions, **forward: Any) -> Body:
    """Return the body of a stream.

    Args:
        model: A `VitsModel`.
        input_ids: Token ids of one text, shape (1, tokens).
        options: How it is streamed. The text is spoken at once.
        **forward: Further arguments of the model's call, such as `speaker_id`.

    Raises:
        SettingsError: `input_ids` is no tensor of one text.
    """
    if not isinstance(input_ids, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise SettingsError(f"stream() takes a tensor of shape (1, tokens), not input_ids={abridged(input_ids)}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:  # noqa: PLR2004 - one text, its tokens
        raise SettingsError(f"stream() takes one text, (1, tokens), not input_ids of shape {tuple(input_ids.shape)}")

    def stream(left: threading.Event) -> Iterator[Tensor]:
        if not input_ids.shape[1]:
            return
        caught = _Caught()
        twin(model, decoder=caught)(input_ids=input_ids.to(model.device), **forward)
        spectrogram, *more = caught.given
        voiced = partial(_voiced, more)
        field, config = field_of(model.decoder, voiced, spectrogram[..., :1]), model.config
        pieces = Pieces(partial(voiced, model.decoder), field)
        ahead = 0 if field is None else field.right
        spoken, begin, count = 0, 0, spectrogram.shape[-1]
        for size in options.sizes(config.sampling_rate / prod(config.upsample_rates)):
            if left.is_set() or begin >= count:
                return
            spoken += size
            end = min(spoken + ahead, count)
            yield pieces.push(spectrogram[..., begin:end], last=end == count)[0].cpu()
            begin = end

    return stream


def _voiced(more: list[Any], vocoder: nn.Module, spectrogram: Tensor) -> Tensor:
    sound: Tensor = vocoder(spectrogram, *more)
    return sound
