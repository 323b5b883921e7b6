"""The web application: OpenAI's audio API, the page, readiness and metrics."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accelerate_tts.errors import printable
from service.figures import Figures
from service.options import Options
from service.problems import Problem, bad_request
from service.references import Reference, References
from service.sound import FORMATS, Encoder, encoder
from service.spans import Spans
from service.supervisor import Supervisor
from service.turns import Turns

T = TypeVar("T")

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_BODY_BYTES = 2**18  # of a request that is no upload; its longest text has 4 bytes a character, or 12 if escaped
_BODY_SECONDS = 30.0
_FORM_BYTES = 2**16  # of an upload's other fields
_PIECE_BYTES = 2**16
_GONE = 499  # a status of logs: the client has left


class Voice(BaseModel):
    """A voice by its id."""

    id: str


class SpeechRequest(BaseModel):
    """Body of `POST /v1/audio/speech`. `precision` and `seed` are additions to OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str
    voice: str | Voice
    instructions: str = ""
    response_format: Literal["mp3", "opus", "wav", "pcm"] = "mp3"
    speed: float = Field(default=1.0, ge=0.25, le=4.0, allow_inf_nan=False)
    stream_format: Literal["audio", "sse"] | None = None
    precision: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)


class ClientLeftError(Exception):
    """The client has closed the connection."""


class _Answer(StreamingResponse):
    """An answer that is cut off after some time. Its source and its place are given up whatever happens.

    Args:
        source: The body, whose first bytes have sound.
        place: What is held until the answer is sent.
        seconds: Longest time of sending.
        begun: Called when the first bytes were sent.
        **options: Those of `StreamingResponse`.
    """

    def __init__(
        self, source: AsyncGenerator[bytes, None], place: ExitStack, seconds: float, begun: Callable[[], None],
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(source, **options)
        self._source = source
        self._place = place
        self._seconds = seconds
        self._begun = begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting = True

        async def noted(message: Message) -> None:
            nonlocal waiting
            await send(message)
            if waiting and message.get("body"):
                waiting = False
                self._begun()

        with self._place:
            try:
                with anyio.move_on_after(self._seconds):
                    await super().__call__(scope, receive, noted)
            finally:
                await self._source.aclose()


class _Service:
    def __init__(self, options: Options, provider: Any) -> None:
        self.options = options
        self.figures = Figures()
        self.turns = Turns(options.at_once, options.most)
        self.supervisor = Supervisor(options, self.figures)
        self.references = References(options)
        self.spans = Spans(provider)
        watch = self.figures.watch
        watch("tts_requests_inside", "Requests waiting, spoken or sent", lambda: self.turns.inside)
        watch("tts_requests_waiting", "Requests that wait for a turn", lambda: self.turns.waiting)
        watch("tts_requests_running", "Requests that are being spoken", lambda: self.turns.running)
        watch("tts_worker_ready", "1 if a worker is ready", lambda: self.supervisor.is_ready)
        watch("tts_worker_memory_bytes", "Resident memory of the worker", lambda: self.supervisor.memory)

    def model(self, name: str) -> dict[str, Any]:
        """Return what is known of a model.

        Raises:
            Problem: There is none of that name, or nothing was loaded yet.
        """
        self.supervisor.check_ready()
        models: dict[str, dict[str, Any]] = self.supervisor.models
        if name not in models:
            raise bad_request(f"there is no model {name!r}; use {_listed(models)}", "model", "model_not_found", 404)
        return models[name]

    def checked(self, wanted: SpeechRequest) -> dict[str, Any]:
        """Return the fields of a request for the worker.

        Raises:
            Problem: A field is wrong.
        """
        model = self.model(wanted.model)
        if not wanted.input.strip():
            raise bad_request("input is empty; send a text", "input", "empty_input")
        if len(wanted.input) > self.options.characters:
            raise bad_request(
                f"input has {len(wanted.input)} characters; send at most {self.options.characters}", "input",
                "string_above_max_length",
            )  # fmt: skip
        voice = wanted.voice if isinstance(wanted.voice, str) else wanted.voice.id
        reference = None if voice in model["voices"] else self.references.path(voice)
        if reference is None and voice not in model["voices"]:
            raise bad_request(
                f"there is no voice {voice!r} for {wanted.model}; use {_listed(model['voices'])}"
                + (", or the id of an uploaded one" if model["takes_references"] else ""), "voice", "voice_not_found",
            )  # fmt: skip
        if reference is not None and not model["takes_references"]:
            raise bad_request(
                f"{wanted.model} does not speak with uploaded voices; use {_listed(model['voices'])}", "voice"
            )
        if wanted.speed != 1.0 and not model["takes_speed"]:
            raise bad_request(f"{wanted.model} has one speed; leave speed out", "speed")
        if wanted.instructions:
            raise bad_request(f"{wanted.model} takes no instructions; leave them out", "instructions")
        precision = wanted.precision or self.options.precisions[0]
        if precision not in self.options.precisions:
            raise bad_request(
                f"precision {precision!r} is not loaded; use {_listed(self.options.precisions)}", "precision"
            )
        return {
            "model": wanted.model, "precision": precision, "text": wanted.input, "speed": wanted.speed,
            "seed": wanted.seed, "streamed": wanted.stream_format is not None,
            "voice": "" if reference else voice, "reference": str(reference) if reference else "",
        }  # fmt: skip

    async def speak(self, fields: dict[str, Any], note: Callable[[str, Any], None]) -> AsyncGenerator[np.ndarray, None]:
        """Yield the speech in pieces: in a turn, and measured. `note` sets an attribute of the request's span."""
        model, rate = fields["model"], self.supervisor.models[fields["model"]]["rate"]
        figures, begun, outcome, samples = self.figures, time.monotonic(), "ok", 0
        try:
            leave = await self.turns.enter(self.options.queue_seconds)
            try:
                turn = time.monotonic()
                figures.queued.labels(model).observe(turn - begun)
                note("tts.queue_seconds", turn - begun)
                made = turn

                def ended() -> None:
                    nonlocal made
                    made = time.monotonic()
                    leave()

                deadline = turn + self.options.request_seconds
                async with aclosing(self.supervisor.speak(fields, deadline=deadline, ended=ended)) as pieces:
                    async for piece in pieces:
                        samples += len(piece)
                        yield piece
                seconds = samples / rate
                figures.speech.labels(model).inc(seconds)
                if seconds:
                    figures.factor.labels(model).observe((made - turn) / seconds)
                    note("tts.real_time_factor", (made - turn) / seconds)
            finally:
                leave()
        except Problem as problem:
            outcome = problem.code or problem.type
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "client_left"
            raise
        except BaseException:
            outcome = "server_error"
            raise
        finally:
            figures.requests.labels(model, outcome).inc()
            figures.seconds.labels(model).observe(time.monotonic() - begun)

    async def answer(self, request: Request, wanted: SpeechRequest) -> Response:
        """Answer a request for speech."""
        arrived, fields = time.monotonic(), self.checked(wanted)
        model = wanted.model
        with ExitStack() as place:  # until the answer is sent
            try:
                place.enter_context(self.turns.place())
            except Problem as problem:
                self.figures.requests.labels(model, problem.code).inc()
                raise
            attributes = {"tts.model": model, "tts.characters": len(wanted.input), "tts.precision": fields["precision"]}
            note = place.enter_context(self.spans.span("speech", **attributes))

            def first_audio() -> None:
                self.figures.first_audio.labels(model).observe(time.monotonic() - arrived)
                note("tts.first_audio_seconds", time.monotonic() - arrived)

            pieces = self.speak(fields, note)
            try:
                kind, headers, source = await self.begin(request, wanted, pieces)
            except BaseException as error:
                await pieces.aclose()
                if isinstance(error, ClientLeftError):
                    return Response(status_code=_GONE)
                raise
            headers["X-First-Audio-Seconds"] = f"{time.monotonic() - arrived:.4f}"
            return _Answer(
                source, place.pop_all(), self.options.send_seconds, first_audio, media_type=kind, headers=headers
            )

    async def begin(
        self, request: Request, wanted: SpeechRequest, pieces: AsyncGenerator[np.ndarray, None]
    ) -> tuple[str, dict[str, str], AsyncGenerator[bytes, None]]:
        """Wait for the first bytes with sound, or for all of them. What fails until then has a status of its own.

        Returns:
            The answer's content type, headers and body.
        """
        form, rate = wanted.response_format, self.supervisor.models[wanted.model]["rate"]
        first = await _unless_left(request, anext(pieces, None))
        if first is None:
            raise bad_request("the model said nothing to the input", "input", "unspeakable")
        if wanted.stream_format is None:
            sound = np.concatenate(await _unless_left(request, _rest(first, pieces)))
            content = await asyncio.to_thread(_encoded, form, rate, sound)
            headers = {"X-Speech-Seconds": f"{len(sound) / rate:.4f}", "Content-Length": str(len(content))}
            return FORMATS[form], headers, _cut(content)
        made = encoder(form, rate)
        encoded = _encoded_pieces(made, first, pieces)
        source = _from(await _unless_left(request, _until_heard(made, encoded)), encoded)
        if wanted.stream_format == "sse":
            return "text/event-stream", {}, _events(source)
        return FORMATS[form], {}, source


def _listed(names: Any) -> str:
    return ", ".join(names)


async def _rest(first: np.ndarray, pieces: AsyncIterator[np.ndarray]) -> list[np.ndarray]:
    return [first, *[piece async for piece in pieces]]


def _encoded(form: str, rate: int, sound: np.ndarray) -> bytes:
    made = encoder(form, rate, len(sound))
    return made.add(sound) + made.end()


async def _cut(content: bytes) -> AsyncGenerator[bytes, None]:
    """Yield an answer in pieces. The server takes the next one when the client has read; one piece it takes at once."""
    for begin in range(0, len(content), _PIECE_BYTES):
        yield content[begin : begin + _PIECE_BYTES]


async def _encoded_pieces(
    made: Encoder, first: np.ndarray, pieces: AsyncGenerator[np.ndarray, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield await asyncio.to_thread(made.add, first)
        async for piece in pieces:
            yield await asyncio.to_thread(made.add, piece)
        yield await asyncio.to_thread(made.end)


async def _until_heard(made: Encoder, encoded: AsyncGenerator[bytes, None]) -> bytes:
    """Return the first bytes up to those with sound. Some formats begin with a head, or hold sound back."""
    content = b""
    while not made.heard and (piece := await anext(encoded, None)) is not None:
        content += piece
    return content


async def _from(begin: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield begin
        async for piece in rest:
            yield piece


async def _events(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Server-sent events of the API: pieces in base64, and an event at the end."""
    async with aclosing(source):
        try:
            async for piece in source:
                if piece:
                    yield _event(type="speech.audio.delta", audio=base64.b64encode(piece).decode("ascii"))
        except Problem as problem:
            yield _event(type="error", **problem.body)
        else:
            usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
            yield _event(type="speech.audio.done", usage=usage)


def _event(**content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode("ascii")


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """Await something, and give it up when the client leaves.

    Raises:
        ClientLeftError: The client has left.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientLeftError
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait({doing, leaving})


class _BodyLimit:
    """Limits the size of bodies, and the time that they take to arrive."""

    def __init__(self, app: ASGIApp, options: Options) -> None:
        self._app = app
        self._upload = options.upload_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._upload if scope["path"] == "/v1/audio/voices" else _BODY_BYTES
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if int(declared) > most:  # the server has checked that it is a number
            await _too_large(most).response()(scope, receive, send)
            return
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), _BODY_SECONDS)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > most:
                raise HTTPException(413, str(_too_large(most)))
            return message

        await self._app(scope, limited, send)


def _too_large(most: int) -> Problem:
    return bad_request(f"the body has more than {most} bytes", None, "too_large", 413)


def create_app(options: Options, tracer_provider: Any = None) -> FastAPI:
    """Make the application. Its worker is started with it, and ended with it.

    Args:
        options: The options.
        tracer_provider: An OpenTelemetry tracer provider, in place of the one that `options.traces` names.
    """
    service = _Service(options, tracer_provider or options.traces)
    supervisor = service.supervisor

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        supervisor.start()
        try:
            yield
        finally:
            await supervisor.close()

    app = FastAPI(title="accelerate_tts speech service", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(_BodyLimit, options=options)
    _add_errors(app)
    _add_speech(app, service)
    _add_voices(app, service)
    _add_operation(app, service)
    _add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(_request: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        return bad_request(str(error.detail), None, None, error.status_code).response()

    @app.exception_handler(Exception)
    async def broken(_request: Request, _error: Exception) -> Response:
        return Problem("the service failed; its log says why").response()


def _add_speech(app: FastAPI, service: _Service) -> None:
    supervisor = service.supervisor

    @app.post("/v1/audio/speech", response_class=Response)
    async def speech(request: Request, wanted: SpeechRequest) -> Response:
        return await service.answer(request, wanted)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        supervisor.check_ready()
        return {"object": "list", "data": [_model(name, service) for name in supervisor.models]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.model(name)
        return _model(name, service)

    @app.get("/v1/models/{name}/receipt")
    async def receipt(name: str, precision: str = "", form: Literal["text", "html"] = "html") -> Response:
        found = service.model(name)["receipts"].get(precision or service.options.precisions[0])
        if found is None:
            raise bad_request(f"{name} has no receipt for this precision", "precision", None, 404)
        return HTMLResponse(found["html"]) if form == "html" else PlainTextResponse(found["text"])


def _add_voices(app: FastAPI, service: _Service) -> None:
    supervisor = service.supervisor

    @app.get("/v1/audio/voices")
    async def voices() -> dict[str, Any]:
        supervisor.check_ready()
        own = [
            {"id": voice, "name": voice, "object": "audio.voice", "model": name}
            for name, found in supervisor.models.items()
            for voice in found["voices"]
        ]
        return {"object": "list", "data": [*own, *map(asdict, service.references.all())]}

    @app.post("/v1/audio/voices")
    async def upload(request: Request) -> dict[str, Any]:
        with service.turns.place():
            return asdict(await received(request))

    async def received(request: Request) -> Reference:
        async with request.form(max_files=1, max_fields=4) as form:
            name, sample = form.get("name"), form.get("audio_sample")
            if not isinstance(name, str):
                raise bad_request("send the voice's name as the form's field 'name'", "name")
            if isinstance(sample, str) or sample is None:
                raise bad_request("send the recording as the form's file 'audio_sample'", "audio_sample")
            return await service.references.add(name, sample.read)

    @app.delete("/v1/audio/voices/{name}")
    async def delete(name: str) -> dict[str, Any]:
        if not service.references.delete(name):
            raise bad_request(f"there is no uploaded voice {name!r}", "voice", "voice_not_found", 404)
        return {"id": name, "object": "audio.voice.deleted", "deleted": True}


def _add_operation(app: FastAPI, service: _Service) -> None:
    supervisor = service.supervisor

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        if supervisor.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": printable(supervisor.trouble)}, 503, {"Retry-After": "5"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    def page(file: str) -> Response:
        return FileResponse(_PAGE / file, headers={"Content-Security-Policy": _POLICY})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/page.{kind}", include_in_schema=False)
    async def part(kind: Literal["js", "css", "svg"]) -> Response:
        return page(f"page.{kind}")


def _model(name: str, service: _Service) -> dict[str, Any]:
    found = service.supervisor.models[name]
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "accelerate_tts", "voices": found["voices"],
        "precisions": service.options.precisions, "sampling_rate": found["rate"],
        "takes_references": found["takes_references"], "takes_speed": found["takes_speed"],
        "receipts": list(found["receipts"]),
    }  # fmt: skip


def _invalid(error: RequestValidationError) -> Problem:
    """Return the API's error for the first of pydantic's."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "json_invalid":
        return bad_request("the body is not JSON", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        return bad_request(f"there is no parameter {param!r}; leave it out", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"the parameter {param!r} is missing", param, "missing_required_parameter")
    return bad_request(f"{param or 'the body'}: {first['msg']}", param, "invalid_value")
