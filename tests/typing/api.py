"""Checked by mypy and pyright, not run: the decorators keep the decorated signature."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from typing_extensions import assert_type

import accelerate_tts as tts


@tts.inference
def speak(text: str, *, speed: float = 1.0) -> torch.Tensor:
    return torch.zeros(len(text)) * speed


@tts.inference()
async def speak_async(text: str) -> torch.Tensor:
    return torch.zeros(len(text))


@tts.inference(mode="no_grad")
def stream(text: str) -> Iterator[bytes]:
    yield text.encode()


@tts.inference(concurrency=1, retry=False)
async def stream_async(text: str) -> AsyncIterator[bytes]:
    yield text.encode()


assert_type(speak("a", speed=2.0), torch.Tensor)
assert_type(next(stream("a")), bytes)


async def use() -> None:
    assert_type(await speak_async("a"), torch.Tensor)
    async for chunk in stream_async("a"):
        assert_type(chunk, bytes)


class Backend:
    model: torch.nn.Module

    @tts.optimized_model(warmup="Hello there.")
    def load(self, path: str) -> None:
        self.model = torch.nn.Linear(1, 1)

    @tts.optimized_model(warmup="Hello.", mode="no_grad", precision="balanced", tune_seconds=30, lengths=(10, 300))
    def load_with_options(self, path: str, *, half: bool = False) -> torch.nn.Linear:
        return torch.nn.Linear(1, 1)

    @tts.optimized_model
    async def load_async(self) -> torch.nn.Linear:
        return torch.nn.Linear(1, 1)

    @tts.inference
    def synthesize(self, text: str) -> torch.Tensor:
        return torch.zeros(1)

    @classmethod
    @tts.inference
    def build(cls, size: int) -> Backend:
        return cls()

    @tts.inference
    @staticmethod
    def helper(value: int) -> int:
        return value


class Voices:
    @tts.cached_embedding
    def embed(self, wave: torch.Tensor, *, rate: int = 16000) -> torch.Tensor:
        return wave

    @tts.cached_embedding(limit_mb=64, folder="voices", sets=("conds",), encoder=lambda self: self)
    async def prepare(self, path: Path) -> None:
        self.conds = path


@tts.cached_embedding
def embed_file(path: str) -> list[float]:
    return [float(len(path))]


voices = Voices()
assert_type(voices.embed(torch.zeros(1), rate=8000), torch.Tensor)
assert_type(Voices.embed(voices, torch.zeros(1)), torch.Tensor)
assert_type(voices.embed.cache_info().bytes, int)
assert_type(embed_file("a"), list[float])
embed_file.cache_clear()


async def prepare() -> None:
    assert_type(await voices.prepare(Path("a")), None)


backend = Backend()
assert_type(backend.synthesize("a"), torch.Tensor)
assert_type(Backend.build(1), Backend)
assert_type(Backend.helper(1), int)
backend.load("weights")
assert_type(backend.load_with_options("weights", half=True), torch.nn.Linear)


async def load() -> None:
    assert_type(await backend.load_async(), torch.nn.Linear)


with tts.fast_inference():
    pass
with tts.fast_inference(mode="no_grad"), tts.testing():
    pass

optimizer = tts.get_performance_optimizer()
assert_type(optimizer, tts.PerformanceOptimizer)
assert_type(optimizer.initialize(), torch.device)
assert_type(optimizer.compile_model(torch.nn.Linear(1, 1), "linear"), torch.nn.Linear)
assert_type(optimizer.warmup_model(torch.nn.Linear(1, 1), torch.ones(1, 1)), bool)
assert_type(optimizer.get_optimal_batch_size(default=2), int)
assert_type(optimizer.get_inference_context(), AbstractContextManager[Any])
assert_type(tts.create_inference_context(), AbstractContextManager[Any])
optimizer.cleanup_memory(force=True)
assert_type(optimizer.export_packs("packs.bin"), int)
assert_type(optimizer.load_packs(Path("packs.bin")), int)
assert_type(tts.receipt_of(backend), tts.Receipt | None)
assert_type(tts.carry_mode(speak)("a"), torch.Tensor)


def speak_list(texts: list[str]) -> list[torch.Tensor]:
    return [speak(text) for text in texts]


speak_all = tts.batched(speak_list, limit=4, recover_after=2)
assert_type(speak_all(("a", "b")), list[torch.Tensor])
assert_type(speak_all.stream(["a"]), Iterator[torch.Tensor])
assert_type(speak_all.size, int)


def hook(event: tts.Event) -> None:
    str(event)


assert_type(tts.add_hook(hook), Callable[[], None])

speak(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
speak("a", slow=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
backend.synthesize()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
voices.embed("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
speak_all([1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
tts.batched(speak_list, limit="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
tts.cached_embedding(sets=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
tts.inference(mode="fast")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
tts.optimized_model(precision="quick")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
tts.optimized_model(tune_seconds="30")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
tts.optimized_model(lengths=(1, 2, 3))  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]

try:
    optimizer.load_packs("packs.bin")
except (tts.PackError, tts.ReloadError) as error:
    assert_type(error, tts.PackError | tts.ReloadError)
