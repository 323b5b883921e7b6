"""Cost of a repeated reference voice, relative to the first time.

    python benchmarks/embeddings.py [--json FILE]

Run nothing else meanwhile. `resemblyzer` with its real weights embeds 12 s of speech from the files that the
`s3tokenizer` package ships, once as an array and once as a file; XTTS's `get_conditioning_latents` and Chatterbox's
`prepare_conditionals` take it as a file, with seeded weights at full size. Each round changes the audio a little, so
that its first call is a new voice, and then repeats it; a round's figure is the median repeat divided by its first
call. "Stored" answers from the files of an earlier process (`folder=`). Exits with 1 if a repeat out of memory costs
1 % of a first time or more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # webrtcvad's import of pkg_resources

import numpy as np
import s3tokenizer
import soundfile
import torch
from resemblyzer import VoiceEncoder, preprocess_wav

from accelerate_tts import cached_embedding
from accelerate_tts.cli.bench.systems import SYSTEMS
from accelerate_tts.storage.files import write_whole

LIMIT = 0.01
SECONDS = 12
ROUNDS = 15
REPEATS = 20


def speech() -> Any:
    files = sorted(Path(s3tokenizer.__file__).parent.rglob("*.wav"))
    wave = np.concatenate([soundfile.read(file)[0] for file in files]).astype(np.float32)
    return preprocess_wav(np.resize(wave, SECONDS * 16_000), 16_000)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(embed: Callable[[Any], Any], voice: Callable[[int], Any]) -> dict[str, float]:
    firsts, repeats = [], []
    for number in range(ROUNDS):
        asked = voice(number)
        firsts.append(seconds(lambda asked=asked: embed(asked)))
        repeats.append(statistics.median(seconds(lambda asked=asked: embed(asked)) for _ in range(REPEATS)))
    return summary(firsts, repeats)


def summary(firsts: list[float], repeats: list[float]) -> dict[str, float]:
    shares = [repeat / first for first, repeat in zip(firsts, repeats, strict=True)]
    return {
        "first": statistics.median(firsts), "repeat": statistics.median(repeats), "share": statistics.median(shares),
        "low": min(shares), "high": max(shares),
    }  # fmt: skip


def from_files(encoder: VoiceEncoder, wave: Any, folder: Path) -> dict[str, float]:
    def fresh() -> Any:
        return cached_embedding(folder=folder)(encoder.embed_utterance)  # a cache with nothing in memory

    fresh()(wave)  # the weights' digest, once in a process
    firsts = [seconds(lambda n=n: fresh()(wave * (1 - 1e-3 * (n + 1)))) for n in range(ROUNDS)]
    again = [seconds(lambda n=n: fresh()(wave * (1 - 1e-3 * (n + 1)))) for n in range(ROUNDS)]
    return summary(firsts, again)


def xtts_voice() -> Callable[[Path], Any]:
    """XTTS's own method. Its reader of files is replaced: torchaudio's needs FFmpeg's libraries."""
    from TTS.tts.models import xtts

    xtts.load_audio = lambda path, _rate: torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    model = SYSTEMS["xtts"].build("full", None, "cpu").model
    voice = cached_embedding(model.get_conditioning_latents)
    return lambda path: voice(audio_path=[str(path)])


def chatterbox_voice() -> Callable[[Path], Any]:
    """Chatterbox's own method. Its text side is left small: no reference passes through it."""
    from chatterbox.models.s3gen import S3Gen
    from chatterbox.models.voice_encoder import VoiceEncoder as Encoder
    from chatterbox.tts import ChatterboxTTS

    t3 = SYSTEMS["chatterbox"].build("tiny", None, "cpu").model["t3"]
    model = ChatterboxTTS(t3, S3Gen().eval(), Encoder().eval(), None, "cpu")
    return cached_embedding(sets=("conds",))(model.prepare_conditionals)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wave = speech()
    encoder = VoiceEncoder("cpu", verbose=False)
    encoder.embed_utterance(wave)  # torch's own first call

    @cached_embedding
    def from_file(path: Path, encoder: VoiceEncoder) -> Any:
        return encoder.embed_utterance(soundfile.read(path, dtype="float32")[0])

    with tempfile.TemporaryDirectory() as folder:

        def file(number: int) -> Path:
            path = Path(folder) / f"{number}.wav"
            soundfile.write(path, wave * (1 - 1e-3 * number), 16_000)
            return path

        results = {
            "array": measure(cached_embedding(encoder.embed_utterance), lambda n: wave * (1 - 1e-3 * n)),
            "file just written": measure(lambda path: from_file(path, encoder), file),
        }
        from_file.cache_clear()
        time.sleep(2.5)  # from now on the files count as settled
        paths = [Path(folder) / f"{number}.wav" for number in range(ROUNDS)]
        results["file"] = measure(lambda path: from_file(path, encoder), lambda n: paths[n])
        results["stored"] = from_files(encoder, wave, Path(folder) / "voices")
        results["XTTS"] = measure(xtts_voice(), lambda n: paths[n])
        results["Chatterbox"] = measure(chatterbox_voice(), lambda n: paths[n])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    for name, found in results.items():
        print(
            f"{name}: first {1e3 * found['first']:.1f} ms, again {1e3 * found['repeat']:.3f} ms,"
            f" {100 * found['share']:.2f} % ({100 * found['low']:.2f} .. {100 * found['high']:.2f})"
        )
    if options.json:
        write_whole(options.json, json.dumps(results, indent=2))
    dear = [name for name, found in results.items() if name != "stored" and found["share"] >= LIMIT]
    if dear:
        print(f"a repeat costs 1 % or more: {', '.join(dear)}")
    return 1 if dear else 0


if __name__ == "__main__":
    sys.exit(main())
