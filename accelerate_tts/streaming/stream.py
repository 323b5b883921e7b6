"""Streams of speech: pieces while the rest is still being made."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.errors import ModelError, SettingsError, shown
from accelerate_tts.events import FirstAudio, emit
from accelerate_tts.locks import lock
from accelerate_tts.runtime import inference_mode
from accelerate_tts.runtime.call_end import end_call
from accelerate_tts.runtime.drive import HasBody
from accelerate_tts.streaming.options import StreamOptions
from accelerate_tts.streaming.tokens import Left

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from accelerate_tts.streaming.systems import Body


def stream(model: object, /, *args: Any, options: StreamOptions | None = None, **kwargs: Any) -> Stream:
    """Speak a text in pieces, while the rest is still being made.

    Known are Chatterbox (English, multilingual, turbo), XTTS, Higgs Audio v2 and transformers' VITS (MMS). Tokens come
    from upstream's own loop as it samples them, and vocoders run on overlapping pieces. With a convolutional vocoder
    the joined pieces equal the whole to rounding. Chatterbox's flow looks at the whole sentence, so its sound is made a
    sentence at a time, unless `left_context` is given.

    Nothing is computed before the first piece is asked for. A stream that is left (closed, collected, or its task
    cancelled) stops computing within one token. Any number of streams may run at once. The event `FirstAudio` gives
    the time of the first piece.

    Args:
        model: Upstream's object: `ChatterboxTTS`, `ChatterboxMultilingualTTS`, `ChatterboxTurboTTS`, `Xtts`,
            `HiggsAudioV2ForConditionalGeneration` or `VitsModel`.
        *args: What upstream's own call takes: a text for Chatterbox; a text, language, latents and a speaker's
            embedding for XTTS; inputs (a mapping) and the codec for Higgs; `input_ids` for VITS.
        options: How it is streamed.
        **kwargs: Further arguments of upstream's own call.

    Returns:
        Pieces of shape (1, samples), on the CPU. None for a text without a letter or a digit.

    Raises:
        ModelError: The model is of no known class.
        SettingsError: `options` is no `StreamOptions`.
    """
    from accelerate_tts.streaming.systems import SYSTEMS

    typed = options is None or isinstance(options, StreamOptions)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not typed:  # a caller without types
        raise SettingsError(f"options={shown(options)} must be StreamOptions(...), such as StreamOptions(first=0.2)")
    names = [cls.__name__ for cls in type(model).__mro__]
    name = next((name for name in names if name in SYSTEMS), None)
    if name is None:
        raise ModelError(f"stream() does not know {names[0]}; known are {', '.join(SYSTEMS)}")
    return Stream(name, SYSTEMS[name](model, *args, options=options or StreamOptions(), **kwargs))


class Stream(HasBody, Generator["Tensor", None, None]):
    """Pieces of speech, made one by one; an iterator and an asynchronous one.

    Iterating it asynchronously makes each piece in a thread, and a cancelled task stops it within one token. It can be
    closed from any thread, also while another one waits for a piece.

    Attributes:
        left: Set once the stream was left. The loop stops at its next token.
    """

    _body: Generator[Tensor, None, None]

    def __init__(self, what: str, body: Body) -> None:
        self.left = threading.Event()
        self._second: Stream | None = None
        self._running = lock()
        self._runner: int | None = None
        self._body = inference_mode.call(_timed, (what, body, self.left), {}, "inference")

    def send(self, value: None, /) -> Tensor:
        """Return the next piece."""
        with self._turn():
            piece = self._body.send(value)
        # The body runs in inference mode, whose tensors a caller outside it could not write to.
        return piece.clone() if piece.is_inference() and not torch.is_inference_mode_enabled() else piece

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: object = None,
        traceback: TracebackType | None = None,
        /,
    ) -> Tensor:
        """Raise an exception where the stream waits. See `Generator.throw`."""
        del traceback
        if value is not None:
            kind = value if isinstance(value, BaseException) else kind(value)  # type: ignore[operator]  # a class
        with self._turn():
            return self._body.throw(kind)  # one argument, as Python 3.12 wants it

    @contextmanager
    def _turn(self) -> Generator[None, None, None]:
        """Wait until no other thread runs the body.

        Raises:
            ValueError: This thread runs it already, as in an event's hook. It would wait forever.
        """
        if self._runner == threading.get_ident():
            raise ValueError("this stream is making a piece already; ask for the next one outside of it")
        with self._running:
            try:
                self._runner = threading.get_ident()
                yield
            finally:
                self._runner = None

    def succeeded_by(self, other: object) -> None:
        """See `HasBody.succeeded_by`."""
        if isinstance(other, Stream):
            self._second = other
            if self.left.is_set():  # perhaps before the line above
                other.leave()

    def leave(self) -> None:
        """Stop the loop at its next token, and the stream at its next piece. Does not wait."""
        self.left.set()
        if self._second is not None:
            self._second.leave()

    def close(self) -> None:
        """Stop within one token. Idempotent, and callable from any thread."""
        self.leave()
        if self._running.acquire(blocking=False):  # otherwise a thread waits for a piece, and stops by the flag
            try:
                self._body.close()
            finally:
                self._running.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Tensor]:
        import asyncio

        ended: Any = object()
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, self, ended))
                try:
                    piece = await asyncio.shield(step)
                except asyncio.CancelledError:
                    self.leave()
                    await asyncio.wait({step})  # at most one token
                    if not step.cancelled():
                        step.exception()  # seen
                    raise
                if piece is ended:
                    return
                yield piece
                del piece
        finally:
            self.close()


def _timed(
    what: str, body: Callable[[threading.Event], Iterator[Tensor]], left: threading.Event
) -> Generator[Tensor, None, None]:
    """Run a stream's body, and say when its first piece was there."""
    begun = time.perf_counter()
    first = True
    pieces = body(left)
    try:
        for piece in pieces:
            if left.is_set():
                return
            if not piece.shape[-1]:
                continue
            if first:
                emit(FirstAudio(what, time.perf_counter() - begun, piece.shape[-1]))
                first = False
            yield piece
    except Left:
        return
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
        end_call()
