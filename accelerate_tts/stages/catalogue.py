"""The optimisations, one file each. Adding one means adding a file and naming it in `default_stages`.

A stage makes a *change* of a part that can be switched on and off at will. Both are cheap, so that the engine can time
the two states in turn; what is costly (a compilation) happens once, when the change is first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.stages.protocol import Stage

if TYPE_CHECKING:
    from accelerate_tts.settings import Precision

__all__ = ["default_stages"]


def default_stages(device_type: str, compile_mode: str | None, precision: Precision = "exact") -> tuple[Stage, ...]:
    """The stages in the order in which they are tried: what comes later is built on what was kept before.

    Args:
        device_type: torch's device type.
        compile_mode: torch.compile's mode for the device, or `None` to leave that stage out.
        precision: What may be changed.
    """
    from accelerate_tts.device.half_dtypes import half_dtypes
    from accelerate_tts.kernels.weight_formats import FORMATS
    from accelerate_tts.stages.compile.regional import CompiledBlocksStage
    from accelerate_tts.stages.compile.whole import CompileStage, FrozenCompileStage
    from accelerate_tts.stages.decode.bf16_prefill import PromptStage
    from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
    from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
    from accelerate_tts.stages.decode.growing_cache import GrowingCacheStage
    from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
    from accelerate_tts.stages.layers.few_rows import FewRowsStage
    from accelerate_tts.stages.layers.fused_sequence import KERNELS, FusedSequenceStage
    from accelerate_tts.stages.layers.half_precision import HalfStage
    from accelerate_tts.stages.layers.int8 import quantize_stages
    from accelerate_tts.stages.layers.skinny import SkinnyStage
    from accelerate_tts.stages.layers.weight_norm import FoldStage
    from accelerate_tts.stages.process.openblas_threads import QuietBlasStage
    from accelerate_tts.stages.vocoder.checked_lengths import CheckedStage
    from accelerate_tts.stages.vocoder.fewer_operators import FewerOperatorsStage
    from accelerate_tts.stages.vocoder.hifigan import hifigan
    from accelerate_tts.stages.vocoder.vits import DURATIONS, FLOW, TEXT

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
