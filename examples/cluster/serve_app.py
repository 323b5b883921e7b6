"""Speech from replicas on a cluster, with Ray Serve, in the shape of OpenAI's audio API.

    cd examples
    serve run cluster.serve_app:app system=joe threads=2 most_replicas=8
    curl http://127.0.0.1:8000/v1/audio/speech -H 'Content-Type: application/json' -o out.wav \
      -d '{"model": "joe", "voice": "joe", "input": "Hello there.", "response_format": "wav"}'

A replica is ready when its model is loaded and warm. It takes the warm pack of its machine, or tunes and leaves one. It
speaks one text at a time. The others wait in Serve's queue, whose length decides the number of replicas.

Needs: pip install 'accelerate_tts[demo,service,cluster]'
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from importlib import import_module
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve import Application

from service.api import SpeechRequest
from service.options import KNOWN
from service.problems import Problem, bad_request
from service.sound import FORMATS, encoder
from service.worker import Refused, Speaker, Utterance


class Settings(BaseModel):
    """Arguments of `serve run`, each given as `name=value`.

    Attributes:
        system: One of `service.options.KNOWN`, or `module:function`, which returns a `Speaker`.
        precision: Precision level.
        threads: Processors of a replica.
        gpus: GPUs of a replica, or a share of one.
        least_replicas: Smallest number of replicas.
        most_replicas: Largest number of replicas.
        waiting: Requests for each replica, spoken or waiting, above which there are more replicas.
        most_waiting: Requests that may wait; a further one gets 503.
        patience: Seconds for which it is so before a replica is added. One is taken away after ten times as long.
    """

    system: str = "joe"
    precision: str = "exact"
    threads: int = 1
    gpus: float = 0.0
    least_replicas: int = 1
    most_replicas: int = 4
    waiting: float = 2.0
    most_waiting: int = 64
    patience: float = 10.0


@serve.deployment
class Speech:
    """A replica.

    Args:
        model: Name of the model.
        factory: `module:function` that loads it.
        precision: Precision level.
    """

    def __init__(self, model: str, factory: str, precision: str) -> None:
        module, _, function = factory.partition(":")
        self._model = model
        folder = Path.home() / ".cache" / "accelerate_tts_cluster"
        # It returns when the model is warm, and Serve sends requests only then.
        self._speaker: Speaker = getattr(import_module(module), function)(precision, folder)

    async def __call__(self, request: Request) -> Response:
        """Answer `POST /v1/audio/speech` and `GET /v1/models`."""
        try:
            asked = request.method, request.url.path
            if asked == ("POST", "/v1/audio/speech"):
                return await self._speech(_parsed(await request.body()))
            if asked == ("GET", "/v1/models"):
                return JSONResponse({"object": "list", "data": [self._described()]})
            raise bad_request(f"there is no {' '.join(asked)}", None, None, 404)
        except Problem as problem:
            return problem.response()

    async def _speech(self, wanted: SpeechRequest) -> Response:
        said, form = self._checked(wanted), wanted.response_format
        source = self._encoded(said, form, wanted.seed)
        try:
            first = await anext(source)
        except Refused as error:
            raise bad_request(str(error), error.param, "unspeakable") from error
        if wanted.stream_format is None:
            return Response(b"".join([first, *[piece async for piece in source]]), media_type=FORMATS[form])
        return StreamingResponse(_from(first, source), media_type=FORMATS[form])

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._model, "object": "model", "created": 0, "owned_by": "accelerate_tts",
            "voices": self._speaker.voices, "sampling_rate": self._speaker.rate,
        }  # fmt: skip

    def _checked(self, wanted: SpeechRequest) -> Utterance:
        voice = wanted.voice if isinstance(wanted.voice, str) else wanted.voice.id
        if wanted.model != self._model:
            raise bad_request(f"there is no model {wanted.model!r}; use {self._model}", "model", "model_not_found", 404)
        if voice not in self._speaker.voices:
            known = ", ".join(self._speaker.voices)
            raise bad_request(f"there is no voice {voice!r}; use {known}", "voice", "voice_not_found")
        if wanted.speed != 1.0 and not self._speaker.takes_speed:
            raise bad_request(f"{self._model} has one speed; leave speed out", "speed")
        if wanted.stream_format == "sse":
            raise bad_request("stream_format 'sse' is not served here; use 'audio'", "stream_format")
        if wanted.instructions or wanted.precision:
            raise bad_request("instructions and precision are not served here; leave them out", None)
        return Utterance(wanted.input, voice, speed=wanted.speed, streamed=wanted.stream_format is not None)

    async def _encoded(self, said: Utterance, form: str, seed: int) -> AsyncGenerator[bytes, None]:
        torch = sys.modules.get("torch")  # a system without it needs no seed
        if torch is not None:
            torch.manual_seed(seed)
        made, pieces = encoder(form, self._speaker.rate), self._speaker.stream(said)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield made.add(piece)
            yield made.end()
        finally:
            said.left.set()  # the model stops within one token if the caller has left


def _parsed(body: bytes) -> SpeechRequest:
    try:
        return SpeechRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        raise bad_request(f"{param or 'the body'}: {first['msg']}", param, "invalid_value") from None


async def _from(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for piece in rest:
        yield piece


def app(settings: Settings) -> Application:
    """Return the application for `serve run` and `serve.run`."""
    model = settings.system.partition(":")[2] or settings.system
    return Speech.options(  # type: ignore[no-any-return]
        max_ongoing_requests=1,
        max_queued_requests=settings.most_waiting,
        autoscaling_config={
            "min_replicas": settings.least_replicas, "max_replicas": settings.most_replicas,
            "target_ongoing_requests": settings.waiting, "upscale_delay_s": settings.patience,
            "downscale_delay_s": 10 * settings.patience, "look_back_period_s": max(settings.patience, 11.0),
        },
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus},
        health_check_timeout_s=120.0,  # a token of a busy machine is no reason to replace a replica
        max_constructor_retry_count=3,
    ).bind(model, KNOWN.get(settings.system, settings.system), settings.precision)  # fmt: skip
