"""Faults: of the worker, of the load, of callers who leave, and the end of the service."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from serving import Answer, Served, openai, until

Serve = Callable[..., Served]


def is_running(served: Served, number: int = 1) -> None:
    until(lambda: served.service.turns.running == number, "a request has its turn")


def empty(served: Served) -> None:
    until(lambda: served.service.turns.inside == served.service.turns.running == 0, "the service is empty")


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_worker_is_replaced_and_its_request_made_again(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    served.ready()
    text = "one UNTIL:go two"
    alone = served.speak("one two")
    first = served.pid
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(served.speak, text) for _ in range(3)]
        is_running(served)
        os.kill(first, signal.SIGKILL)
        (tmp_path / "go").touch()
        assert [answer.result().content for answer in answers] == [alone.content] * 3
    assert served.pid != first
    assert served.metric("tts_worker_losses_total") == 1
    assert served.metric("tts_requests_retried_total") == 1
    assert gone(first)


def test_a_stream_whose_worker_dies_ends_with_an_error(serve: Serve) -> None:
    served = serve()
    served.ready()
    with served.open("one HANG", stream_format="audio") as answer:
        assert answer.status == 200
        assert answer.read(1000)
        os.kill(served.pid, signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
    events = served.speak("one two DIE three", stream_format="sse").content.decode()
    assert '"speech.audio.delta"' in events
    assert '"worker_lost"' in events
    assert '"speech.audio.done"' not in events
    assert served.speak("one").status == 200
    empty(served)


def test_a_text_that_kills_each_worker_gets_an_error(serve: Serve) -> None:
    served = serve()
    served.ready()
    with ThreadPoolExecutor(2) as pool:
        deadly, other = pool.submit(served.speak, "one DIE"), pool.submit(served.speak, "two")
        assert (deadly.result().status, deadly.result().error["code"]) == (500, "worker_lost")
        assert other.result().status == 200
    assert served.metric("tts_worker_losses_total") == 2
    assert served.speak("DIE-ONCE:mark one").content == served.speak("one").content
    with pytest.raises(openai.InternalServerError):
        served.client.audio.speech.create(model="loud", voice="a", input="RAISE")
    assert "\x1b" not in served.speak("RAISE").error["message"]
    assert served.metric("tts_worker_losses_total") == 3, "an exception is no reason for another process"


def test_a_worker_that_hangs_is_replaced(serve: Serve) -> None:
    served = serve(hang_seconds=1.0)
    served.ready()
    first = served.pid
    assert served.speak("one HANG").error["code"] == "worker_lost"
    served.ready()
    second = served.pid
    assert second != first
    os.kill(second, signal.SIGSTOP)  # it has nothing to do, and does not answer
    until(lambda: served.service.supervisor.pid not in {second, None}, "it is missed")
    assert served.speak("one").status == 200
    third = served.pid
    with served.open("one HANG", stream_format="audio"):
        pass  # nobody waits for it any more
    until(lambda: served.service.supervisor.pid not in {third, None}, "it is noticed all the same")
    assert served.speak("one").status == 200
    assert all(map(gone, (first, second, third)))


@pytest.mark.parametrize("how", [None, "audio", "sse"])
def test_a_client_that_leaves_stops_its_request(serve: Serve, tmp_path: Path, how: str | None) -> None:
    served = serve()
    served.ready()
    connection = served.connection()
    more = {} if how is None else {"stream_format": how}
    body = json.dumps(
        {"model": "loud", "voice": "a", "input": "one NOTE:begun LEFT:told two NOTE:spoken three", **more}
    )
    connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
    until((tmp_path / "begun").exists, "it is spoken")
    waiting = served.connection()  # and one that leaves the queue
    waiting.request("POST", "/v1/audio/speech", body.replace("spoken", "queued"), {"Content-Type": "application/json"})
    until(lambda: served.service.turns.waiting == 1, "one waits")
    waiting.close()
    until(lambda: served.service.turns.waiting == 0, "none waits")
    connection.close()
    empty(served)
    until((tmp_path / "told").exists, "the worker knows it")
    assert served.speak("one").status == 200
    assert not (tmp_path / "spoken").exists()
    assert not (tmp_path / "queued").exists()
    assert served.metric("tts_worker_losses_total") == 0


def test_the_queue_is_bounded(serve: Serve, tmp_path: Path) -> None:
    served = serve(most=3)
    served.ready()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(served.speak, "one UNTIL:go") for _ in range(3)]
        until(lambda: served.service.turns.inside == 3, "it is full")
        refused = served.speak("two")
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            served.client.audio.speech.create(model="loud", voice="a", input="two")
        (tmp_path / "go").touch()
        assert [answer.result().status for answer in answers] == [200] * 3
    patient = served.client.with_options(max_retries=2)
    assert patient.audio.speech.create(model="loud", voice="a", input="two").content


def test_waiting_has_a_limit(serve: Serve, tmp_path: Path) -> None:
    served = serve(queue_seconds=0.1)
    served.ready()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(served.speak, "one UNTIL:go")
        is_running(served)
        late = served.speak("two")
        assert (late.status, late.error["code"]) == (503, "queue_timeout")
        assert "retry-after" in late.headers
        (tmp_path / "go").touch()
        assert long.result().status == 200


def test_speaking_has_a_limit(serve: Serve, tmp_path: Path) -> None:
    served = serve(request_seconds=0.5)
    served.ready()
    long = served.speak("one UNTIL:go two")
    assert (long.status, long.error["code"]) == (504, "timeout")
    empty(served)
    (tmp_path / "go").touch()
    until(lambda: served.speak("one").status == 200, "the next is spoken")
    assert served.metric("tts_worker_losses_total") == 0


@pytest.mark.parametrize("how", [None, "audio"])
def test_a_client_that_does_not_read_is_cut_off_and_holds_nobody_up(serve: Serve, how: str | None) -> None:
    served = serve(send_seconds=1.0)
    served.ready()
    with served.open("x " * 1000, stream_format=how):  # 12 MB, more than the sockets hold
        until(lambda: served.service.turns.running == 0, "the worker is free again")
        assert served.service.turns.inside == 1
        assert served.speak("two").status == 200
        until(lambda: served.service.turns.inside == 0, "it is cut off")


def test_it_is_not_ready_before_its_models_are(serve: Serve) -> None:
    served = serve(systems={"loud": "standin:broken"})
    until(lambda: served.metric("tts_worker_losses_total") == 1, "it could not be loaded")
    ready, spoken = served.get("/ready"), served.speak("one")
    assert (ready.status, served.get("/health").status) == (503, 200)
    assert "died" in ready.json["status"]
    assert (spoken.status, spoken.error["code"]) == (503, "not_ready")
    assert "retry-after" in spoken.headers
    assert served.get("/v1/models").error["code"] == "not_ready"
    assert served.get("/").status == 200


def test_it_is_ready_when_a_slow_load_has_ended(serve: Serve, tmp_path: Path) -> None:
    served = serve(systems={"loud": "standin:late"})
    for _ in range(3):
        ready, spoken = served.get("/ready"), served.speak("one")
        assert (ready.status, served.get("/health").status) == (503, 200)
        assert (spoken.status, spoken.error["code"]) == (503, "not_ready")
        assert served.metric("tts_worker_ready") == 0
    (tmp_path / "loaded").touch()
    served.ready()
    assert served.get("/ready").json == {"status": "ready"}
    assert served.metric("tts_worker_ready") == 1
    assert served.metric("tts_worker_losses_total") == 0
    assert served.speak("one").status == 200


def test_a_stream_is_finished_at_the_end_of_the_service(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    served.ready()
    whole, pid = served.speak("one two"), served.pid
    with served.open("one UNTIL:go two", stream_format="audio") as answer:
        first = answer.read(1000)
        served.server.should_exit = True
        until(lambda: not served.server.servers[0].is_serving(), "nobody is let in any more")
        (tmp_path / "go").touch()
        assert first + answer.read() == whole.content
    served.stop()
    assert gone(pid)


def test_a_stream_that_takes_too_long_is_cut_at_the_end_of_the_service(serve: Serve) -> None:
    served = serve(shutdown_seconds=1)
    served.ready()
    pid = served.pid
    with served.open("one HANG", stream_format="audio") as answer:
        assert answer.read(1000)
        served.stop()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
    assert gone(pid)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_the_worker_ends_with_the_command(tmp_path: Path, sign: int, code: int) -> None:
    here = Path(__file__).parents[3] / "examples"
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "service", "--systems", "loud=standin:loud", "--port", "0"]
    with subprocess.Popen(
        [*command, "--folder", str(tmp_path)], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stderr is not None
        found = None
        for line in process.stderr:
            if found := re.search(r"the worker (\d+) is ready", line):
                break
        assert found is not None
        worker = int(found[1])
        assert not gone(worker)
        process.send_signal(sign)
        process.stderr.read()
        assert process.wait(60) in {code, -sign}
    until(lambda: gone(worker), "the worker ends")


def test_spans_tell_of_each_request(serve: Serve) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason="spans are an option: pip install opentelemetry-sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    served = serve(provider=provider)
    served.ready()
    answers: list[Answer] = [served.speak("one two"), served.speak("RAISE")]
    assert [answer.status for answer in answers] == [200, 500]
    spoken, failed = exporter.get_finished_spans()
    assert dict(spoken.attributes)["tts.model"] == "loud"
    assert {"tts.queue_seconds", "tts.first_audio_seconds", "tts.real_time_factor"} <= set(spoken.attributes)
    assert failed.events[0].name == "exception"
