"""The parts that a loaded object consists of, each with a kind that stages choose by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CALL", "PROCESS", "READY", "Decision", "Head", "Kind", "ModelPlan", "Part", "Which"]

Kind = Literal["decoder", "estimator", "vocoder", "encoder", "flow", "model", "process"]
"""An autoregressive decoder, an iterative estimator, a vocoder, an encoder, a flow; "model" is a whole one.

"process" is what belongs to no module: the threads of other libraries.
"""

CALL = "__call__"
"""What most systems call: the module itself."""

PROCESS = "process"
"""The name of the part that stands for the process."""


@dataclass(frozen=True)
class Head:
    """What makes a decoder's logits of its hidden states: modules, one after the other.

    Attributes:
        modules: The modules; the last one's outputs are the logits.
        codebooks: How many distributions lie side by side in its outputs.
        guidance: Where a loop runs a conditioned half of the rows beside an unconditioned one, the usual weight `w` of
            what it samples from, `conditioned + w * (conditioned - unconditioned)`; errors are then larger by as much.
        reads_alone: Whether nothing else reads the hidden states: then what counts of them is the probabilities.
    """

    modules: tuple[nn.Module, ...]
    codebooks: int = 1
    guidance: float | None = None
    reads_alone: bool = False

    def __call__(self, hidden: Any) -> Any:
        """Logits of shape (..., codebooks, vocabulary), or (..., vocabulary) of one codebook."""
        for module in self.modules:
            hidden = module(hidden)
        return hidden if self.codebooks == 1 else hidden.unflatten(-1, (self.codebooks, -1))


@dataclass(frozen=True)
class Decision:
    """Where a continuous value becomes a discrete one, so that a part on which it hangs can be checked by its margin.

    Attributes:
        owner: The module whose `forward` calls the parts and decides.
        parts: Names of the owner's attributes that compute the value, in the order in which they are called; the last
            one's output is what is decided by.
        edges: From the owner, the arguments of its call by name, and that output, to the values that are rounded up.
        probe: From the owner and a number, to the arguments of a call as service may bring it, another one for each
            number.
    """

    owner: nn.Module
    parts: tuple[str, ...]
    edges: Callable[[Any, Mapping[str, Any], Any], Any]
    probe: Callable[[Any, int], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A module that is optimised as one piece.

    Attributes:
        name: Its path from the loaded object, for people.
        kind: What sort of computation it is.
        module: The module itself, inside the user's object.
        decides: Whether a discrete choice hangs on its output (a duration that is rounded up, a token): then even a
            rounding error can change the length of the result, and only bit-exact changes are allowed, and those that
            check each decision by its margin.
        decision: How it can be checked, if that is known.
        cached: Whether it was seen to be called with a key/value cache.
        head: What makes logits of what it computes, if it is a decoder whose head is known.
        method: What the system calls to run it, if not the module itself: "forward" where it goes past the hooks, or a
            method of upstream's own.
        few_rows: The share of its linear work that was seen to be done for a few rows at a time; 1.0 if unknown.
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
    """What a loaded object consists of.

    Attributes:
        what: A short name of the object, for people.
        roots: The outermost modules, whose outputs the user sees.
        parts: What stages are tried on; none of them contains another.
        refine: Makes better parts of `parts` from the seconds that each module took in the first pass; `None` where
            the parts are known by name.
    """

    what: str
    roots: tuple[nn.Module, ...]
    parts: tuple[Part, ...]
    refine: Callable[[Mapping[nn.Module, float]], tuple[Part, ...]] | None = None


READY = "_accelerate_tts_ready"
"""The name of a class's function that returns an argument of a replayed call, made ready before the clock runs."""
Which = Literal["all", "loop", "others", "pass"]
"""Which captured calls: all; where a loop takes most of the time, only its calls; or only the others (the prompts).

Or none of them, and the whole warm-up pass is run instead.
"""
