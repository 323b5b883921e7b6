"""Higgs Audio v2 (transformers): codes as `generate` samples them, and its codec in pieces."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.streaming.pieces import Pieces
from accelerate_tts.streaming.receptive_field import field_of
from accelerate_tts.streaming.shares import shares_of
from accelerate_tts.streaming.tokens import Tapped, Tokens, twin

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_tts.streaming.options import StreamOptions
    from accelerate_tts.streaming.systems import Body


def body(model: Any, inputs: Mapping[str, Tensor], codec: Any, *, options: StreamOptions, **generate: Any) -> Body:
    """Return the body of a stream.

    Args:
        model: A `HiggsAudioV2ForConditionalGeneration`.
        inputs: What the processor's `apply_chat_template` returns for one text.
        codec: The `HiggsAudioV2TokenizerModel`.
        options: How it is streamed. The text is spoken at once.
        **generate: Further arguments of `generate`, such as `max_new_tokens`.
    """
    given = {name: value.to(model.device) for name, value in inputs.items()}
    prompt = given["audio_input_ids"].shape[1] if given.get("audio_input_ids") is not None else 0

    def work(emit: Callable[[Tensor], None]) -> Any:
        """Run `generate`. Each step is given the codes of the step before."""
        speaking = twin(model)
        plain = model.forward
        prompted = False

        @functools.wraps(plain)  # `generate` reads its signature
        def heard(*args: Any, **kwargs: Any) -> Any:
            nonlocal prompted
            codes = kwargs.get("audio_input_ids")
            if prompted and codes is not None:
                emit(codes[0, -1])
            prompted = True
            return plain(*args, **kwargs)

        vars(speaking)["forward"] = heard
        made = speaking.generate(**given, **generate)
        return getattr(made, "audio_sequences", made)

    def stream(left: threading.Event) -> Iterator[Tensor]:
        shares = shares_of(model, codec, token=1.0 / _rate(codec)) if options.overlap else None
        ahead = shares is not None and shares.overlaps
        tokens: Tokens[Tensor] = Tapped(work, left, ahead=ahead, shares=shares)
        try:
            pieces = _speak(model.config, codec, options, tokens, prompt)
            yield from pieces if shares is None else shares.lend(pieces)
        finally:
            tokens.close()

    return stream


def _rate(codec: Any) -> float:
    """Return the codes of a second of speech."""
    rate: float = codec.config.sample_rate / codec.config.hop_length
    return rate


def _called(module: Any, x: Tensor) -> Tensor:
    found: Tensor = module(x)
    return found


def _speak(
    config: Any, codec: Any, options: StreamOptions, tokens: Tokens[Tensor], prompt: int
) -> Generator[Tensor, None, None]:
    decoder = codec.acoustic_decoder
    like = torch.zeros(1, codec.config.acoustic_model_config.hidden_size, 1, device=codec.device, dtype=codec.dtype)

    def voiced(codes: Tensor) -> Tensor:
        found: Tensor = codec.decode(codes).audio_values
        return found

    field = field_of(decoder, _called, like)
    pieces = Pieces(voiced, field)
    books, begin_id, end_id = config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id
    rows: list[Tensor] = []
    # Rows after a piece without which its sound is not final: codebook k is k rows behind the first.
    ahead = books - 1 + (0 if field is None else field.right)
    spoken = heard = before = 0
    for size in options.sizes(_rate(codec)):
        spoken += size
        new = tokens.take(spoken + ahead - len(rows))
        heard += len(new)
        if tokens.ended:
            # The last row is not given to any step.
            new += tokens.result[0, prompt + heard :].unbind(0)
        over = tokens.ended
        for row in new:
            if bool((row == begin_id).all()):
                rows.clear()
            elif bool((row == end_id).all()):
                over = True
                break
            else:
                rows.append(row.to(codec.device))
        count = max(before, len(rows) - books + 1)
        if count > before:
            sound = torch.stack([torch.stack(rows[before + k : count + k])[:, k] for k in range(books)])
            wave = pieces.push(sound.clip(0, begin_id - 1)[None], last=over)[0].cpu()
            tokens.sounded(wave.shape[-1] / codec.config.sample_rate, pieces.computed / codec.config.sample_rate)
            yield wave
            before = count
        elif over and before:
            yield pieces.push(rows[0].new_zeros(1, books, 0), last=True)[0].cpu()
        if over:
            return
