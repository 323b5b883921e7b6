"""Checked by mypy and pyright, not run: the decorators keep the decorated signature."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
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


@tts.inference
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


backend = Backend()
assert_type(backend.synthesize("a"), torch.Tensor)
assert_type(Backend.build(1), Backend)
assert_type(Backend.helper(1), int)
backend.load("weights")


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
assert_type(tts.receipt_of(backend), tts.Receipt | None)
assert_type(tts.carry_mode(speak)("a"), torch.Tensor)


def hook(event: tts.Event) -> None:
    str(event)


assert_type(tts.add_hook(hook), Callable[[], None])

speak(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
speak("a", slow=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
backend.synthesize()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
tts.inference(mode="fast")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
