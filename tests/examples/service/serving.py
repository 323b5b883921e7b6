"""The service in a thread of the test's process, and requests to it. Its tests are skipped where its extra is not."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

for _name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "soundfile", "soxr"):
    pytest.importorskip(_name, reason="the service needs it: pip install 'accelerate_tts[service]'")
openai = pytest.importorskip("openai", reason="the API is tested with its own client: pip install openai")

import uvicorn  # noqa: E402

from service.api import create_app  # noqa: E402
from service.options import Options  # noqa: E402

BOUNDARY = "a-boundary-of-the-tests"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        assert list(self.json) == ["error"], self.content
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


def until(condition: Callable[[], object], what: str = "") -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"it did not happen: {what}"
        time.sleep(0.01)


class Served:
    """A service that listens on a free port."""

    def __init__(self, options: Options, provider: Any = None) -> None:
        self.app = create_app(options, provider)
        self.service = self.app.state.service
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, port=0, log_level="error", timeout_graceful_shutdown=int(options.shutdown_seconds))
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started, "the service starts")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self) -> None:
        until(lambda: self.get("/ready").status == 200, "the service is ready")

    @property
    def pid(self) -> int:
        pid = self.service.supervisor.pid
        assert pid is not None
        return pid

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = self.connection()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, body: Any) -> Answer:
        """Send a body to the speech endpoint."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", "/v1/audio/speech", content, content_type="application/json")

    def speak(self, text: str, **fields: Any) -> Answer:
        return self.post({"model": "loud", "input": text, "voice": "a", "response_format": "pcm", **fields})

    @property
    def client(self) -> Any:
        """OpenAI's own client, which does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @contextmanager
    def open(self, text: str, **fields: Any) -> Iterator[http.client.HTTPResponse]:
        """Send a request and leave its answer to be read."""
        connection = self.connection()
        wanted = {"model": "loud", "input": text, "voice": "a", "response_format": "pcm", **fields}
        connection.request("POST", "/v1/audio/speech", json.dumps(wanted), {"Content-Type": "application/json"})
        try:
            yield connection.getresponse()
        finally:
            connection.close()

    def upload(self, content: bytes, name: str = "Me", file: str = "me.wav") -> Answer:
        part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
        body = (
            f'{part}"name"\r\n\r\n{name}\r\n{part}"audio_sample"; filename="{file}"\r\n'
            "Content-Type: audio/wav\r\n\r\n"
        ).encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()  # fmt: skip
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return self.request("POST", "/v1/audio/voices", body, content_type=kind)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").content.decode().splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line[len(name)] in " {")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def options_of(folder: Path, **changes: Any) -> Options:
    systems = {"loud": "standin:loud", "plain": "standin:plain"}
    return Options(**{"systems": systems, "folder": folder, "shutdown_seconds": 5, "load_seconds": 60, **changes})
