"""`PerformanceOptimizer`, the one shared engine behind the decorators, and its process-wide accessor."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.device import detect, flags, memory, setup
from accelerate_tts.errors import ModelError, PackError, SettingsError, shown
from accelerate_tts.events import FellBack, NotApplied, Prepared, Warmed, WarmupFailed, emit
from accelerate_tts.lifecycle import LoadedObjects
from accelerate_tts.locks import lock, rlock
from accelerate_tts.runtime import inference_mode
from accelerate_tts.settings import Settings, is_active, is_path

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from accelerate_tts.receipts.receipt import Receipt
    from accelerate_tts.tuning.findings import Tuning
    from accelerate_tts.tuning.load_request import LoadRequest
    from accelerate_tts.tuning.reload import Again

__all__ = ["PerformanceOptimizer", "create_inference_context", "get_performance_optimizer", "receipt_of"]

T = TypeVar("T")

# A batch never takes more than this share of what is free: fragmentation and the next request need the rest.
_BATCH_SHARE = 0.8


class PerformanceOptimizer:
    """Detects the device, makes it ready, and optimises and warms up models on it.

    Every method may be called from any thread. `initialize()` is called by those that need it.

    Args:
        settings: Options; read from the environment if not given.

    Raises:
        SettingsError: An environment variable has a value that means nothing.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = Settings.from_environment() if settings is None else settings
        self._lock = rlock()
        self._device: detect.DeviceInfo | None = None
        self._hold: flags.Hold | None = None
        self._loaded = LoadedObjects(self.settings, self._ready, partial(self.cleanup_memory, force=True))

    # --- device ----------------------------------------------------------------------------------------------

    def initialize(self) -> torch.device:
        """Detect the device and apply its set-up, once; later calls return the same device.

        CUDA and ROCm: TF32 for matrix products and cuDNN, cuDNN autotune. MPS: the fallback and watermark
        variables. Everywhere: CPU threads that fit affinity, quota and `settings.workers`. A variable that the
        user has set is left alone. `close()` puts everything back.

        Raises:
            SettingsError: `settings.device` is not available on this machine.
        """
        import torch

        return torch.device(self._ready().type)

    @property
    def device(self) -> detect.DeviceInfo:
        """The detected device in detail; initializes if need be."""
        return self._ready()

    def _ready(self) -> detect.DeviceInfo:
        if self._device is not None:
            return self._device
        with self._lock:
            if self._device is None:
                device = detect.detect(self.settings.device)
                self._hold = flags.hold(setup.setup_flags(device, self.settings))
                self._device = device
                emit(Prepared(f"{device.kind} ({device.name})", tuple(f.name for f in self._hold.flags)))
            return self._device

    def close(self) -> None:
        """Put back every flag and variable that `initialize()` changed. Models stay as they are."""
        with self._lock:
            if self._hold is not None:
                self._hold.release()
            self._hold = self._device = None

    def call_flags(self) -> list[tuple[flags.Flag, Any]]:
        """The process-wide flags that a `fast_inference()` scope holds on this device. Sets nothing itself."""
        return setup.call_flags(self._device or detect.detect(self.settings.device), self.settings)

    # --- models ----------------------------------------------------------------------------------------------

    def compile_model(self, model: T, model_name: str, warmup_input: Any = None) -> T:
        """Compile a module in place with the mode of the device, and warm it up if an input is given.

        Compiling happens at the first call. If the compiler fails there, the module goes on untouched and a
        `FellBack` event says why; so too if a warm-up shows that nothing was compiled. Lengths are dynamic, but some
        operations divide them into ranges: warm up with a short and a long input. After a warm-up each further
        compilation is a `Recompiled` event.

        Args:
            model: A `torch.nn.Module`. It keeps its class, state dict and pickling.
            model_name: Its name in events.
            warmup_input: As for `warmup_model`.

        Returns:
            `model` itself, compiled or not. Not tried on MPS, or where `settings.compile` is off.

        Raises:
            ModelError: `model` is no `torch.nn.Module`.
        """
        from torch import nn

        if not isinstance(model, nn.Module):
            raise ModelError(
                f"compile_model() needs a torch.nn.Module as {shown(model_name)}, got a {type(model).__name__};"
                " for a pipeline object give one of its modules, or use @optimized_model"
            )
        mode = setup.compile_mode(self._ready(), self.settings)
        if mode is None or not is_active():
            why = "switched off" if not (is_active() and self.settings.compile) else "not tried on MPS"
            emit(NotApplied(f"torch.compile of {model_name}", why))
            return model
        from accelerate_tts.stages.compile.whole import CompiledCall

        with self._lock:
            if model._compiled_call_impl is not None:
                return model
            try:
                change = CompiledCall(model, model_name, mode)
            except Exception as error:  # a torch without its compiler (a cut-down build) fails here
                emit(FellBack(model_name, "torch.compile", f"{type(error).__name__}: {error}"))
                return model
            change.on()
            if warmup_input is not None and self.warmup_model(model, warmup_input):
                if change.graphs == 0:
                    change.off()
                    emit(FellBack(model_name, "torch.compile", "it compiled no graph at all"))
                change.seal()
        return model

    def warmup_model(self, model: Any, warmup_input: Any) -> bool:
        """Run a model once, in inference mode, so that its first real call is warm.

        The user's random state is as before afterwards. Where a CUDA graph has to be recorded, the pass is made
        three times.

        Args:
            model: A module, or any object that `@optimized_model` takes.
            warmup_input: A tensor, a tuple of arguments, a mapping of keyword arguments, a text, a callable of the
                model, or a list of these, each run in turn. Tensors are moved to the module's device.

        Returns:
            True if it ran; False if it raised, with a `WarmupFailed` event that says what.

        Raises:
            WarmupError: `warmup_input` is none of these.
        """
        from accelerate_tts.runtime.seeding import seeded
        from accelerate_tts.tuning.load_request import LoadRequest
        from accelerate_tts.tuning.warmup import CUDA_GRAPH_PASSES, Loaded

        device = self._ready()
        calls = LoadRequest(warmup_input, loaded=Loaded(model)).calls(self.settings.warmup_timeout).main
        name = type(model).__name__
        captures = setup.compile_mode(device, self.settings) in {"reduce-overhead", "max-autotune"}
        start = time.perf_counter()
        try:
            for _ in range(CUDA_GRAPH_PASSES if device.type == "cuda" and captures else 1):
                with seeded(device.type):
                    for call in calls:
                        call.run()
                        if call.variant is not None and _is_compiled(model):
                            call.variant()
        except Exception as error:  # whatever the model raises: the contract is a bool, and the event has the reason
            emit(WarmupFailed(name, f"{type(error).__name__}: {error}"))
            return False
        emit(Warmed(name, time.perf_counter() - start))
        return True

    def optimize(self, request: LoadRequest) -> Receipt | None:
        """Tune, verify and warm up what a load function left behind; what `@optimized_model` does.

        One tuning runs at a time in a process. A module that is tuned already keeps its tuning; an object that is new
        around it is warmed up only. A warm pack of the same object takes the place of tuning.

        Args:
            request: What was loaded, and what is asked for it.

        Returns:
            The receipt, or `None` if what was loaded holds no module, or if waiting for another tuning would wait for
            ever.

        Raises:
            WarmupError: The warm-up does not fit what was loaded.
        """
        return self._loaded.optimize(request)

    def remembered(
        self, function: Callable[..., Any], owner: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Again | None:
        """Remember what calling a load function again takes, before it is called. `None` where no need is."""
        if self.settings.guard_weights != "reload":
            return None
        from accelerate_tts.tuning.reload import remembered

        return remembered(function, owner, args, kwargs)

    def receipt(self, tuned: object) -> Receipt | None:
        """The receipt of a tuned object: what was loaded, or its backend; of several loads, the last."""
        return self._loaded.receipt(tuned)

    def _tuning_of(self, tuned: object) -> Tuning | None:
        return self._loaded.tuning_of(tuned)

    def undo(self, tuned: object) -> bool:
        """Put a tuned object back exactly as it was loaded, all of it. Returns whether there was something to undo."""
        return self._loaded.undo(tuned)

    def untouched(self, tuned: object) -> AbstractContextManager[bool]:
        """Run a tuned object as it was loaded while the scope is open, to compare the two on one's own input.

        Not while other threads use the object: some of their calls would be untouched too.

        Returns:
            A context manager; entering it gives whether there is anything in force that was switched off.
        """
        return self._loaded.untouched(tuned)

    def export_packs(self, path: str | PathLike[str]) -> int:
        """Write every warm pack of this user into one file, for another machine. Returns how many.

        Another machine takes the decisions from it; the compiled code too if both have the same `Settings.pack_key`.

        Raises:
            PackError: The file cannot be written.
        """
        from accelerate_tts.packs.warm_pack import pack_store

        return pack_store(self.settings).export(None, _file(path))

    def load_packs(self, path: str | PathLike[str]) -> int:
        """Take the warm packs of such a file into this user's folder. Returns how many.

        Raises:
            PackError: It is no such file.
        """
        from accelerate_tts.packs.warm_pack import pack_store

        return pack_store(self.settings).load(_file(path))

    # --- calls and memory ------------------------------------------------------------------------------------

    def get_inference_context(self) -> AbstractContextManager[Any]:
        """`torch.inference_mode()` where there is torch, else a null context. For synchronous code only."""
        return create_inference_context()

    def get_optimal_batch_size(self, default: int | None = None, *, item_bytes: int | None = None) -> int:
        """Number of items to run at once.

        Args:
            default: The answer where the table below has none: a device whose memory cannot be read.
            item_bytes: Bytes that one item takes at its peak, as `measure_item_bytes` tells. With it the answer is
                what fits into 80 % of the memory that is free now.

        Returns:
            At least 1. Without `item_bytes`: CUDA with more than 16 GiB in total 4, more than 8 GiB 2, else 1;
            MPS 2; CPU 1; others `default` or 1.

        Raises:
            SettingsError: `default` or `item_bytes` is not a whole number of at least 1.
        """
        for name, value in (("default", default), ("item_bytes", item_bytes)):
            if value is not None and (type(value) is not int or value < 1):
                raise SettingsError(f"{name}={shown(value)} must be None or a whole number of at least 1")
        device = self._ready()
        if item_bytes is not None:
            free = memory.free_bytes(device)
            if free is not None:
                return max(1, int(free * _BATCH_SHARE) // item_bytes)
        return detect.spec_of(device).batch_size(device) or default or 1

    def measure_item_bytes(self, model: Any, warmup_input: Any) -> int | None:
        """Run a model once on one item and return the bytes this took at its peak, at least 1.

        Args:
            model: As for `warmup_model`.
            warmup_input: One item, as for `warmup_model`.

        Returns:
            The bytes, or `None` where the system keeps no peak that can be reset (MPS; a CPU away from Linux).
        """
        from accelerate_tts.runtime.seeding import seeded
        from accelerate_tts.tuning.load_request import LoadRequest
        from accelerate_tts.tuning.warmup import Loaded

        device = self._ready()
        calls = LoadRequest(warmup_input, loaded=Loaded(model)).calls(self.settings.warmup_timeout).main

        def work() -> None:
            with seeded(device.type):
                for call in calls:
                    call.run()

        peak = memory.peak_of(device, work)
        return None if peak is None else max(1, peak)

    def cleanup_memory(self, force: bool = False) -> None:
        """Give memory back: garbage collection, the device's allocator cache, `malloc_trim` under glibc.

        Never raises, and never touches memory in use. Without `force` it only looks (half a millisecond) unless less
        than a tenth of the device's memory is free: a collection at every call would cost more than it frees.
        """
        try:
            device = self._ready()
            if force or memory.under_pressure(device):
                memory.cleanup(device)
        except Exception as error:  # "never raises": a failing driver query must not break the user's call
            emit(NotApplied("cleanup_memory", f"{type(error).__name__}: {error}"))


def _is_compiled(model: Any) -> bool:
    return getattr(model, "_compiled_call_impl", None) is not None


_accessor_lock = lock()
_optimizer: PerformanceOptimizer | None = None


def get_performance_optimizer() -> PerformanceOptimizer:
    """The optimizer that the whole process shares, made at its first use from the environment's settings.

    Raises:
        SettingsError: An environment variable has a value that means nothing.
    """
    global _optimizer  # noqa: PLW0603 - the process-wide instance, made once under a lock
    if _optimizer is None:
        with _accessor_lock:
            if _optimizer is None:
                _optimizer = PerformanceOptimizer()
    return _optimizer


def create_inference_context() -> AbstractContextManager[Any]:
    """`torch.inference_mode()` where there is torch, else a null context.

    Synchronous code only: entered around an `await` or a `yield` it would leak. `@inference` does those right.
    """
    return inference_mode.mode_factory("inference")() if is_active() else nullcontext()


def receipt_of(tuned: object) -> Receipt | None:
    """The receipt of an object that `@optimized_model` tuned, or `None`.

    Args:
        tuned: What was loaded, or the backend whose load method was decorated.
    """
    return get_performance_optimizer().receipt(tuned)


def _file(path: Any) -> Path:
    if not is_path(path):
        raise PackError(f"path={shown(path)} must be the path of a file")
    return Path(path)
