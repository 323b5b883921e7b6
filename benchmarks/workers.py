"""Hours of speech an hour and processor that `examples/cluster` makes, by the number of threads a worker has.

    python benchmarks/workers.py [--systems joe] [--threads 1,2] [--sentences 48] [--rounds 3]
        [--into benchmarks/results]

Run nothing else meanwhile. Each number of threads has its own cluster on this machine, with as many workers as
processors allow; clusters take turns, one after the other. Workers are loaded and warm before the clock starts, and
each round speaks sentences that were not spoken before.

Needs: pip install 'accelerate_tts[cli,demo,service,cluster]'
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from service_load import ours

from accelerate_tts.cli.bench.command import Options
from accelerate_tts.cli.bench.results import document
from accelerate_tts.device.usage import usage
from accelerate_tts.kernels.library import level
from accelerate_tts.storage.files import write_whole

SENTENCES = (
    "On page {n} the quick brown fox jumps over the lazy dog.",
    "There were {n} of them, and nobody had asked how they came to be there.",
    "It was {n} minutes past the hour when the train left without a sound.",
    "Please wait for number {n}, and then come to the desk on your left.",
)


def text_of(first: int, count: int) -> str:
    """Return different sentences of like lengths."""
    return " ".join(SENTENCES[n % len(SENTENCES)].format(n=n) for n in range(first, first + count))


def spoken(system: str, precision: str, threads: int, sentences: int, number: int) -> tuple[float, float]:
    """Start a cluster, warm its workers, and speak.

    Args:
        system: A name that the service knows, or `module:function`.
        precision: The precision level.
        threads: Threads of a worker.
        sentences: How many are spoken.
        number: Of the round, which has sentences of its own.

    Returns:
        Seconds of speech a second, and the share of the processors that other programs used meanwhile.
    """
    import ray

    from cluster.batch import Voice, make, started
    from service.options import KNOWN

    started(None)
    try:
        workers = max(1, int(ray.cluster_resources().get("CPU", 1.0)) // threads)
        voice = Voice(KNOWN.get(system, system), precision)
        with tempfile.TemporaryDirectory() as folder:
            make(text_of(9000, 4 * workers), Path(folder), voice, threads=threads, together=1)
            before = usage().busy, ours()
            made = make(text_of(1000 + number * sentences, sentences), Path(folder), voice, threads=threads)
            after = usage().busy, ours()
    finally:
        ray.shutdown()
    spent = 0.0 if before[0] is None or after[0] is None else after[0] - before[0] - (after[1] - before[1])
    return made.seconds / made.took, max(0.0, spent / made.took / usage().processors)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it, print a table, and store the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="joe")
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--threads", default="1,2", help="of a worker; the numbers take turns")
    parser.add_argument("--sentences", type=int, default=48, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a file for the document")
    parser.add_argument("--into", type=Path, help="the folder of results to store the document in")
    options = parser.parse_args(arguments)
    every = [int(number) for number in options.threads.split(",")]
    items: list[dict[str, Any]] = []
    print("system               threads  workers  speech/s   lowest  highest  an hour and processor  others")
    for system in options.systems.split(","):
        found: dict[int, list[tuple[float, float]]] = {threads: [] for threads in every}
        for number in range(options.rounds):
            for threads in every if number % 2 == 0 else every[::-1]:
                found[threads].append(spoken(system, options.precision, threads, options.sentences, number))
        for threads, rounds in found.items():
            processors, rates = usage().processors, [rate for rate, _ in rounds]
            items.append({
                "system": system, "precision": options.precision, "threads": threads,
                "workers": max(1, processors // threads), "processors": processors,
                "rate": statistics.median(rates), "lowest": min(rates), "highest": max(rates), "rounds": len(rates),
                "others": max(others for _, others in rounds),
            })  # fmt: skip
            show(items[-1])
    content = {**document([], Options()), "kernels": level(), "cluster": items}
    content["options"] = {
        "systems": options.systems.split(","), "precisions": [options.precision], "layers": None, "tokens": None,
        "size": "full", "sentences": options.sentences, "rounds": options.rounds,
    }  # fmt: skip
    if options.json is not None:
        write_whole(options.json, json.dumps(content, indent=1) + "\n")
    if options.into is not None:
        from record import commit, store

        print(f"wrote {store(content, options.into, commit())}; make figures writes the pages")


def show(item: dict[str, Any]) -> None:
    print(
        f"{item['system']:<20} {item['threads']:>7} {item['workers']:>8} {item['rate']:>9.2f} {item['lowest']:>8.2f}"
        f" {item['highest']:>8.2f} {item['rate'] / item['processors']:>22.2f} {item['others']:>7.0%}", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
