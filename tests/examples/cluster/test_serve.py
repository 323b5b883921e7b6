"""Replicas on two nodes: more of them while requests wait, and one node is killed while it speaks."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pytest

PORT = 18_431


def ask(text: str, **fields: Any) -> tuple[int, bytes]:
    body = {"model": "loud", "voice": "a", "input": text, "response_format": "pcm", **fields}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/audio/speech", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - of this machine
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def until(condition: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_replicas_follow_the_queue_and_survive_a_node(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from cluster.serve_app import Settings, app

    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings(system="standin:loud", most_replicas=2, waiting=1, patience=0.5)
    serve.start(proxy_location="HeadOnly", http_options={"port": PORT})
    serve.run(app(settings))

    def replicas() -> int:
        states = serve.status().applications["default"].deployments["Speech"].replica_states
        return int(states.get("RUNNING", 0))

    assert replicas() == 1
    words = [f"word{number}" for number in range(12)]
    alone = {word: ask(word) for word in words}
    assert {status for status, _ in alone.values()} == {200}
    assert len({content for _, content in alone.values()}) == len(words)
    streamed = ask("one two three", stream_format="audio")
    assert (streamed[0], len(streamed[1])) == (200, 2 * 24_000 * 3 // 4)
    assert ask("one", voice="nobody")[0] == 400
    assert ask("REFUSE")[0] == 400
    assert ask("one", loudness=3)[0] == 400
    with ThreadPoolExecutor(12) as pool:
        slow = [pool.submit(ask, f"{word} WAIT:1.5") for word in words]
        until(lambda: replicas() == 2, "a second replica, since requests wait")
        assert [task.result()[1] for task in slow] == [alone[word][1] for word in words]

        def again(word: str) -> bytes:
            """Ask as a client does that tries again after an error of the service."""
            for _ in range(40):
                with suppress(OSError):
                    status, content = ask(f"{word} WAIT:0.3")
                    if status == 200:
                        return content
                time.sleep(0.5)
            raise AssertionError(f"{word} was never answered")

        running = [pool.submit(again, word) for word in words]
        cluster.remove_node(cluster.second, allow_graceful=False)
        assert [task.result() for task in running] == [alone[word][1] for word in words]
    serve.shutdown()
    assert np.frombuffer(streamed[1], "<i2").max() > 0
