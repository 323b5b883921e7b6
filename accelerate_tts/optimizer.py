"""`PerformanceOptimizer`, the shared engine behind the decorators, and its process-wide accessor."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.device import detect, flags, memory, setup
from accelerate_tts.errors import ModelError, PackError, SettingsError, described, shown
from accelerate_tts.events import Event, FellBack, NotApplied, Prepared, Warmed, WarmupFailed, emit
from accelerate_tts.lifecycle import LoadedObjects
from accelerate_tts.locks import rlock
from accelerate_tts.runtime import inference_mode
from accelerate_tts.settings import Settings, is_active, is_path

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from accelerate_tts.receipts.receipt import Receipt
    from accelerate_tts.tuning.findings import Tuning
    from accelerate_tts.tuning.load_request import LoadRequest
    from accelerate_tts.tuning.reload import Reloader

T = TypeVar("T")

# Maximum share of free memory for a batch; fragmentation and the next request need the rest.
_BATCH_SHARE = 0.8


class PerformanceOptimizer:
    """Detects the device, sets it up, and optimises and warms up models on it.

    All methods are thread-safe. Methods that need it call `initialize()`.

    Args:
        settings: The settings; read from the environment if not given.

    Raises:
        SettingsError: An environment variable has an invalid value.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = Settings.from_environment() if settings is None else settings
        self._lock = rlock()
        self._device: detect.DeviceInfo | None = None
        self._hold: flags.HeldFlags | None = None
        self._loaded = LoadedObjects(self.settings, self._ready, partial(self.cleanup_memory, force=True))

    # --- device ----------------------------------------------------------------------------------------------

    def initialize(self) -> torch.device:
        """Detect the device and set it up, once; later calls return the same device.

        CUDA: TF32 for matrix products and cuDNN, cuDNN autotune. ROCm: TF32 alone. MPS: the fallback and watermark
        variables.
        All devices: CPU threads that fit affinity, quota and `settings.workers`. Variables that the user has set are
        not changed. `close()` restores everything.

        Raises:
            SettingsError: `settings.device` is not available on this machine.
        """
        import torch

        return torch.device(self._ready().type)

    @property
    def device(self) -> detect.DeviceInfo:
        """The detected device in detail; initialises it if needed."""
        return self._ready()

    def _ready(self) -> detect.DeviceInfo:
        if self._device is not None:
            return self._device
        with self._lock:
            if self._device is None:
                device = detect.detect(self.settings.device)
                self._hold = flags.HeldFlags()
                self._hold.take(setup.setup_flags(device, self.settings))
                self._device = device
                emit(Prepared(f"{device.kind} ({device.name})", tuple(f.name for f in self._hold.flags)))
            return self._device

    def close(self) -> None:
        """Restore every flag and variable that `initialize()` changed. Models are not changed."""
        with self._lock:
            if self._hold is not None:
                self._hold.release()
            self._hold = self._device = None

    def call_flags(self) -> list[tuple[flags.Flag, Any]]:
        """Return the process-wide flags that a `fast_inference()` scope holds on this device, without setting them."""
        return setup.call_flags(self._device or detect.detect(self.settings.device), self.settings)

    # --- models ----------------------------------------------------------------------------------------------

    def compile_model(self, model: T, model_name: str, warmup_input: Any = None) -> T:
        """Compile a module in place with the device's mode, and warm it up if an input is given.

        The first call compiles. If the compiler fails, or a warm-up shows that nothing was compiled, the untouched
        module is used and a `FellBack` event gives the reason. Lengths are dynamic, but some operations divide them
        into ranges: warm up with a short and a long input. After a warm-up, each further compilation is a `Recompiled`
        event.

        Args:
            model: A `torch.nn.Module`. It keeps its class, state dict and pickling.
            model_name: Its name in events.
            warmup_input: As for `warmup_model`.

        Returns:
            `model` itself, compiled or not. It is not compiled on MPS, or if `settings.compile` is off.

        Raises:
            ModelError: `model` is not a `torch.nn.Module`.
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
                emit(FellBack(model_name, "torch.compile", described(error)))
                return model
            change.on()
            if warmup_input is not None and self.warmup_model(model, warmup_input):
                if change.graphs == 0:
                    change.off()
                    emit(FellBack(model_name, "torch.compile", "it compiled no graph"))
                change.end_warmup()
        return model

    def warmup_model(self, model: Any, warmup_input: Any) -> bool:
        """Run a model once, in inference mode, so that its first real call is warm.

        The user's random state is restored. If a CUDA graph must be recorded, the pass runs three times.

        Args:
            model: A module, or any object that `@optimized_model` takes.
            warmup_input: A tensor, a tuple of arguments, a mapping of keyword arguments, a text, a callable of the
                model, or a list of these, each run in turn. Tensors are moved to the module's device.

        Returns:
            True if it succeeded; False with a `WarmupFailed` event if it raised.

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
                        if call.variant is not None and getattr(model, "_compiled_call_impl", None) is not None:
                            call.variant()
        except Exception as error:  # any error of the model: the result is a bool, and the event has the reason
            emit(WarmupFailed(name, described(error)))
            return False
        emit(Warmed(name, time.perf_counter() - start))
        return True

    def optimize(self, request: LoadRequest) -> Receipt | None:
        """Tune, verify and warm up what a load function left behind; what `@optimized_model` does.

        One tuning runs at a time in a process. A module that is tuned already keeps its tuning; an object that is new
        around it is warmed up only. A warm pack of the same object takes the place of tuning.

        Args:
            request: The loaded object and its options.

        Returns:
            The receipt, or `None` if what was loaded holds no module, or if waiting for another tuning would wait for
            ever.

        Raises:
            WarmupError: The warm-up does not fit what was loaded.
        """
        return self._loaded.optimize(request)

    def remembered(
        self, function: Callable[..., Any], owner: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reloader | None:
        """Save the call of a load function for a repetition, before it is made; `None` unless weights are reloaded."""
        if self.settings.guard_weights != "reload":
            return None
        from accelerate_tts.tuning.reload import remembered

        return remembered(function, owner, args, kwargs)

    def receipt(self, tuned: object) -> Receipt | None:
        """Return the receipt of a loaded object or its backend; the last one after several loads."""
        return self._loaded.receipt(tuned)

    def tuning_of(self, tuned: object) -> Tuning | None:
        """Return the tuning of a loaded object or its backend, or `None`."""
        return self._loaded.tuning_of(tuned)

    def undo(self, tuned: object) -> bool:
        """Put a tuned object back exactly as it was loaded.

        Returns:
            True if there was something to undo.
        """
        return self._loaded.undo(tuned)

    def untouched(self, tuned: object) -> AbstractContextManager[bool]:
        """Switch a tuned object's optimisations off while the scope is open, to compare both states on your own input.

        Calls of other threads in the meantime are untouched, too.

        Returns:
            A context manager that yields True if there was anything to switch off.
        """
        return self._loaded.untouched(tuned)

    def export_packs(self, path: str | PathLike[str]) -> int:
        """Write all warm packs of this user into one file, for another machine.

        The other machine uses the decisions, and the compiled code if both have the same `Settings.pack_key`.

        Returns:
            Number of packs written.

        Raises:
            PackError: The file cannot be written.
        """
        from accelerate_tts.packs.store import pack_store

        return pack_store(self.settings).export(None, _file(path))

    def load_packs(self, path: str | PathLike[str]) -> int:
        """Load the warm packs of an exported file into this user's folder.

        Returns:
            Number of packs loaded.

        Raises:
            PackError: The file cannot be read, or was not exported by `export_packs`.
        """
        from accelerate_tts.packs.store import pack_store

        return pack_store(self.settings).load(_file(path))

    # --- calls and memory ------------------------------------------------------------------------------------

    def get_inference_context(self) -> AbstractContextManager[Any]:
        """Return `torch.inference_mode()`, or a null context without torch or while the decorators are off.

        For synchronous code only.
        """
        return create_inference_context()

    def get_optimal_batch_size(self, default: int | None = None, *, item_bytes: int | None = None) -> int:
        """Return the number of items to run at once.

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
        """Run a model once on one item and return its peak memory in bytes, at least 1.

        Args:
            model: As for `warmup_model`.
            warmup_input: One item, as for `warmup_model`.

        Returns:
            The bytes, or `None` if the system has no peak counter that can be reset (MPS; a CPU except on Linux).
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
        """Free unused memory: garbage collection, the device's allocator cache, `malloc_trim` under glibc.

        Never raises, and never touches memory in use. Without `force` it acts only if less than a tenth of the device's
        memory is free, since a collection at every call would cost more than it frees.
        """
        try:
            device = self._ready()
            if force or memory.under_pressure(device):
                memory.cleanup(device)
        except Exception as error:  # "never raises": a failing driver query must not break the user's call
            emit(NotApplied("cleanup_memory", described(error)))


_accessor_lock = rlock()
_optimizer: PerformanceOptimizer | None = None


def get_performance_optimizer() -> PerformanceOptimizer:
    """Return the process-wide optimizer, which is made at its first use from the environment's settings.

    Raises:
        SettingsError: An environment variable has an invalid value.
    """
    global _optimizer  # noqa: PLW0603 - the process-wide instance, made once under a lock
    optimizer = _optimizer
    if optimizer is None:
        told: list[Event] = []
        with _accessor_lock:
            if _optimizer is None:
                _optimizer = PerformanceOptimizer(Settings.from_environment(tell=told.append))
            optimizer = _optimizer
        for event in told:  # when it can be used, since a hook may call this
            emit(event)
    return optimizer


def replace_performance_optimizer(optimizer: PerformanceOptimizer | None) -> PerformanceOptimizer | None:
    """Replace the process-wide optimizer, and return the previous one, which is not closed.

    Args:
        optimizer: The new one. `None` has the next use make one from the environment's settings, as in a new process.
    """
    global _optimizer
    with _accessor_lock:
        previous, _optimizer = _optimizer, optimizer
    return previous


def create_inference_context() -> AbstractContextManager[Any]:
    """Return `torch.inference_mode()`, or a null context without torch or while the decorators are off.

    For synchronous code only: around an `await` or a `yield` the mode would leak. `@inference` handles those.
    """
    return inference_mode.mode_factory("inference")() if is_active() else nullcontext()


def receipt_of(tuned: object) -> Receipt | None:
    """Return the receipt of an object that `@optimized_model` tuned, or `None`.

    Args:
        tuned: The loaded object, or the backend whose load method was decorated.
    """
    return get_performance_optimizer().receipt(tuned)


def _file(path: Any) -> Path:
    if not is_path(path):
        raise PackError(f"path={shown(path)} must be the path of a file")
    return Path(path)
