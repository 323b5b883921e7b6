"""An audiobook on a cluster: thousands of sentences, in order, to be continued after a stop.

    cd examples
    python -m cluster.batch book.txt book.wav                              # on this machine, or on RAY_ADDRESS
    python -m cluster.batch book.txt book.wav --system chatterbox --threads 4

A few sentences are a task. Ray runs the tasks on any machine that has the processors for one, and again if their worker
or their machine is lost. What is spoken is kept beside the book, sentence by sentence, so a run that was stopped
continues, and a text that was changed has only its changed sentences spoken again. At the end it says how many hours of
speech an hour and a processor made.

Needs: pip install 'accelerate_tts[demo,cluster]'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import soundfile
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from accelerate_tts.streaming import sentences
from service.joints import PAUSE

if TYPE_CHECKING:
    from service.worker import Speaker

EXAMPLES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Voice:
    """A voice of a worker.

    Attributes:
        system: Factory of a `service.worker.Speaker`, `module:function`.
        precision: Precision level.
        name: Name of its voice; "" for the first one.
        seed: Added to the seed of each sentence.
    """

    system: str
    precision: str = "exact"
    name: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """A run's result.

    Attributes:
        spoken: Number of sentences that this run has spoken.
        kept: Number of sentences that an earlier run had spoken.
        seconds: Seconds of speech that this run has made.
        took: Seconds that it took, with the workers' loads.
    """

    spoken: int
    kept: int
    seconds: float
    took: float


@cache
def speaker_of(system: str, precision: str) -> Speaker:
    """Load a speaker once in a worker process. It takes the warm pack of that machine, if there is one."""
    module, _, function = system.partition(":")
    folder = Path.home() / ".cache" / "accelerate_tts_cluster"
    speaker: Speaker = getattr(import_module(module), function)(precision, folder)
    return speaker


def speak(voice: Voice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """Speak some sentences. Each depends on its text and the voice alone, wherever it is spoken.

    Returns:
        The sampling rate in Hz, and the samples of each sentence, fp32; none for one that cannot be pronounced.
    """
    from service.worker import Refused, Utterance

    speaker = speaker_of(voice.system, voice.precision)
    found = []
    for text in texts:
        torch = sys.modules.get("torch")  # a system without it needs no seed
        if torch is not None:
            torch.manual_seed(int(key_of(voice, text)[:15], 16))
        try:
            pieces = list(speaker.stream(Utterance(text, voice.name or speaker.voices[0])))
        except Refused:
            pieces = []
        found.append(np.concatenate([np.zeros(0, np.float32), *pieces]))
    return speaker.rate, found


def key_of(voice: Voice, text: str) -> str:
    """Return the name of a sentence's file: a digest of all that it depends on."""
    return hashlib.sha256(json.dumps([asdict(voice), text]).encode()).hexdigest()[:32]


def make(  # noqa: PLR0913 - the book, and how its work is divided
    text: str,
    folder: Path,
    voice: Voice,
    *,
    threads: int = 1,
    together: int = 4,
    ahead: int = 64,
    heard: Callable[[int, int], object] | None = None,
) -> Made:
    """Speak all sentences of a text that are not in the folder yet.

    Ray must be started. A task that is lost is made again, on another machine if need be. The first task runs alone.

    Args:
        text: The text.
        folder: Folder of the sentences, each a WAV file under its own name.
        voice: What speaks.
        threads: Processors of a task.
        together: Sentences of a task. What is lost with a worker is at most one task's.
        ahead: Largest number of tasks that are waiting or running.
        heard: Called at the beginning and after each task with the number of sentences that are done, and of all.

    Raises:
        ray.exceptions.RayTaskError: The model raised an exception.
    """
    begun, seconds = time.perf_counter(), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    said = sentences(text)
    missing = [one for one in dict.fromkeys(said) if not (folder / f"{key_of(voice, one)}.wav").exists()]
    known = len(dict.fromkeys(said))
    task = ray.remote(speak).options(num_cpus=threads, max_retries=-1)
    work = iter([missing[begin : begin + together] for begin in range(0, len(missing), together)])
    running: dict[Any, list[str]] = {}
    done = known - len(missing)
    if heard is not None:
        heard(done, known)
    room = 1  # the first worker may tune, and leave a warm pack; others that tune meanwhile would disturb it
    while True:
        while len(running) < room and (some := next(work, None)) is not None:
            running[task.remote(voice, some)] = some
        if not running:
            return Made(len(missing), known - len(missing), seconds, time.perf_counter() - begun)
        ready, _ = ray.wait(list(running))
        room = ahead
        for one in ready:
            rate, sounds = ray.get(one)  # made again if the machine that had it is lost
            for sentence, sound in zip(running.pop(one), sounds, strict=True):
                _write(folder / f"{key_of(voice, sentence)}.wav", sound, rate)
                seconds += len(sound) / rate
                done += 1
            if heard is not None:
                heard(done, known)


def _write(path: Path, sound: np.ndarray, rate: int) -> None:
    """Write a file that is there whole or not at all."""
    made = path.with_suffix(".part")
    soundfile.write(made, np.clip(sound, -1, 1), rate, format="WAV", subtype="PCM_16")
    made.replace(path)


def bind(text: str, folder: Path, voice: Voice, book: Path) -> float:
    """Join the sentences of a text in their order to one WAV file. Returns its seconds."""
    files = [folder / f"{key_of(voice, one)}.wav" for one in sentences(text)]
    rate = soundfile.info(files[0]).samplerate
    made = book.with_suffix(".part")
    with soundfile.SoundFile(made, "w", rate, 1, subtype="PCM_16", format="WAV") as file:
        for number, path in enumerate(files):
            sound = soundfile.read(path, dtype="int16")[0]
            if number and len(sound):
                file.write(np.zeros(int(PAUSE * rate), np.int16))
            file.write(sound)
        seconds = len(file) / rate
    made.replace(book)
    return float(seconds)


def started(address: str | None) -> None:
    """Start Ray on this machine, or join a cluster; its workers get this folder's modules."""
    alone = {} if address or os.environ.get("RAY_ADDRESS") else {"_node_ip_address": "127.0.0.1"}
    ray.init(address=address, runtime_env={"working_dir": str(EXAMPLES)}, log_to_driver=False, **alone)


def shown(progress: Progress) -> Callable[[int, int], None]:
    """Return a function that shows how many sentences are done."""
    bar = progress.add_task("sentences", total=None)
    return lambda done, count: progress.update(bar, completed=done, total=count)


def columns() -> Iterator[Any]:
    """Columns of the bar: sentences that are done, and the time that is left."""
    yield from (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())


def main(arguments: Sequence[str] | None = None) -> None:
    """Speak a book."""
    from service.options import KNOWN

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("book", type=Path, help="the WAV file to write; the sentences are kept in a folder beside it")
    parser.add_argument("--system", default="joe", help=f"one of {', '.join(KNOWN)}, or MODULE:FUNCTION")
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--voice", default="", help="the system's first one if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="processors of a task")
    parser.add_argument("--together", type=int, default=4, help="sentences of a task")
    parser.add_argument("--address", help="of a running cluster; RAY_ADDRESS, or a new one on this machine")
    options = parser.parse_args(arguments)
    text, folder = options.text.read_text("utf-8"), options.book.with_suffix(".sentences")
    voice = Voice(KNOWN.get(options.system, options.system), options.precision, options.voice, options.seed)
    started(options.address)
    processors = ray.cluster_resources().get("CPU", 1.0)
    with Progress(*columns()) as progress:
        made = make(
            text, folder, voice, threads=options.threads, together=options.together, heard=shown(progress)
        )  # fmt: skip
    seconds = bind(text, folder, voice, options.book)
    print(f"{options.book}: {seconds:.1f} s; {made.spoken} sentences spoken, {made.kept} were there")
    if made.spoken:
        rate = made.seconds / made.took
        print(f"{rate:.2f} hours of speech an hour, {rate / processors:.2f} an hour and processor of {processors:.0f}")


if __name__ == "__main__":
    # Under its own name, by which workers find `speak` and keep their speaker.
    import_module("cluster.batch").main()
