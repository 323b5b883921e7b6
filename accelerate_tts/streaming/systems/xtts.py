"""XTTS (coqui-tts): `inference_stream` with a vocoder that does not begin again at each piece."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accelerate_tts.errors import SettingsError, abridged, shown
from accelerate_tts.streaming.pieces import Pieces
from accelerate_tts.streaming.receptive_field import field_of
from accelerate_tts.streaming.shares import shares_of
from accelerate_tts.streaming.systems.turns import in_turn
from accelerate_tts.streaming.tokens import Pulled, Tapped, Tokens, twin

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_tts.streaming.options import StreamOptions
    from accelerate_tts.streaming.shares import Shares
    from accelerate_tts.streaming.systems import Body


def body(  # noqa: C901, PLR0913 - upstream's arguments, and three functions inside
    model: Any,
    text: str,
    language: str,
    gpt_cond_latent: Tensor,
    speaker_embedding: Tensor,
    *,
    options: StreamOptions,
    speed: float = 1.0,
    **generate: Any,
) -> Body:
    """Return the body of a stream. The arguments are those of `Xtts.inference_stream`.

    Args:
        model: An `Xtts`.
        text: The text. Each sentence has at most 400 tokens.
        language: Its language, such as "en".
        gpt_cond_latent: The voice's latents, shape (1, 32, channels).
        speaker_embedding: The speaker's embedding, shape (1, channels, 1).
        options: How it is streamed.
        speed: Ratio of the speech's speed to the model's.
        **generate: Further arguments of `generate`, such as `temperature`.

    Raises:
        SettingsError: The speed is not above 0, or an argument is for upstream's pieces.
    """
    if not speed > 0.0:
        raise SettingsError(f"speed={shown(speed)} must be above 0")
    for name in ("stream_chunk_size", "overlap_wav_len", "enable_text_splitting"):
        if name in generate:
            raise SettingsError(f"{name}= is upstream's; give options=StreamOptions(first=, most=, split=) instead")
    sampling = {"temperature": 0.75, "length_penalty": 1.0, "repetition_penalty": 10.0, "top_k": 50, "top_p": 0.85,
                "do_sample": True, **generate}  # fmt: skip
    device = model.device
    latents, speaker = gpt_cond_latent.to(device), speaker_embedding.to(device)
    language = language.partition("-")[0]

    def begin(left: threading.Event, sentence: str, shares: Shares | None) -> Tokens[Tensor]:
        # What upstream keeps of a text is kept in the model: in a twin, so that streams do not mix.
        gpt = twin(model.gpt, gpt_inference=twin(model.gpt.gpt_inference))

        def sampled() -> Iterator[Tensor]:
            ids = torch.tensor([model.tokenizer.encode(sentence.strip().lower(), lang=language)], dtype=torch.int32)
            if ids.shape[-1] >= model.args.gpt_max_text_tokens:
                limit = model.args.gpt_max_text_tokens
                raise SettingsError(
                    f"XTTS takes fewer than {limit} tokens at once, not {ids.shape[-1]}: {abridged(sentence)}"
                )
            made = gpt.get_generator(
                fake_inputs=gpt.compute_embeddings(latents, ids.to(device)), num_beams=1, num_return_sequences=1,
                output_attentions=False, output_hidden_states=True, return_dict_in_generate=True, **sampling,
            )  # fmt: skip
            for _, latent in made:
                yield latent

        def work(emit: Callable[[Tensor], None]) -> None:
            for latent in sampled():
                emit(latent)

        return Pulled(sampled(), left) if shares is None else Tapped(work, left, ahead=True, shares=shares)

    def stream(left: threading.Event) -> Iterator[Tensor]:
        length = 1.0 / max(speed, 0.05)
        speak = partial(_speak, model, latents.shape[-1], speaker, length, options)
        shares = shares_of(model, token=length / _rate(model.hifigan_decoder)) if options.overlap else None
        yield from in_turn(options.sentences(text), partial(begin, left), speak, shares)

    return stream


def _speak(  # noqa: PLR0913, PLR0917 - bound in `body`
    model: Any,
    width: int,
    speaker: Tensor,
    length: float,
    options: StreamOptions,
    tokens: Tokens[Tensor],
    ended: Callable[[], None],
) -> Iterator[Tensor]:
    decoder = model.hifigan_decoder
    vocoder = decoder.waveform_decoder
    rate = _rate(decoder)
    field = field_of(
        vocoder, partial(_voiced, speaker), torch.zeros(1, width, 1, device=speaker.device, dtype=speaker.dtype)
    )
    pieces = Pieces(partial(_voiced, speaker, vocoder), field)
    # Each frame lies between two latents, and the last ones' may still change. Further tokens are the vocoder's.
    held = max(1, math.ceil(1.0 / length))
    ahead = 0 if field is None else held + math.ceil(field.right / (length * _frames_a_token(decoder)))
    latents: list[Tensor] = []
    spoken = before = 0  # tokens of the pieces so far, frames that the vocoder was given
    for size in options.sizes(rate):
        spoken += size
        latents += tokens.take(spoken + ahead - len(latents))
        if tokens.ended:
            ended()
        if not latents:
            return
        frames = _frames(decoder, latents, length)
        count = frames.shape[-1] if tokens.ended else _frames(decoder, latents[:-held], length).shape[-1]
        wave = pieces.push(frames[..., before:count], last=tokens.ended)[0].cpu()
        tokens.sounded(wave.shape[-1] / decoder.output_sample_rate, pieces.computed / decoder.output_sample_rate)
        yield wave
        before = count
        if tokens.ended:
            return


def _voiced(speaker: Tensor, vocoder: Any, frames: Tensor) -> Tensor:
    sound: Tensor = vocoder(frames, g=speaker)
    return sound


def _rate(decoder: Any) -> float:
    """Return the latents of a second of speech at the model's own speed."""
    rate: float = decoder.input_sample_rate / decoder.ar_mel_length_compression
    return rate


def _frames_a_token(decoder: Any) -> float:
    """Return the vocoder's frames of a latent at the model's own speed."""
    scale: float = decoder.ar_mel_length_compression / decoder.output_hop_length
    return scale * float(decoder.output_sample_rate / decoder.input_sample_rate)


def _frames(decoder: Any, latents: list[Tensor], length: float) -> Tensor:
    """Return the vocoder's input, shape (1, channels, frames), as `HifiDecoder.forward` makes it of all latents."""
    if not latents:
        return torch.zeros(1, 1, 0)
    frames = torch.cat(latents)[None].transpose(1, 2)
    if length != 1.0:
        frames = functional.interpolate(frames, scale_factor=length, mode="linear")
    scale = decoder.ar_mel_length_compression / decoder.output_hop_length
    frames = functional.interpolate(frames, scale_factor=[scale], mode="linear")
    if decoder.output_sample_rate != decoder.input_sample_rate:
        scale = decoder.output_sample_rate / decoder.input_sample_rate
        frames = functional.interpolate(frames, scale_factor=[scale], mode="linear")
    return frames
