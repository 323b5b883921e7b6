"""Load test on this machine: 1 to 32 callers, plain against decorated in one run.

    cd examples
    python -m service.load_test --systems joe,chatterbox-random
    python -m service.load_test --callers 1,4 --rounds 1 --seconds 5     # a quick look

Two services are started, one with accelerate_tts switched off. They are asked in turn, so that other programs disturb
both alike. Each text is first spoken alone; under load each answer must have the same bytes. The script ends with an
error if one has not, if a request fails, or if more requests are inside than the service allows.

Needs: pip install 'accelerate_tts[demo,service]'
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

TEXTS = [
    "Good morning.",
    "The quick brown fox jumps over the lazy dog. It does so every day.",
    "How are you? I am fine, thank you.",
    "Please hold the line. Somebody will be with you in a moment. Thank you for your patience.",
]
MOST = 40  # of 32 callers: a place is given up a moment after the last byte, when a caller may be back already


class WrongError(Exception):
    """Something that must hold did not."""


@dataclass(frozen=True)
class Row:
    """One model of one service, with some callers. Times are in seconds."""

    service: str
    model: str
    callers: int
    answers: int
    first_p50: float
    first_p95: float
    total_p50: float
    total_p95: float
    speech_per_second: float


class Service:
    """A started service."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.serial: dict[tuple[str, str], bytes] = {}
        self.voices: dict[str, str] = {}

    def get(self, path: str) -> tuple[int, bytes]:
        """Make a GET request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def inside(self) -> float:
        """The requests in the service now."""
        found = re.search(rb"^tts_requests_inside (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def speak(self, model: str, text: str) -> tuple[bytes, float, float]:
        """Stream an answer. Returns its bytes, the seconds until the first of them, and until the last."""
        body = {
            "model": model, "voice": self.voices[model], "input": text, "response_format": "pcm",
            "stream_format": "audio",
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        begun = time.perf_counter()
        connection.request("POST", "/v1/audio/speech", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read1()
        first = time.perf_counter() - begun
        content += answer.read()
        total = time.perf_counter() - begun
        connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise WrongError(f"{self.name} answered {answer.status}: {content[:300]!r}")
        return content, first, total

    def prepare(self) -> None:
        """Speak each text alone."""
        for model in json.loads(self.get("/v1/models")[1])["data"]:
            self.voices[model["id"]] = model["voices"][0]
            for text in TEXTS:
                alone = self.speak(model["id"], text)[0]
                if self.speak(model["id"], text)[0] != alone:
                    raise WrongError(f"{self.name}, {model['id']}: the same request has another answer")
                self.serial[model["id"], text] = alone


@contextmanager
def started(name: str, arguments: Sequence[str], threads: str | None) -> Iterator[Service]:
    """Start a service, wait until it is ready, and end it with the block."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        environment = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})}
        process = stack.enter_context(subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "service", "--port", "0", "--folder", folder, "--most", str(MOST), *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        ))  # fmt: skip
        stack.callback(process.send_signal, signal.SIGTERM)
        port, lines = None, deque[str](maxlen=50)
        for line in process.stderr or ():
            lines.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                port = int(found[1])
            if "is ready" in line:
                break
        if port is None or process.poll() is not None:
            raise WrongError(f"{name} did not start:\n{''.join(lines)}")
        # Nobody would read its log otherwise, and it would wait for that.
        reader = threading.Thread(target=lines.extend, args=(process.stderr,))
        reader.start()
        try:
            yield Service(name, port)
        finally:
            process.send_signal(signal.SIGTERM)
            reader.join()


def load(service: Service, model: str, callers: int, seconds: float) -> Row:
    """Let callers ask one after the other's answer for some seconds, each at least once."""
    end = time.perf_counter() + seconds
    most_inside = 0.0

    def caller(number: int) -> list[tuple[float, float, int]]:
        taken = []
        while not taken or time.perf_counter() < end:
            text = TEXTS[(number + len(taken)) % len(TEXTS)]
            content, first, total = service.speak(model, text)
            if content != service.serial[model, text]:
                raise WrongError(f"{service.name}, {model}, {callers} callers: {text!r} is not what it is alone")
            taken.append((first, total, len(content)))
        return taken

    begun = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        running = [pool.submit(caller, number) for number in range(callers)]
        while not all(task.done() for task in running):
            most_inside = max(most_inside, service.inside())
            time.sleep(0.2)
        taken = [item for task in running for item in task.result()]
    took = time.perf_counter() - begun
    if most_inside > MOST:
        raise WrongError(f"{most_inside:.0f} requests were inside, of {MOST} allowed")
    firsts, totals, sizes = zip(*taken, strict=True)
    speech = sum(sizes) / 2 / 24_000
    return Row(
        service.name, model, callers, len(taken), *_percentiles(firsts), *_percentiles(totals), speech / took
    )  # fmt: skip


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="joe,chatterbox-random")
    parser.add_argument("--callers", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one model, one service and one number")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two services are asked in turn")
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--threads", help="OMP_NUM_THREADS of both")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args(arguments)
    common = ["--systems", options.systems, "--precisions", options.precision]
    rows: list[Row] = []
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print("service    model              callers answers  first p50   p95   total p50   p95  speech/s")
    with (
        started("plain", [*common, "--plain"], options.threads) as plain,
        started("decorated", common, options.threads) as decorated,
    ):
        services = (plain, decorated)
        for service in services:
            service.prepare()
        for callers in map(int, options.callers.split(",")):
            for model in plain.voices:
                for number in range(2 * options.rounds):
                    # plain, decorated, decorated, plain, ...
                    row = load(services[(number + number // 2) % 2], model, callers, options.seconds)
                    rows.append(row)
                    print(
                        f"{row.service:<10} {row.model:<18} {row.callers:>7} {row.answers:>7} {row.first_p50:>9.2f}"
                        f" {row.first_p95:>6.2f} {row.total_p50:>10.2f} {row.total_p95:>6.2f}"
                        f" {row.speech_per_second:>8.2f}", flush=True,
                    )  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    print("each answer was what it is alone; no request failed")


if __name__ == "__main__":
    try:
        main()
    except WrongError as error:
        sys.exit(str(error))
