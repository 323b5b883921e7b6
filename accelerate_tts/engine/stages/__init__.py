"""The optimisations, one file each. Adding one means adding a file and naming it in `default_stages`.

A stage makes a *change* of a part that can be switched on and off at will. Both are cheap, so that the engine can time
the two states in turn; what is costly (a compilation) happens once, when the change is first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from accelerate_tts.engine.capture import Which
    from accelerate_tts.engine.plan import Part
    from accelerate_tts.settings import Precision

__all__ = ["Change", "Stage", "default_stages"]


class Change(Protocol):
    """A reversible change of one part."""

    @property
    def graphs(self) -> int | None:
        """Graphs compiled so far; `None` for a change that compiles nothing."""
        ...

    def on(self) -> None:
        """Put the change in force. Idempotent."""
        ...

    def off(self) -> None:
        """Put the part back exactly as it was. Idempotent."""
        ...

    def seal(self) -> None:
        """Warm-up is over: whatever has to be compiled from here on is worth an event."""
        ...


class Stage(Protocol):
    """One optimisation."""

    name: str
    least_share: float
    """The share of the whole time that a part must take before this stage is worth trying on it."""
    group: str
    """Of the stages of one group, at most one is kept on a part: the fastest. "" for a stage without alternatives."""
    process: bool
    """Whether it is about the process as a whole and tried once, on the whole pass; not on each part."""
    times: Which
    """Of a part that is called in a loop, the calls in which its gain is looked for."""
    spared_by: tuple[str, ...]
    """Names of stages that do the same from fewer bytes: once one is kept on a part whose weights come from memory at
    each step, this one has nothing to gain, and the copies that it would make are never made."""

    def cost_of(self, part: Part) -> float:
        """Seconds that trying it on `part` usually takes, at least; with less of the budget left it is not begun."""
        ...

    def applies(self, part: Part) -> str | None:
        """Why the stage has nothing to do on `part`, or `None` if it may be tried."""
        ...

    def prepare(self, part: Part) -> Change:
        """Make the change, switched off."""
        ...


def default_stages(device_type: str, compile_mode: str | None, precision: Precision = "exact") -> tuple[Stage, ...]:
    """The stages in the order in which they are tried: what comes later is built on what was kept before.

    Args:
        device_type: torch's device type.
        compile_mode: torch.compile's mode for the device, or `None` to leave that stage out.
        precision: What may be changed.
    """
    from accelerate_tts.engine.stages.blas import QuietBlasStage
    from accelerate_tts.engine.stages.blocks import CompiledBlocksStage
    from accelerate_tts.engine.stages.captured import CapturedStepStage
    from accelerate_tts.engine.stages.compile import CompileStage, FrozenCompileStage
    from accelerate_tts.engine.stages.decode import GrowingCacheStage
    from accelerate_tts.engine.stages.fold import FoldStage
    from accelerate_tts.engine.stages.fused import FusedBlocksStage
    from accelerate_tts.engine.stages.hifigan import hifigan
    from accelerate_tts.engine.stages.layout import ChannelsLastStage
    from accelerate_tts.engine.stages.linear import FewRowsStage
    from accelerate_tts.engine.stages.margin import CheckedStage
    from accelerate_tts.engine.stages.operators import FewerOperatorsStage
    from accelerate_tts.engine.stages.precision import HalfStage, half_dtypes
    from accelerate_tts.engine.stages.prompts import PromptStage
    from accelerate_tts.engine.stages.quantize import quantize_stages
    from accelerate_tts.engine.stages.sequence import KERNELS, FusedSequenceStage
    from accelerate_tts.engine.stages.skinny import FORMATS, SkinnyStage
    from accelerate_tts.engine.stages.vits_parts import DURATIONS, FLOW, TEXT

    on_cpu = device_type == "cpu"
    halves = [] if precision == "exact" else half_dtypes(device_type)
    formats = FORMATS[{"fast": 0, "balanced": 1, "exact": 2}[precision] :]
    stages: list[Stage] = [FoldStage()]
    if on_cpu:
        # Before all else that changes parts: what is served as a whole is not tried again piece by piece.
        stages += [QuietBlasStage(), FewerOperatorsStage((FLOW, hifigan()))]
        stages += [FewerOperatorsStage((hifigan(dtype),), str(dtype)[6:]) for dtype in halves]
        stages += [CheckedStage(DURATIONS), CheckedStage(TEXT), ChannelsLastStage()]
        # Before all else that changes linear layers: what is inside fused blocks is not tried again.
        stages += map(FusedBlocksStage, formats)
        stages += [PromptStage(), *map(FusedSequenceStage, KERNELS)] if precision != "exact" else []
    # Where blocks were fused, the caches grow already, and there is nothing to try: of a large decoder in eager
    # PyTorch it gains a per cent or two, and to be sure of that takes a fifth of the budget. A GPU copies a cache in
    # less time than a position is written into it (0.79x to 0.88x on an H100); what it needs it for brings it along.
    if device_type == "cuda":
        stages += [CapturedStepStage(), *(CapturedStepStage(inside=HalfStage(dtype, carried=True)) for dtype in halves)]
    else:
        stages.append(GrowingCacheStage())
    for dtype in halves:
        stages += [HalfStage(dtype, carried=False), HalfStage(dtype, carried=True)]
    if on_cpu:
        stages += [*map(SkinnyStage, formats), FewRowsStage()]
        stages += quantize_stages() if precision == "fast" else ()
        stages += [] if compile_mode is None else [FrozenCompileStage()]
    if compile_mode is not None:
        # Blocks share a graph, and lengths grow: a recording of inductor's would be overwritten by the next block.
        blocks = _WITHOUT_CUDA_GRAPHS.get(compile_mode, compile_mode)
        stages += [CompiledBlocksStage(blocks), CompileStage(compile_mode)]
    return tuple(stages)


_WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
