"""A stand-in for CUDA graphs: a recording that replays by running again, and fails where a graph would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from accelerate_tts.stages.graphs.recorder import recording


class Operators(TorchDispatchMode):
    """Notes what a graph would freeze of each operator: shapes, strides, numbers, and addresses it did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self._own: list[torch.UntypedStorage] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.lift_fresh.default:  # Python's numbers, as a new tensor of the host's
            self.seen.append((str(function), [args[0].tolist()], []))
            self._own.append(args[0].untyped_storage())
            return function(*args)
        own = {storage.data_ptr() for storage in self._own}
        given = [self._frozen(leaf, own) for leaf in _pytree.tree_leaves((args, kwargs or {}))]
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen.append((str(function), given, [(tuple(t.shape), t.stride()) for t in made]))
        self._own += [t.untyped_storage() for t in made if t.untyped_storage().data_ptr() not in self._outside]
        return result

    @property
    def _outside(self) -> set[int]:
        return {leaf[-1] for _, given, _ in self.seen for leaf in given if isinstance(leaf, tuple) and leaf[-1]}

    @staticmethod
    def _frozen(leaf: Any, own: set[int]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        address = leaf.untyped_storage().data_ptr()
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, 0 if address in own else address


class Rerun:
    """A recording that runs again."""

    def __init__(self, run: Callable[[], Any], replayed: Callable[[], object], *, watched: bool) -> None:
        self._run, self._replayed, self._watched = run, replayed, watched
        self._seen, self.outputs = self._again()

    def _again(self) -> tuple[list[Any], Any]:
        with recording():  # a graph's replay calls no module
            if not self._watched:
                return [], self._run()
            with Operators() as operators:
                return operators.seen, self._run()

    def replay(self) -> None:
        seen, again = self._again()
        assert seen == self._seen, "a graph would compute something else"
        for old, new in zip(_pytree.tree_leaves(self.outputs), _pytree.tree_leaves(again), strict=True):
            if isinstance(old, torch.Tensor):
                if old is not new:  # an argument that is returned
                    old.copy_(new)
            elif not hasattr(old, "get_seq_length"):  # a cache, which is no result
                assert old == new, "a graph would return another constant"
        self._replayed()


class Reruns:
    """A recorder of them.

    Args:
        fault: Called before each recording, to fail.
        watched: False for stages of ours inside, which run upstream's forward where operators are watched.
    """

    def __init__(
        self, device: torch.device, fault: Callable[[], object] = lambda: None, *, watched: bool = True
    ) -> None:
        self.device = device
        self.replays = 0
        self.finished = 0
        self.turns = 0
        self._fault, self._watched = fault, watched

    def record(self, run: Callable[[], Any]) -> Rerun:
        self._fault()
        for _ in range(2):
            run()
        return Rerun(run, self._count, watched=self._watched)

    def _count(self) -> None:
        self.replays += 1

    @contextmanager
    def in_turn(self, *, stream: Any = None) -> Iterator[None]:
        assert not self.turns, "two threads use the same buffers"
        self.turns += 1
        try:
            yield
        finally:
            self.turns -= 1

    def finish(self) -> None:
        self.finished += 1
