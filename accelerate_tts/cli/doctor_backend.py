"""`accelerate-tts doctor MODULE:CLASS`: what tuning would try on the user's own backend, and what is lost here."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.backend import BackendError, find, values_of
from accelerate_tts.cli.doctor import Finding, compiler_path, settings_or_default
from accelerate_tts.device import setup
from accelerate_tts.device.detect import detect
from accelerate_tts.errors import AccelerateTTSError, SettingsError
from accelerate_tts.events import NotApplied, add_hook
from accelerate_tts.settings import Settings, testing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from accelerate_tts.plan import ModelPlan, Part
    from accelerate_tts.stages.protocol import Stage


_NO_KERNELS = {
    "decoder": "fused decoder blocks, skinny linear layers",
    "estimator": "fused transformer and residual blocks, convolutions in fewer products",
    "flow": "convolutions in fewer products",
    "vocoder": "convolutions in fewer products",
}
_OTHER_KINDS = "skinny linear layers, convolutions in fewer products"


def examine(target: str, init: Sequence[str], load: str | None) -> Iterator[Finding]:
    """Load a backend as it is, without tuning, and report what tuning would try on its parts.

    Args:
        target: `module:Class`.
        init: Arguments of the class, as `name=value`.
        load: Name of the load method, if there are several.
    """
    said: list[str] = []
    forget = add_hook(lambda event: said.append(str(event)) if isinstance(event, NotApplied) else None)
    try:
        backend = find(target, load)
        yield Finding("backend", "ok", f"{backend.name}: {backend.load} loads; {', '.join(backend.methods)} may speak")
        made = backend.made(values_of(init, "--init"))
        with testing():  # the decorators pass through: nothing is tuned
            result = backend.loaded(made)
        plan = _plan(made, result)
        if not plan.roots:
            raise BackendError(
                f"no torch.nn.Module was found in what {backend.load} loaded; return the model, or set it on self"
            )
    except AccelerateTTSError as error:
        why, _, mend = str(error).partition("; ")
        yield Finding("backend", "problem", why, mend or "correct that, and run this again")
        return
    finally:
        forget()
    whole = [part.name for part in plan.parts if part.kind == "model"]
    parts = ", ".join(f"{part.name or 'the model'} ({part.kind})" for part in plan.parts)
    unknown = "; parts of an unknown model are found in its first call" if whole else ""
    yield Finding("parts", "info", f"{parts or 'none'}{unknown}")
    for text in said:
        yield Finding("plan", "warning", text, "docs/ENVIRONMENTS.md has the releases that were run")
    yield from _model(plan)
    yield from _stages(plan)


def _plan(made: Any, result: Any) -> ModelPlan:
    from accelerate_tts.inspection.object_tree import find_modules
    from accelerate_tts.models import describe

    return describe(result if result is not None and find_modules(result) else made)


def _model(plan: ModelPlan) -> Iterator[Finding]:
    from accelerate_tts.tuning.tune import acts_in_training

    if acts_in_training(plan):
        yield Finding(
            "train mode", "warning", "a module is in train mode, where dropout and batch statistics are on",
            "call .eval() on it in the load method",
        )  # fmt: skip
    with suppress(SettingsError):  # the machine's part of the report has it
        device = detect(Settings.from_environment().device)
        found = {parameter.device.type for root in plan.roots for parameter in root.parameters()}
        if found and device.type not in found:
            yield Finding(
                "model's device", "warning", f"the weights are on {', '.join(sorted(found))}, beside a {device.kind}",
                f"load the model with device={device.type!r}, or set ACCELERATE_TTS_DEVICE",
            )  # fmt: skip


def _stages(plan: ModelPlan) -> Iterator[Finding]:
    from accelerate_tts.kernels.library import KernelError, kernels
    from accelerate_tts.stages.catalogue import default_stages

    settings = settings_or_default()
    kind = next((parameter.device.type for root in plan.roots for parameter in root.parameters()), "cpu")
    mode = setup.compile_mode(detect(None), settings)
    tried = default_stages(kind, mode, settings.precision)
    for part in plan.parts:
        names = _names(tried, part)
        yield Finding(f"stages on {part.name or 'the model'}", "info", f"{', '.join(names) or 'none'} will be tried")
    try:
        kernels()
    except KernelError as error:
        lost = [f"{part.name or 'the model'}: {_NO_KERNELS.get(part.kind, _OTHER_KINDS)}" for part in plan.parts]
        if lost and kind == "cpu":
            yield Finding("lost without kernels", "warning", "; ".join(lost), error.mend)
    compiled = {name for part in plan.parts for name in _names(default_stages(kind, "default"), part)}
    compiled -= {name for part in plan.parts for name in _names(default_stages(kind, None), part)}
    if compiled and mode is None:
        yield Finding(
            "lost without compiling", "warning", ", ".join(sorted(compiled)), "unset ACCELERATE_TTS_TORCH_COMPILE=0",
        )  # fmt: skip
    elif compiled and kind == "cpu" and compiler_path() is None:
        yield Finding("lost without a compiler", "warning", ", ".join(sorted(compiled)), "see C++ compiler above")
    if settings.precision == "exact":
        more = {name for part in plan.parts for name in _names(default_stages(kind, mode, "fast"), part)}
        more -= {name for part in plan.parts for name in _names(tried, part)}
        if more:
            yield Finding(
                "with fewer bits", "info", f"precision='balanced' or 'fast' tries {', '.join(sorted(more))}, too"
            )


def _names(stages: Iterable[Stage], part: Part) -> list[str]:
    return [stage.name for stage in stages if not stage.process and stage.applies(part) is None]
