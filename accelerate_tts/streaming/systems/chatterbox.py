"""Chatterbox: T3's tokens as upstream's `generate` samples them, and S3Gen in pieces with left context.

S3Gen's flow looks at all tokens of a sentence, so its sound in pieces is not that of the whole. Each piece continues
what was said: its prompt is the end of the reference and of the pieces before, tokens and spectrogram, which is what
the flow is trained to continue. The vocoder after it is convolutional but for its source of sines, whose phase runs on
from piece to piece here.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.events import Lasting, NotApplied, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.streaming.pieces import Pieces
from accelerate_tts.streaming.receptive_field import field_of
from accelerate_tts.streaming.shares import shares_of
from accelerate_tts.streaming.systems.turns import in_turn
from accelerate_tts.streaming.tokens import Reporting, Tapped, Tokens, twin

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_tts.streaming.options import StreamOptions
    from accelerate_tts.streaming.shares import Shares
    from accelerate_tts.streaming.systems import Body

_RATE = 25.0
"""Tokens a second of speech."""
_LOOKAHEAD = 3
"""Tokens after a piece that the flow's encoder convolves with (`pre_lookahead_len`)."""
_lasting = IdentityMap[Lasting]()
"""Events about what holds for all streams of a T3 or an S3Gen."""


class _Made(NamedTuple):
    """Result of upstream's `generate` up to the sound.

    Attributes:
        tokens: All tokens that are spoken, shape (tokens,).
        given: Further arguments of `S3Token2Wav.inference`.
        samples: Samples that upstream keeps of their sound.
    """

    tokens: Tensor
    given: dict[str, Any]
    samples: int


class _Unspoken:
    """Stands in for S3Gen: keeps what it is to speak, and returns silence of the same length."""

    def __init__(self, s3gen: Any) -> None:
        self._s3gen = s3gen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._s3gen, name)

    def inference(self, speech_tokens: Tensor, **given: Any) -> tuple[Tensor, None]:
        self.tokens, self.given = speech_tokens, given
        samples = speech_tokens.shape[-1] * _samples_a_token(self._s3gen)
        return torch.zeros(1, samples, device=speech_tokens.device), None


class _Unmarked:
    """Stands in for the watermarker, which is given the pieces."""

    def apply_watermark(self, wave: Any, **_given: Any) -> Any:
        return wave


def body(model: Any, text: str, *, options: StreamOptions, **generate: Any) -> Body:
    """Return the body of a stream.

    Args:
        model: A `ChatterboxTTS`, `ChatterboxMultilingualTTS` or `ChatterboxTurboTTS`. Its `conds` are left as they are,
            also with `audio_prompt_path`.
        text: The text.
        options: How it is streamed. Without `left_context` a piece is a sentence, as upstream's `generate` speaks it.
        **generate: Further arguments of `generate`, such as `language_id`.
    """

    def begin(voice: _Voice, left: threading.Event, sentence: str, shares: Shares | None) -> Tokens[int]:
        return Tapped(partial(_generate, voice, sentence), left, ahead=shares is not None, shares=shares)

    def stream(left: threading.Event) -> Iterator[Tensor]:
        voice = _Voice(model, dict(generate))
        context = None if options.left_context is None or not _has_parts(model.s3gen) else options.left_context
        speak = (
            partial(_sentence_at_once, voice) if context is None
            else partial(_in_pieces, voice, options, max(1, round(context * _RATE)))
        )  # fmt: skip
        mark, shares = getattr(model, "watermarker", None), None
        if options.overlap:
            way = "sentences" if context is None else "pieces"
            shares = shares_of(model.t3, model.s3gen, token=1.0 / _RATE, way=way)
        for piece in in_turn(options.sentences(text), partial(begin, voice, left), speak, shares):
            if mark is not None and piece.shape[-1]:
                yield torch.from_numpy(mark.apply_watermark(piece[0].numpy(), sample_rate=model.sr))[None]
            else:
                yield piece

    return stream


class _Voice:
    """A copy of upstream's object for one stream: what `generate` changes of the voice is the stream's own."""

    def __init__(self, model: Any, generate: dict[str, Any]) -> None:
        self.model = copy.copy(model)
        self.model.conds = copy.copy(model.conds)
        if getattr(model, "watermarker", None) is not None:
            self.model.watermarker = _Unmarked()
        self.speaking = self.model  # the copy of the sentence that is being made
        self.s3gen = model.s3gen
        self.generate = generate


def _generate(voice: _Voice, sentence: str, heard: Callable[[int], None]) -> _Made:
    """Run upstream's `generate` up to the sound."""
    speaking, t3, unspoken = copy.copy(voice.model), voice.model.t3, _Unspoken(voice.s3gen)
    spoken = voice.s3gen.flow.vocab_size
    sampling = False

    def logits(*_: Any, **__: Any) -> None:
        nonlocal sampling
        sampling = True

    def embedded(tokens: Tensor) -> None:
        # Before the first logits these are the voice's tokens and the start token; then each sampled one.
        if sampling:
            token = int(tokens.flatten()[0])
            if token < spoken:
                heard(token)

    voice.speaking, speaking.s3gen = speaking, unspoken
    speaking.t3 = twin(t3, speech_emb=Reporting(t3.speech_emb, embedded), speech_head=Reporting(t3.speech_head, logits))
    try:
        wave = speaking.generate(sentence, **voice.generate)
    finally:
        voice.model.conds = speaking.conds
    voice.generate.pop("audio_prompt_path", None)  # the voice is the copy's now
    return _Made(unspoken.tokens.flatten(), unspoken.given, wave.shape[-1])


def _sentence_at_once(voice: _Voice, tokens: Tokens[int], ended: Callable[[], None]) -> Iterator[Tensor]:
    while not tokens.ended:
        tokens.take(1000)
    ended()
    made: _Made = tokens.result
    if not len(made.tokens):
        return
    wave, *_ = voice.s3gen.inference(speech_tokens=made.tokens, **made.given)
    wave = wave[:, : made.samples].cpu()
    # The flow reads all of the reference, too.
    prompt = voice.speaking.conds.gen["prompt_token"].shape[-1]
    tokens.sounded(wave.shape[-1] / voice.model.sr, (prompt + len(made.tokens)) / _RATE)
    yield wave


def _in_pieces(
    voice: _Voice, options: StreamOptions, context: int, tokens: Tokens[int], ended: Callable[[], None]
) -> Iterator[Tensor]:
    heard: list[int] = []
    heard += tokens.take(1)  # from here on the voice is there
    sound = SpokenSentence(voice.s3gen, voice.speaking.conds.gen, context)
    before = spoken = sent = 0
    for size in options.sizes(_RATE):
        spoken += size
        end, samples = spoken + sound.ahead, math.inf
        heard += tokens.take(end + _LOOKAHEAD - len(heard))
        if tokens.ended:
            ended()
            made: _Made = tokens.result
            heard = _whole(voice, heard, made.tokens.tolist(), before)
            end, samples = len(heard), made.samples
        wave = sound.push(heard, before, end, last=tokens.ended)
        # Upstream may keep less than the tokens' sound.
        wave = wave[:, : int(min(max(0, samples - sent), wave.shape[-1]))]
        sent += wave.shape[-1]
        wave = wave.cpu()
        tokens.sounded(wave.shape[-1] / voice.model.sr, sound.computed / _RATE)
        yield wave
        before = end
        if tokens.ended:
            return


def _whole(voice: _Voice, heard: list[int], made: list[int], before: int) -> list[int]:
    """Return all tokens of a sentence, of which `before` are spoken already."""
    if made[:before] != heard[:before]:
        reason = "upstream left out tokens after sampling them, and some were spoken already"
        emit(NotApplied(f"the end of a stream of {type(voice.model).__name__}", reason))
        return heard
    if not heard and made:
        reason = "its loop was not heard, perhaps since T3.inference is replaced; a sentence is made at once"
        event = NotApplied(f"streaming of {type(voice.model).__name__}", reason)
        _lasting.setdefault(voice.model.t3, Lasting).emit(event)
    return made


class SpokenSentence:
    """S3Gen for one sentence, in pieces.

    Args:
        s3gen: An `S3Token2Wav`.
        conditions: The voice, as `embed_ref` returns it.
        context: Tokens that the flow sees before a piece.

    Attributes:
        ahead: Tokens that the vocoder needs after a piece.
        computed: Tokens that the flow read for the last piece, its prompt included.
    """

    def __init__(self, s3gen: Any, conditions: dict[str, Any], context: int) -> None:
        self._s3gen, self._context = s3gen, context
        self._embedding = conditions["embedding"]
        tokens, mel = conditions["prompt_token"], conditions["prompt_feat"]
        count = min(tokens.shape[1], mel.shape[1] // 2)
        self._tokens = tokens[:, :count].to(s3gen.device)
        self._mel = mel[:, : 2 * count].to(s3gen.device)
        vocoder = s3gen.mel2wav
        channels, rate = mel.shape[-1], _samples_a_token(s3gen) // 2
        like = torch.zeros(1, channels, 1, device=s3gen.device, dtype=s3gen.dtype)
        self._source = SineSource(vocoder)
        fields = (
            field_of(vocoder, _pitch, like, method="pitch"),
            field_of(vocoder, decode, like, like.new_zeros(1, 1, rate), method="decode"),
        )
        self._pitches, self._waves = (
            Pieces(partial(_pitch, vocoder), fields[0]),
            Pieces(partial(decode, vocoder), fields[1]),
        )
        self.ahead = sum(math.ceil(field.right / 2) for field in fields if field is not None)
        self._waiting = like[..., :0]  # frames without a pitch yet
        self._fade = s3gen.trim_fade
        self.computed = 0

    def push(self, tokens: list[int], begin: int, end: int, *, last: bool) -> Tensor:
        """Speak further tokens, and return the samples that are final now, shape (1, samples).

        Args:
            tokens: All tokens so far, `_LOOKAHEAD` more than are spoken.
            begin: First token to be spoken.
            end: The token after the last.
            last: True if the sentence ends there.
        """
        mel = self._flow(torch.tensor([tokens[begin : end + _LOOKAHEAD]]), end - begin)
        self._waiting = torch.cat([self._waiting, mel], dim=-1)
        pitch = self._pitches.push(mel, last=last)
        count = pitch.shape[-1]
        frames, self._waiting = self._waiting[..., :count], self._waiting[..., count:]
        wave = self._waves.push(frames, self._source(pitch), last=last)[0]
        fade, self._fade = self._fade[: wave.shape[-1]], self._fade[wave.shape[-1] :]
        wave[:, : len(fade)] *= fade
        return wave

    def _flow(self, tokens: Tensor, count: int) -> Tensor:
        """Return the spectrogram of the first `count` tokens, shape (1, channels, 2 * count)."""
        if not count:
            self.computed = 0
            return self._waiting[..., :0]
        context = self._context
        device: torch.device = self._mel.device
        tokens = tokens.to(device)
        prompt, mel = self._tokens[:, -context:], self._mel[:, -2 * context :]
        self.computed = prompt.shape[1] + tokens.shape[1]
        voice = {"prompt_token": prompt, "prompt_token_len": torch.tensor([prompt.shape[1]], device=device),
                 "prompt_feat": mel, "prompt_feat_len": None, "embedding": self._embedding}  # fmt: skip
        whole = self._s3gen.flow_inference(tokens, ref_dict=voice, finalize=True)
        made: Tensor = whole[..., : 2 * count].to(self._s3gen.dtype)
        # What was said is the end of the next prompt.
        self._tokens = torch.cat([prompt, tokens[:, :count]], dim=1)
        self._mel = torch.cat([mel, made.transpose(1, 2)], dim=1)
        return made


class SineSource:
    """HiFT's source, whose sines and noise run on from call to call.

    Upstream's begins at a random phase at each call. The values are those of its `SineGen` and `SourceModuleHnNSF`:
    a harmonic's phase is the sum of its frequencies so far, and noise stands in where there is no pitch.

    Args:
        vocoder: A `HiFTGenerator`.
        seed: Of the phases and the noise; drawn from torch's generator if not given.
    """

    def __init__(self, vocoder: Any, seed: int | None = None) -> None:
        self._vocoder = vocoder
        module, self._device = vocoder.m_source, next(vocoder.parameters()).device
        self._sines = module.l_sin_gen
        # The phase of an hour of sound needs double precision, which Apple's GPUs do not have.
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        number = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        self._generator = torch.Generator(self._device).manual_seed(number)
        count = self._sines.harmonic_num + 1
        self._harmonics = torch.arange(1, count + 1, device=self._device, dtype=self._dtype)[None, :, None]
        phases = torch.rand(1, count, 1, generator=self._generator, device=self._device, dtype=torch.float32)
        self._phases = (2.0 * phases - 1.0) * math.pi
        self._phases[:, 0] = 0.0  # the fundamental's
        self._turns = torch.zeros(1, count, 1, device=self._device, dtype=self._dtype)

    def __call__(self, pitch: Tensor) -> Tensor:
        """Return the source of the next frames.

        Args:
            pitch: Their fundamental frequencies in Hz, shape (1, 1, frames).

        Returns:
            Shape (1, 1, samples).
        """
        sines = self._sines
        if not pitch.shape[-1]:
            return pitch
        frequencies = self._vocoder.f0_upsamp(pitch)
        steps = frequencies.to(self._dtype) * self._harmonics / sines.sampling_rate
        turns = (self._turns + steps.cumsum(dim=-1)) % 1.0
        self._turns = turns[..., -1:]
        waves = sines.sine_amp * torch.sin(2.0 * math.pi * turns.float() + self._phases)
        voiced = (frequencies > sines.voiced_threshold).float()
        loudness = voiced * sines.noise_std + (1.0 - voiced) * sines.sine_amp / 3.0
        # Drawn a sample at a time over all harmonics, so that pieces draw what the whole draws.
        noise = torch.randn(
            waves.shape[-1], waves.shape[1], generator=self._generator, device=self._device, dtype=torch.float32
        )
        mixed = (waves * voiced + loudness * noise.T[None]).transpose(1, 2)
        module = self._vocoder.m_source
        merged: Tensor = module.l_tanh(module.l_linear(mixed.to(pitch.dtype)))
        return merged.transpose(1, 2)


def _pitch(vocoder: Any, mel: Tensor) -> Tensor:
    pitch: Tensor = vocoder.f0_predictor(mel)
    return pitch[:, None]


def decode(vocoder: Any, mel: Tensor, source: Tensor) -> Tensor:
    """Run HiFT on a spectrogram and a source; return samples of shape (1, 1, samples)."""
    wave: Tensor = vocoder.decode(x=mel, s=source)
    return wave[:, None]


def _samples_a_token(s3gen: Any) -> int:
    """Return the samples of one token."""
    samples = int(s3gen.mel2wav.f0_upsamp.scale_factor)  # of a frame
    return samples * int(s3gen.flow.token_mel_ratio)


def _has_parts(s3gen: Any) -> bool:
    """Check for the methods that pieces need; a release without them speaks in sentences, with an event."""
    vocoder = s3gen.mel2wav
    missing = [
        name for owner, name in ((s3gen, "flow_inference"), (s3gen, "trim_fade"), (vocoder, "decode"),
                                 (vocoder, "f0_predictor"), (vocoder, "m_source"))
        if not hasattr(owner, name)
    ]  # fmt: skip
    if missing:
        reason = f"this release of S3Gen has no {', '.join(missing)}; its sound is made a sentence at a time"
        _lasting.setdefault(s3gen, Lasting).emit(NotApplied("left_context of Chatterbox", reason))
    return not missing
