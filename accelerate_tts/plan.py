"""Parts of a loaded object, each with a kind that stages select by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["decoder", "head", "estimator", "vocoder", "encoder", "flow", "model", "process"]
"""Kinds of parts: an autoregressive decoder, a decoder's output head, an iterative estimator, a vocoder, an encoder, a
flow, a whole model.

"process" is process-wide state without a module, such as the threads of other libraries.
"""

CALL = "__call__"
"""Method of a part that is run by calling the module itself."""

PROCESS = "process"
"""Name of the part that represents the process."""


@dataclass(frozen=True)
class Head:
    """Output head of a decoder: modules that compute logits from hidden states in sequence.

    Attributes:
        modules: The modules. The outputs of the last one are the logits. Empty for a part that is the head itself,
            whose outputs are the logits.
        codebooks: Number of distributions side by side in the outputs.
        guidance: Usual weight `w` of classifier-free guidance, if the batch is a conditioned and an unconditioned half
            and the loop samples from `conditioned + w * (conditioned - unconditioned)`. It amplifies errors.
        reads_alone: True if only the head reads the hidden states, so that only the probabilities matter.
    """

    modules: tuple[nn.Module, ...]
    codebooks: int = 1
    guidance: float | None = None
    reads_alone: bool = False

    def __call__(self, hidden: Any) -> Any:
        """Return logits of shape (..., codebooks, vocabulary), or (..., vocabulary) for one codebook."""
        for module in self.modules:
            hidden = module(hidden)
        return hidden if self.codebooks == 1 else hidden.unflatten(-1, (self.codebooks, -1))


@dataclass(frozen=True)
class Decision:
    """A step at which a continuous value becomes a discrete one. Parts that compute it are checked by its margin.

    Attributes:
        owner: The module whose `forward` calls the parts and decides.
        parts: Names of the owner's attributes that compute the value, in call order. The output of the last one is the
            deciding value.
        edges: Takes the owner, the arguments of its call by name, and the deciding value; returns the values that are
            rounded up.
        probe: Takes the owner and a number; returns realistic arguments of a call, different for each number.
    """

    owner: nn.Module
    parts: tuple[str, ...]
    edges: Callable[[Any, Mapping[str, Any], Any], Any]
    probe: Callable[[Any, int], dict[str, Any]]

    @property
    def last(self) -> Any:
        """The deciding part: the last one."""
        return getattr(self.owner, self.parts[-1])


@dataclass(frozen=True)
class Part:
    """A module that is optimised as one piece.

    Attributes:
        name: Its path in the loaded object, for people.
        kind: Its kind of computation.
        module: The module, inside the user's object.
        decides: True if its output decides a discrete value, such as a duration that is rounded up, or a token. A
            rounding error could then change the length of the result. Only bit-exact changes are allowed, and those
            that check each decision by its margin.
        decision: The decision, if it can be checked.
        cached: True if the part was called with a key/value cache.
        head: Output head, if the part is a decoder with a known head, or is such a head.
        method: The method that the system calls: `CALL`, "forward" if it bypasses the hooks, or one of upstream's own.
        few_rows: Observed share of its linear work with few rows; 1.0 if unknown.
    """

    name: str
    kind: Kind
    module: nn.Module
    decides: bool = False
    cached: bool = False
    head: Head | None = None
    method: str = CALL
    few_rows: float = 1.0
    decision: Decision | None = None


@dataclass(frozen=True)
class ModelPlan:
    """Structure of a loaded object.

    Attributes:
        what: A short name of the object, for people.
        roots: The outermost modules, whose outputs the user sees.
        parts: The parts that stages are tried on. None of them contains another.
        refine: Returns better parts from the seconds that each module took in the first pass; `None` if the parts are
            known by name.
    """

    what: str
    roots: tuple[nn.Module, ...]
    parts: tuple[Part, ...]
    refine: Callable[[Mapping[nn.Module, float]], tuple[Part, ...]] | None = None


READY = "_accelerate_tts_ready"
"""Name of a class's function that prepares an argument of a replayed call before it is timed, and returns it."""
TimedCalls = Literal["all", "loop", "prefill", "end_to_end"]
"""Captured calls that are timed: all; only those of a loop that takes most of the time; or only the others (prefill).

"end_to_end" times the whole warm-up pass instead.
"""
