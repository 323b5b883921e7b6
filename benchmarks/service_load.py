"""Load test of the example service on this machine: 1 to 32 callers, plain against decorated in one run.

    make service-load                                                     # stores the figures in benchmarks/results
    python benchmarks/service_load.py --callers 1,4 --rounds 1 --seconds 5     # a quick look

Two services are started, one with accelerate_tts switched off. They are asked in turn, so that other programs disturb
both alike. Each text is first spoken alone; under load each streamed answer must have the same bytes. A service has
fewer places than there are callers at most: further requests get 429, and those that had no turn in the service's 60 s
503; both are counted as refused, and made again. The script ends with an error if an answer differs, if a request
fails, or if more requests are inside than there are places.

Run nothing else meanwhile. Needs: pip install 'accelerate_tts[cli,demo,service]' chatterbox-light
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
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
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil

from accelerate_tts.cli.bench.command import Options
from accelerate_tts.cli.bench.measure import Ratio
from accelerate_tts.cli.bench.results import document
from accelerate_tts.device.usage import usage
from accelerate_tts.kernels.library import level
from accelerate_tts.storage.files import write_whole

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = [
    "Good morning.",
    "The quick brown fox jumps over the lazy dog. It does so every day.",
    "How are you? I am fine, thank you.",
    "Please hold the line. Somebody will be with you in a moment. Thank you for your patience.",
]
LONGEST = 300.0  # seconds that a caller tries to get in: 32 callers of a slow model wait for each other
LONGEST_PAUSE = 1.0  # seconds between two tries, however much later the service says


class WrongError(Exception):
    """Something that must hold did not."""


@dataclass
class Load:
    """Answers of one service to some callers, in seconds.

    Attributes:
        firsts: Times until the first bytes with sound.
        totals: Times until the last byte.
        refused: Number of requests that got 429, or 503 for want of a turn.
        inside: Largest number of requests that were inside.
        speech: Seconds of speech.
        took: Duration.
        others: Processor time of other programs, in processors' seconds.
    """

    firsts: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    refused: int = 0
    inside: int = 0
    speech: float = 0.0
    took: float = 0.0
    others: float = 0.0

    @classmethod
    def of(cls, loads: Sequence[Load]) -> Load:
        """Join the loads of several rounds."""
        joined = cls(inside=max(load.inside for load in loads))
        for load in loads:
            joined.firsts += load.firsts
            joined.totals += load.totals
            for name in ("refused", "speech", "took", "others"):
                setattr(joined, name, getattr(joined, name) + getattr(load, name))
        return joined

    def as_dict(self) -> dict[str, Any]:
        first, total = _percentiles(self.firsts), _percentiles(self.totals)
        return {
            "answers": len(self.totals), "refused": self.refused, "most_inside": self.inside,
            "first_p50": first[0], "first_p95": first[1], "total_p50": total[0], "total_p95": total[1],
            "speech_a_second": self.speech / self.took,
        }  # fmt: skip


class Service:
    """A started service."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.serial: dict[tuple[str, str], bytes] = {}
        self.voices: dict[str, str] = {}

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def inside(self) -> int:
        """Return the number of requests in the service now."""
        found = re.search(rb"^tts_requests_inside (\S+)$", self.get("/metrics"), re.MULTILINE)
        return int(float(found[1])) if found else 0

    def speak(self, model: str, text: str) -> tuple[bytes, float, float] | float:
        """Stream an answer.

        Returns:
            Its bytes, the seconds until the first of them, and until the last; for one that was refused, the seconds
            after which to try again.
        """
        body = {
            "model": model, "voice": self.voices[model], "input": text, "response_format": "pcm",
            "stream_format": "audio",
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            begun = time.perf_counter()
            connection.request("POST", "/v1/audio/speech", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read1()
            first = time.perf_counter() - begun
            content += answer.read()
            total = time.perf_counter() - begun
        finally:
            connection.close()
        if answer.status == HTTPStatus.TOO_MANY_REQUESTS or b'"queue_timeout"' in content[:300]:
            return float(answer.headers.get("Retry-After", 1))
        if answer.status != HTTPStatus.OK:
            raise WrongError(f"{self.name} answered {answer.status}: {content[:300]!r}")
        return content, first, total

    def prepare(self) -> None:
        """Speak each text alone, twice."""
        for model in json.loads(self.get("/v1/models"))["data"]:
            self.voices[model["id"]] = model["voices"][0]
            for text in TEXTS:
                alone, again = (self.speak(model["id"], text) for _ in range(2))
                if isinstance(alone, float) or isinstance(again, float) or alone[0] != again[0]:
                    raise WrongError(f"{self.name}, {model['id']}: the same request has another answer")
                self.serial[model["id"], text] = alone[0]


@contextmanager
def started(name: str, arguments: Sequence[str]) -> Iterator[Service]:
    """Start a service, wait until it is ready, and end it with the block."""
    path = os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0", "--folder", folder, *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
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


def load(service: Service, model: str, callers: int, seconds: float, most: int) -> Load:
    """Let callers ask one after the other's answer for some seconds, until each has one."""
    begun, end = time.perf_counter(), time.perf_counter() + seconds
    before, found = (usage().busy, ours()), Load()
    lock = threading.Lock()

    def caller(number: int) -> None:
        answered = 0
        while not answered or time.perf_counter() < end:
            text = TEXTS[(number + answered) % len(TEXTS)]
            answer = service.speak(model, text)
            if isinstance(answer, float):
                with lock:
                    found.refused += 1
                if time.perf_counter() > end + LONGEST:
                    raise WrongError(f"{service.name}, {model}, {callers} callers: no place for a caller")
                time.sleep(min(answer, LONGEST_PAUSE))
                continue
            content, first, total = answer
            if content != service.serial[model, text]:
                raise WrongError(f"{service.name}, {model}, {callers} callers: {text!r} is not what it is alone")
            answered += 1
            with lock:
                found.firsts.append(first)
                found.totals.append(total)
                found.speech += len(content) / 2 / 24_000

    with ThreadPoolExecutor(callers) as pool:
        running = [pool.submit(caller, number) for number in range(callers)]
        while not all(task.done() for task in running):
            found.inside = max(found.inside, service.inside())
            time.sleep(0.2)
        for task in running:
            task.result()
    if found.inside > most:
        raise WrongError(f"{found.inside} requests were inside, of {most} places")
    found.took = time.perf_counter() - begun
    busy, ended = before[0], usage().busy
    if busy is not None and ended is not None:
        found.others = max(0.0, ended - busy - (ours() - before[1]))
    return found


def ours() -> float:
    """Return the processor time of this process and of all under it."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def compared(services: Sequence[Service], model: str, callers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ask both services in turn; return an item of the document's "service"."""
    pairs: list[tuple[Load, Load]] = []
    for number in range(options.rounds):
        order = services if number % 2 == 0 else services[::-1]  # plain, decorated, decorated, plain, ...
        loads = {one.name: load(one, model, callers, options.seconds, options.most) for one in order}
        pairs.append((loads["plain"], loads["decorated"]))
    firsts = [(statistics.median(plain.firsts), statistics.median(decorated.firsts)) for plain, decorated in pairs]
    totals = [(statistics.median(plain.totals), statistics.median(decorated.totals)) for plain, decorated in pairs]
    plain, decorated = (Load.of(loads) for loads in zip(*pairs, strict=True))
    took = plain.took + decorated.took
    return {
        "model": model, "callers": callers, "most": options.most,
        "plain": plain.as_dict(), "decorated": decorated.as_dict(),
        "first": asdict(Ratio.of(firsts)), "total": asdict(Ratio.of(totals)),
        "others": (plain.others + decorated.others) / (took * usage().processors),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it, print a table, and store the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="joe,chatterbox-few-layers")
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--callers", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one model, one service and one number")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two services are asked in turn")
    parser.add_argument("--at-once", type=int, default=1, help="calls that each service computes at the same time")
    parser.add_argument("--most", type=int, default=24, help="places in each service")
    parser.add_argument("--json", type=Path, help="a file for the document")
    parser.add_argument("--into", type=Path, help="the folder of results to store the document in")
    options = parser.parse_args(arguments)
    common = ["--systems", options.systems, "--precisions", options.precision, "--most", str(options.most),
              "--at-once", str(options.at_once)]  # fmt: skip
    items: list[dict[str, Any]] = []
    print(
        "model                callers  service   answers  refused  first p50   p95  total p50   p95  speech/s  others"
    )
    with started("plain", [*common, "--plain"]) as plain, started("decorated", common) as decorated:
        for service in (plain, decorated):
            service.prepare()
        for callers in map(int, options.callers.split(",")):
            for model in plain.voices:
                items.append(compared((plain, decorated), model, callers, options))
                show(items[-1])
    content = {**document([], Options()), "kernels": level(), "service": items}
    content["options"] = {
        "systems": options.systems.split(","), "precisions": [options.precision], "layers": None, "tokens": None,
        "size": "full", "seconds": options.seconds, "rounds": options.rounds, "most": options.most,
        "at_once": options.at_once,
    }  # fmt: skip
    if options.json is not None:
        write_whole(options.json, json.dumps(content, indent=1) + "\n")
    if options.into is not None:
        from record import commit, store

        print(f"wrote {store(content, options.into, commit())}; make figures writes the pages")
    print("each answer was what it is alone; no request failed")


def show(item: dict[str, Any]) -> None:
    for name in ("plain", "decorated"):
        one = item[name]
        print(
            f"{item['model']:<20} {item['callers']:>7}  {name:<9} {one['answers']:>7} {one['refused']:>8}"
            f" {one['first_p50']:>10.3f} {one['first_p95']:>5.2f} {one['total_p50']:>10.3f} {one['total_p95']:>5.2f}"
            f" {one['speech_a_second']:>9.2f} {item['others']:>7.0%}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        main()
    except WrongError as error:
        sys.exit(str(error))
