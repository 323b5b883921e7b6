"""Stages: optimisations, each of which makes a reversible change of one part of a model.

A new stage is a class in a file of one of these folders, or in a package of your own, that derives from `BaseStage` and
is decorated with `@register_stage`. CONTRIBUTING.md has an example.
"""

from accelerate_tts.patching.change import BaseChange
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.protocol import Change, Stage, Target

__all__ = ["BaseChange", "BaseStage", "Change", "Stage", "Target", "register_stage"]
