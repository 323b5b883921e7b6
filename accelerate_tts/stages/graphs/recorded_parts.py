"""Any part as graphs of its device, one for each kind of call. For CUDA and XPU.

Encoders, estimators, vocoders, codecs and speaker encoders launch hundreds of small kernels, whose launches dominate
their time on a GPU. The second call with the same shapes, dtypes, strides and other arguments is recorded, and later
ones are replayed by one launch: an estimator of ten steps gains at its third. During tuning the first call is recorded,
so that what is compared is what will serve.

A call is traced before it is recorded (obstacles.py). If something in a part cannot be recorded (a value that is read
from the device, a size that depends on values, random numbers), what lies around it is recorded instead: the modules
inside it, each by itself. Weights are read at their addresses, so writes in place are served; a weight that is
exchanged, another structure or hook ends the recordings of its module. Their number and bytes are bounded; the least
recently used one is dropped.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from accelerate_tts.device.graphs import is_capturing, is_forbidden
from accelerate_tts.errors import TimeLimitError, described
from accelerate_tts.events import FellBack, emit
from accelerate_tts.inspection.classes import class_of
from accelerate_tts.inspection.signatures import foreign_hooks, hooks_of, module_of
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.locks import rlock
from accelerate_tts.patching.change import Changes, CountedChange, Counter
from accelerate_tts.patching.class_swap import (
    RECORDED,
    ClassSwap,
    is_fused,
    keeps_copies,
    make_copies,
    subclass_with,
)
from accelerate_tts.patching.structure_watch import Calls, Inside
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.plan import CALL
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode.call_args import Obstacles
from accelerate_tts.stages.decode.growing_cache import decoders
from accelerate_tts.stages.graphs.arguments import Buffers, CallArguments, copied, fill, output_bytes
from accelerate_tts.stages.graphs.obstacles import Look, ObstacleError, look, unchanged_attributes
from accelerate_tts.stages.graphs.recorder import is_recording, recording
from accelerate_tts.stages.graphs.stage import RecordingStage
from accelerate_tts.stages.layers.weight_norm import has_folds

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from accelerate_tts.patching.class_swap import CarryingSwap
    from accelerate_tts.plan import Part
    from accelerate_tts.stages.graphs.recorder import Recorder, Replayable
    from accelerate_tts.stages.protocol import State


IN_PIECES = "in pieces"
"""Value of `RECORDED` for a part whose calls are replayed in pieces (recorded_pieces.py)."""


_OVERLOOKED = 8
"""Captures of a part that may fail by something in it that the trace did not see, each for one module."""


class PartBounds(NamedTuple):
    """Bounds of the recordings of one part.

    Attributes:
        graphs: Maximum recordings, of the part or of the modules inside it.
        kinds: Maximum kinds of calls that are counted.
        bytes: Maximum bytes of buffers, results and intermediate tensors.
        launches: Minimum operators of a recording. A replay with its copies takes as many launches as three.
        longer: Factor by which more calls of a kind are needed to record it again after its recording was dropped.
    """

    graphs: int = 256
    kinds: int = 1024
    bytes: int = 1 << 30
    launches: int = 4
    longer: int = 4


@register_stage
class RecordedPartsStage(RecordingStage[PartBounds]):
    """Records the calls of a part that is no decoder as graphs, and replays them.

    Args:
        recorder: See `RecordingStage`. Each part has a recorder.
        inside: See `RecordingStage`.
        bounds: Bounds of each part's recordings.
    """

    bounds = PartBounds()

    name = "recorded by shape"
    excluded_by: tuple[State, ...] = ("compiled", "fused")
    after = ("fold weight norm", "captured decode step", "recorded in pieces")

    def applies(self, part: Part) -> str | None:
        if getattr(class_of(part.module), RECORDED, None) == IN_PIECES:
            return "its pieces are recorded, which serve each length"
        return unrecordable(part) or super().applies(part)

    def prepare(self, part: Part) -> RecordedParts:
        """See `Stage.prepare`. Nothing is recorded yet."""
        return RecordedParts(part, self.name, self._recorder, self.half_precision(part), self.bounds)


def unrecordable(part: Part) -> str | None:
    """Return the reason why the calls of a part cannot be recorded, or `None`."""
    if part.kind == "decoder" or part.cached or decoders(part.module):
        return "its decode step is recorded by itself"
    if part.kind == "head":
        return "a single product takes no longer to start than its recording"
    if any(isinstance(inner, torch.jit.ScriptModule) or is_fused(inner) for inner in part.module.modules()):
        return "a module in it is compiled, or served as a whole"
    return None


class _RecordedCall(NamedTuple):
    replayable: Replayable
    buffers: list[torch.Tensor]
    results: int
    """Bytes of the results."""
    most: int
    """Bytes of the intermediate tensors, which the recordings share."""


class Node:
    """A module of the part that may be recorded.

    It is once the module around it turned out not to be recordable, and where it is called without that: by another
    method, as a codec's decoder is, or in a call whose arguments no recording can serve.
    """

    def __init__(self, module: Any, method: str, around: Node | None) -> None:
        self.module = module
        self.method = method
        self.around = around
        self.cut = False
        self.small = False
        self.inside: list[Node] = []
        self.watches: tuple[WeightWatch, bool, Inside, Calls] | None = None

    @property
    def is_active(self) -> bool:
        """True if the module is recorded by itself, however it is called."""
        return not self.cut and not self.small and (self.around is None or self.around.cut)

    def all(self) -> list[Node]:
        """Return the node and those inside it."""
        return [self, *(node for inner in self.inside for node in inner.all())]

    def watch(self) -> str | None:
        """Watch the module from now on; return the reason why it cannot be recorded, or `None`."""
        hooks = hooks_of(*(inner for inner in self.module.modules() if inner is not self.module))
        # torch's own hooks compute something, as an old weight norm does, and become a part of the recording.
        if any(not module_of(hook).startswith("torch.") for hook in foreign_hooks(hooks)):
            return "there are hooks inside it, which a replay does not call"
        copies = keeps_copies(self.module) or has_folds(self.module)
        weights = WeightWatch(self.module, content=copies)
        self.watches = (weights, copies, Inside(self.module), Calls(self.module, itself=False))
        return None

    def altered(self) -> str | None:
        """Return the reason why the module's recordings are no longer valid, or `None`."""
        if self.watches is None:
            return None
        weights, copies, inside, calls = self.watches
        if weights.outdated() if copies else weights.moved():
            return "its weights were exchanged"
        return inside.changed() or calls.altered()


def _nodes(module: Any, method: str, around: Node | None) -> Node:
    node = Node(module, method, around)
    below = list(module.children())
    while below:
        inner = below.pop(0)
        if type(inner).forward is nn.Module.forward:  # a list of modules, which is not called itself
            below[:0] = inner.children()
        elif next(inner.children(), None) is not None:
            node.inside.append(_nodes(inner, "forward", node))
    return node


class RecordedParts(CountedChange, Changes):
    """The change: the forward of each module that may be recorded looks for a recording first."""

    mark: object = True  # value of `RECORDED` of the part's class

    def __init__(
        self,
        part: Part,
        stage: str,
        recorder: Callable[[torch.device], Recorder],
        inside: CarryingSwap | None,
        bounds: PartBounds,
    ) -> None:
        self._stage = stage
        self._bounds = bounds
        self._counter = Counter(part.name)
        self._obstacles = Obstacles(f"{stage} of {part.name}")
        self._device = next(part.module.parameters()).device
        self._make_recorder = recorder
        self._recorder: Recorder | None = None
        self._buffers = Buffers(self._device)
        method = "forward" if part.method == CALL else part.method
        self._root = _nodes(part.module, method, None)
        nodes = {node.module: node for node in self._root.all()}
        super().__init__(inside, ClassSwap(list(nodes), lambda module: self._class_for(nodes[module], type(module))))
        self._lock = rlock()  # reentrant: a hook of an event that is emitted here may call the model
        self._here = threading.local()
        self._busy = False
        self._broken = False
        self._overlooked = 0
        self._calls: OrderedDict[Hashable, int] = OrderedDict()
        self._due: dict[Hashable, float] = {}
        self._recordings: OrderedDict[tuple[Node, Hashable], _RecordedCall] = OrderedDict()

    @property
    def kept(self) -> int:
        """Number of recordings that are kept."""
        return len(self._recordings)

    @property
    def bytes(self) -> int:
        """Bytes of the recordings."""
        return self._bytes_with()

    def _class_for(self, node: Node, plain: Any) -> type:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            run = getattr(plain, node.method)  # other code may have given the class another one
            if node.cut or self._broken or torch.is_grad_enabled() or module.training:
                return run(module, *args, **kwargs)
            if is_recording() or is_traced() or is_capturing(self._device):
                return run(module, *args, **kwargs)
            covering = self._covering()
            if not node.small and node.around not in covering:
                call = CallArguments(args, kwargs, self._device)
                served = self._serve(node, run, call)
                if served is not None:
                    return served[0]
                if call.obstacle or node.cut:  # what is inside may be recorded by itself
                    return run(module, *args, **kwargs)
            covering.append(node)
            try:
                return run(module, *args, **kwargs)
            finally:
                covering.pop()

        cls = subclass_with(plain, forward, method=node.method)
        if node.around is None:
            setattr(cls, RECORDED, self.mark)
        return cls

    def _covering(self) -> list[Node]:
        """Return the modules that run in this thread and are recorded as a whole, now or later."""
        if not hasattr(self._here, "covering"):
            self._here.covering = []
        found: list[Node] = self._here.covering
        return found

    def _serve(self, node: Node, run: Any, call: CallArguments) -> tuple[Any] | None:
        """Return the result of a call by a recording; `None` if the module has to run."""
        if call.obstacle or self._busy:  # another thread is recording, which takes long
            if call.obstacle:
                self._obstacles.report(call.obstacle, 0)
            return None
        key = (node, (call.key, modes_of(self._device.type)))
        with self._lock:
            self._check(node)
            found = self._recordings.get(key)
            if found is None:
                if not self._is_due(key):
                    return None
                self._busy = True
                try:
                    found = self._record(node, run, call, key)
                finally:
                    self._busy = False
            if found is None:
                return None
            self._recordings.move_to_end(key)
            return (self._replayed(found, call),)

    def _check(self, node: Node) -> None:
        """Forget what is known of a module if it was altered."""
        altered = node.altered()
        if altered is not None:
            self._obstacles.report(altered, 0)
            self._forget(node)

    def _replayed(self, found: _RecordedCall, call: CallArguments) -> Any:
        assert self._recorder is not None  # noqa: S101 - it made the recording
        with torch.no_grad(), self._recorder.in_turn():
            fill(found.buffers, call.tensors)
            found.replayable.replay()
            return copied(found.replayable.outputs, found.buffers, call.tensors)

    # --- which calls are recorded -----------------------------------------------------------------------------------

    def _is_due(self, key: Hashable) -> bool:
        """Count a call; check that it is the one to record."""
        count = self._calls.pop(key, 0) + 1
        self._calls[key] = count
        while len(self._calls) > self._bounds.kinds:
            self._due.pop(self._calls.popitem(last=False)[0], None)
        return count >= self._due.get(key, 2 if self._counter.sealed else 1)

    def _put_off(self, key: Hashable) -> None:
        """Ask for more calls of a kind before it is recorded again: else kinds in turn would be recorded each time."""
        self._due[key] = self._bounds.longer * max(1, self._calls.get(key, 1))

    def _forget(self, node: Node) -> None:
        for key in [key for key in self._recordings if key[0] is node]:
            self._drop(key)
        node.watches = None

    def _drop(self, key: tuple[Node, Hashable]) -> None:
        if self._recorder is not None:
            self._recorder.finish()
        del self._recordings[key]
        self._put_off(key)

    def _bytes_with(self, more: int = 0, most: int = 0) -> int:
        every = self._recordings.values()
        results = sum(one.results for one in every)
        return self._buffers.bytes + more + results + max([most, *(one.most for one in every)])

    def _make_room(self, buffers: int, most: int) -> None:
        """Drop recordings until one more fits, the least recently used first."""

        def is_full() -> bool:  # its results are among its own tensors
            return self._bytes_with(buffers + most, most) > self._bounds.bytes

        while self._recordings and (len(self._recordings) >= self._bounds.graphs or is_full()):
            self._drop(next(iter(self._recordings)))
        if is_full():
            self._buffers.clear()

    # --- recording ---------------------------------------------------------------------------------------------------

    def _record(self, node: Node, run: Any, call: CallArguments, key: tuple[Node, Hashable]) -> _RecordedCall | None:
        try:
            return self._try_to_record(node, run, call, key)
        except ObstacleError as obstacle:
            self._cut(node, str(obstacle))
        except TimeLimitError:
            raise
        except Exception as error:  # a capture may fail in any way; the untouched module serves
            reason = described(error).splitlines()[0]
            if is_forbidden(error) and self._overlooked < _OVERLOOKED:  # by the trace
                self._overlooked += 1
                self._cut(node, reason)
            else:
                self._give_up(reason)
        return None

    def _give_up(self, reason: str) -> None:
        """Record nothing any more, and let everything go."""
        self._broken = True
        for dropped in list(self._recordings):
            self._drop(dropped)
        self._buffers.clear()
        emit(FellBack(self._counter.what, self._stage, reason))

    def _try_to_record(
        self, node: Node, run: Any, call: CallArguments, key: tuple[Node, Hashable]
    ) -> _RecordedCall | None:
        run_on = self._runs(node, run, call)
        if node.watches is None and (obstacle := node.watch()) is not None:
            self._obstacles.report(obstacle, 0)
            self._put_off(key)
            return None
        seen = self._look(node, run_on, call)
        if seen.launches < self._bounds.launches:
            node.small = True
            self._check_use(f"its {seen.launches} operators take less time than a replay")
            return None
        if self._buffers.needed(call) + seen.bytes > self._bounds.bytes:
            self._obstacles.report(f"it takes more than {self._bounds.bytes} bytes", 0)
            self._due[key] = math.inf
            return None
        self._make_room(self._buffers.needed(call), seen.bytes)
        buffers = self._buffers.for_call(call)
        recorder = self._ready()
        with recording(), recorder.in_turn(), unchanged_attributes(node.module):
            fill(buffers, call.tensors)
            made = recorder.record(lambda: run_on(buffers))
        found = _RecordedCall(made, buffers, output_bytes(made.outputs), seen.bytes)
        self._recordings[key] = found
        self._counter.count(call.shapes())
        return found

    def _runs(self, node: Node, run: Any, call: CallArguments) -> Callable[[list[Any]], Any]:
        """Return what runs a call with other tensors in the places of its own."""

        def run_on(tensors: list[Any]) -> Any:
            args, kwargs = call.filled(tensors)
            with _without_cast_cache(self._device.type):
                return run(node.module, *args, **kwargs)

        return run_on

    @staticmethod
    def _look(node: Node, run_on: Callable[[list[Any]], Any], call: CallArguments, length: int | None = None) -> Look:
        make_copies(node.module)  # a trace has no values to make them from
        with recording():
            return look(run_on, node.module, call.tensors, length)

    def _ready(self) -> Recorder:
        if self._recorder is None:
            self._recorder = self._make_recorder(self._device)
            # Before the buffers are freed, on whichever thread: a replay on another stream may still read them.
            weakref.finalize(self, self._recorder.finish).atexit = False
        return self._recorder

    def _cut(self, node: Node, obstacle: str) -> None:
        """Record what is inside a module instead of the module."""
        node.cut = True
        self._forget(node)
        self._check_use(obstacle)
        if node is self._root and not self._broken:
            self._obstacles.report(f"{obstacle}; the modules inside it are recorded", 0)

    def _check_use(self, obstacle: str) -> None:
        if not any(node.is_active for node in self._root.all()):
            self._give_up(obstacle)


def modes_of(device_type: str) -> Hashable:
    """Return the modes of this thread and the flags of torch that decide which kernels are launched."""
    cudnn = torch.backends.cudnn
    try:
        products: Hashable = (torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    except RuntimeError:  # torch 2.9 and later, if other code uses the newer interface
        products = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)  # type: ignore[attr-defined]
    cast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return (
        torch.is_inference_mode_enabled(), cast, products, cudnn.enabled, cudnn.benchmark, _onednn_flags(),
        torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
    )  # fmt: skip


def _onednn_flags() -> Hashable:
    """Return oneDNN's flags, which decide on XPU what cuDNN's decide on CUDA; `None` for one that this torch lacks."""
    onednn = torch.backends.mkldnn
    convolutions = getattr(onednn, "conv", None)
    return getattr(onednn, "allow_tf32", None), getattr(convolutions, "fp32_precision", None)


def _without_cast_cache(device_type: str) -> Any:
    """Return a scope in which autocast keeps no casts of weights: those of the caller end with the caller's scope."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)
