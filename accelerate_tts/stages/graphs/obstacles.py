"""Obstacles to recording a computation, found by tracing it with tensors that have no values.

A replay repeats the kernels of the recorded call, so nothing in it may depend on values: neither a shape, nor what
Python decides, nor what is written beside the result. The trace runs no kernel, draws no number and writes no tensor.
It names the operator that is in the way, and adds up the memory that the computation needs.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from accelerate_tts.errors import TimeLimitError, message_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable
    from types import TracebackType


class ObstacleError(Exception):
    """A computation cannot be recorded; the message says why."""


class Look(NamedTuple):
    """Properties of a computation that can be recorded.

    Attributes:
        launches: Number of operators that are no views.
        bytes: Maximum bytes of its own tensors at a time, results included.
        operators: The operators in their order, each with the numbers that it is given. Sizes are left out, so that
            they are the same for two lengths unless what is computed depends on the length.
    """

    launches: int
    bytes: int
    operators: list[Hashable]


def look(run: Callable[..., Any], module: nn.Module, tensors: list[torch.Tensor], length: int | None = None) -> Look:
    """Trace a computation.

    Args:
        run: Takes tensors in place of `tensors`, and returns the result.
        module: The module that computes. Its attributes are put back.
        tensors: The tensors that it is given, all on one device.
        length: Last dimension of the first tensor in the trace, if it is to be another one.

    Raises:
        ObstacleError: It cannot be recorded.
    """
    device = tensors[0].device
    fakes = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    # Normal tensors: in inference mode composed operators would not be taken apart.
    with (
        torch.inference_mode(mode=False), torch.no_grad(), _unmoved(module) as moved,
        unchanged_attributes(module) as changed,
    ):  # fmt: skip
        given: list[Any] = [fakes.from_tensor(tensor) for tensor in tensors]
        if length is not None:
            with fakes:
                given[0] = given[0].new_empty((*given[0].shape[:-1], length))
        watch = _Watch(device, module)
        try:
            with fakes, watch:
                outputs = run(given)
        except ObstacleError as error:
            raise ObstacleError(f"{error}{_place(error.__traceback__)}") from None
        except TimeLimitError:
            raise
        except Exception as error:  # whatever a trace cannot do is a reason not to record
            raise ObstacleError(f"{_reason(error)}{_place(error.__traceback__)}") from None
        finally:
            _forget(fakes)
        if watch.obstacle is not None:  # it was caught by the computation
            raise watch.obstacle
        watch.check_outputs(outputs, given)
    if changed or moved:
        raise ObstacleError(f"its forward sets {[*changed, *moved][0]}, which a replay does not")
    return Look(watch.launches, watch.most, watch.operators)


def _forget(fakes: Any) -> None:
    """Clear a mode's weak references to the weights, which it keeps until the garbage collector has found it.

    torch exchanges no tensor that is weakly referenced (`torch.utils.swap_tensors`, `module.to` with
    `torch.__future__.set_swap_module_params_on_conversion`).
    """
    describer = getattr(getattr(fakes.fake_tensor_converter, "meta_converter", None), "describer", None)
    for name in ("lookup_tensor", "lookup_storage"):
        getattr(describer, name, {}).clear()


def _reason(error: Exception) -> str:
    function = getattr(error, "func", None)
    if isinstance(error, fake_tensor.DataDependentOutputException):
        return f"{function} reads a value from the device"
    if isinstance(error, fake_tensor.DynamicOutputShapeException):
        return f"the size of the result of {function} depends on values"
    return f"it cannot be traced: {type(error).__name__}: {message_of(error)}"


def _place(traceback: TracebackType | None) -> str:
    """Return the class of the innermost module whose code runs in a traceback, as the end of a sentence."""
    place = ""
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            place = f" in {type(owner).__name__}"
        traceback = traceback.tb_next
    return place


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operator of a trace.

    Args:
        device: Device of the computation.
        module: The module that computes.
    """

    def __init__(self, device: torch.device, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        held = [tensor for inner in module.modules() for tensor in _tensors(dict(vars(inner)))]
        self._kept = {_key(tensor) for tensor in held}
        self.launches = 0
        self.most = 0
        self.operators: list[Hashable] = []
        self.obstacle: ObstacleError | None = None
        self._now = 0
        self._held: list[torch.Tensor] = []
        self._own: dict[int, int] = {}  # number of living tensors of each storage that was made in the trace
        self._watches: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if function.namespace == "prim":  # a question about a tensor, such as its device
            return function(*args, **kwargs)
        if self._is_about_a_number(args, kwargs):
            with fake_tensor.unset_fake_temporarily():
                return function(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:
                result = function.decompose(*args, **kwargs)  # in inference mode operators come whole
            if result is not NotImplemented:
                return result
        obstacle = self._obstacle(function, args, kwargs)
        if obstacle is not None:
            self.obstacle = ObstacleError(obstacle)
            raise self.obstacle
        before = self._layout_of_others(function, args)
        result = function(*args, **kwargs)
        if before != self._layout_of_others(function, args):
            self.obstacle = ObstacleError(f"{function} changes a tensor that it was given or keeps")
            raise self.obstacle
        if self._copies(function, args, kwargs, _tensors(result)):
            self.obstacle = ObstacleError(f"{function} copies between the host and the device")
            raise self.obstacle
        self._count(function, result)
        self.operators.append((str(function), *_numbers(function, args, kwargs)))
        return result

    def _layout_of_others(self, function: Any, args: Any) -> Hashable:
        """Return the layout and memory of a tensor that is turned where it is, unless it was made in the trace."""
        if torch.Tag.inplace_view not in function.tags or _key(args[0]) in self._own:
            return None
        return _key(args[0]), tuple(args[0].shape), args[0].stride()

    def _copies(self, function: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> bool:
        """Check for a copy between the host and the device.

        A number of the host that was made in this call is none: a kernel is given it as a constant.
        """
        given = _tensors((args, kwargs))
        if all(tensor.device != self._device for tensor in (*given, *made)):
            if any(_key(tensor) in self._kept for tensor in given):  # somebody may write what it was made of
                self._kept |= {_key(tensor) for tensor in made}
                self._held += made
            return False
        if not _is_copy(function, _named(function, args, kwargs)):
            given = [one for one in given if one.device.type != "cpu" or one.dim() or _key(one) in self._kept]
        return any(tensor.device != self._device for tensor in (*given, *made))

    def _is_about_a_number(self, args: Any, kwargs: Any) -> bool:
        """Check for a number of the host that was made in this call, as `torch.tensor` makes one.

        It is a constant, which may be read. Into a tensor that the module keeps, somebody may write another one.
        """
        leaves = _pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, torch.device) and leaf.type != "cpu" for leaf in leaves):
            return False
        return bool(tensors) and all(
            not isinstance(tensor, fake_tensor.FakeTensor)
            and (tensor.device.type, tensor.numel()) == ("cpu", 1)
            and _key(tensor) not in self._kept
            for tensor in tensors
        )

    def _obstacle(self, function: Any, args: Any, kwargs: Any) -> str | None:  # noqa: PLR0911 - each
        if torch.Tag.data_dependent_output in function.tags:
            return f"{function} reads a value from the device"
        if torch.Tag.dynamic_output_shape in function.tags:
            return f"the size of the result of {function} depends on values"
        made = function is torch.ops.aten.lift_fresh.default and self._device.type != "cpu"
        if made and any(tensor.device == self._device for tensor in _tensors(args)):
            return "torch.tensor copies Python's numbers to the device"
        schema = function._schema.arguments
        given = _named(function, args, kwargs)
        if torch.Tag.nondeterministic_seeded in function.tags and _draws(given):
            return f"{function} draws random numbers"
        if _writes_by_a_mask(given):
            return f"{function} asks the device for the places of a mask"
        for argument in [] if torch.Tag.inplace_view in function.tags else schema:  # `squeeze_` writes nothing
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(given.get(argument.name)):
                    if _key(tensor) not in self._own:
                        return f"{function} writes into a tensor that it was given or keeps"
        return None

    def _count(self, function: Any, result: Any) -> None:
        returned = [one.alias_info for one in function._schema.returns]
        if all(alias is None or alias.is_write for alias in returned):
            self.launches += 1
        for tensor in _tensors(result):
            key = _key(tensor)
            if key not in self._own:
                if any(alias is not None for alias in returned):
                    continue  # a view of a tensor that it was given
                self._own[key] = 0
                self._now += tensor.untyped_storage().nbytes()
                self.most = max(self.most, self._now)
            self._own[key] += 1
            self._watches.append(weakref.ref(tensor, self._freed(key, tensor.untyped_storage().nbytes())))

    def _freed(self, key: int, size: int) -> Callable[[Any], None]:
        def freed(_reference: Any) -> None:
            self._own[key] -= 1
            if self._own[key] == 0:
                del self._own[key]
                self._now -= size

        return freed

    def check_outputs(self, outputs: Any, given: list[Any]) -> None:
        """Check that results can be copied out of a recording.

        Raises:
            ObstacleError: One is of an unknown type, or a view of a tensor that lives on.
        """
        known = {id(tensor) for tensor in given}
        for leaf in _pytree.tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in known and (_key(leaf) not in self._own or leaf.is_conj() or leaf.is_neg()):
                    raise ObstacleError("it returns a view of a tensor that it was given or keeps")
            elif not isinstance(leaf, (bool, int, float, str, type(None), torch.dtype, torch.device)):
                raise ObstacleError(f"it returns a {type(leaf).__name__}, which cannot be copied")


_SIZES = frozenset({"size", "output_size", "input_size", "stride", "repeats"})
"""Names of arguments that are lengths by their nature. The stride of a convolution depends on none."""


def _numbers(function: Any, args: Any, kwargs: Any) -> list[str]:
    """Return what an operator is given besides tensors on the device and sizes; nothing of a view, which is a size."""
    if any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns):
        return []
    named = {**{one.name: value for one, value in zip(function._schema.arguments, args, strict=False)}, **kwargs}
    found = []
    for name, value in named.items():
        for leaf in [] if name in _SIZES else _pytree.tree_leaves(value):
            if not isinstance(leaf, torch.Tensor):
                found.append(f"{name}={leaf!r}")
            elif leaf.numel() == 1 and not isinstance(leaf, fake_tensor.FakeTensor) and leaf.device.type == "cpu":
                with fake_tensor.unset_fake_temporarily():
                    found.append(f"{name}={leaf.item()!r}")
    return found


def _draws(given: dict[str, Any]) -> bool:
    """Check that an operator that may draw random numbers does: attention and recurrent layers draw for dropout."""
    dropout = [value for name, value in given.items() if name in {"dropout_p", "dropout"}]
    return not dropout or bool(any(dropout) and given.get("train", True))


def _named(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of an operator by their names, with the defaults that torch does not pass on."""
    schema = function._schema.arguments
    given = {one.name: one.default_value for one in schema if one.has_default_value()}
    return {**given, **{one.name: value for one, value in zip(schema, args, strict=False)}, **kwargs}


def _is_copy(function: Any, given: dict[str, Any]) -> bool:
    """Check for an operator that copies a number of the host to the device, and waits for it."""
    if _puts(given):
        return not _fills(given)
    return function.overloadpacket in {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.copy}


def _puts(given: dict[str, Any]) -> bool:
    """Check for `x[places] = y`."""
    return isinstance(given.get("values"), torch.Tensor) and isinstance(given.get("indices"), (list, tuple))


def _fills(given: dict[str, Any]) -> bool:
    """Check for `x[mask] = y` where one number of the host is written wherever the mask is true."""
    values, masks = given["values"], [one for one in given["indices"] if isinstance(one, torch.Tensor)]
    is_one = values.device.type == "cpu" and values.numel() == 1
    return is_one and len(masks) == 1 and _is_mask(masks[0]) and not given.get("accumulate")


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in {torch.bool, torch.uint8}


def _writes_by_a_mask(given: dict[str, Any]) -> bool:
    """Check for `x[mask] = y`, which asks the device for the places of the mask unless it fills them."""
    return _puts(given) and any(map(_is_mask, given["indices"])) and not _fills(given)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def unchanged_attributes(module: nn.Module) -> Generator[list[str], None, None]:
    """Put the attributes of a module and its submodules back at the end, and list those that were set meanwhile.

    Lists and dictionaries among them are put back, too, without what is inside their items.
    """
    before = [(inner, dict(vars(inner)), _contents(vars(inner))) for inner in module.modules()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for inner, attributes, contents in before:
            now = vars(inner)
            names = [name for name in {**attributes, **now} if now.get(name, now) is not attributes.get(name, now)]
            names += [name for name in contents if not _same(attributes[name], contents[name])]
            # The hook of an old weight norm sets the weight that only its own layer reads.
            changed += [f"{name} of a {type(inner).__name__}" for name in names if f"{name}_g" not in inner._parameters]
            now.update(attributes)
            for name in set(now) - set(attributes):
                del now[name]
            for name in names:
                if name in contents and not _same(attributes[name], contents[name]):
                    attributes[name].clear()
                    getattr(attributes[name], "update" if isinstance(contents[name], dict) else "extend")(
                        contents[name]
                    )


_PLAIN = frozenset({torch.Tensor, nn.Parameter})
"""Types of tensors whose `data` has their own memory."""


@contextmanager
def _unmoved(module: nn.Module) -> Generator[list[str], None, None]:
    """Give the tensors of a module their memory back at the end, and list those that were given other one (`.data`)."""
    before = [
        (inner, name, tensor, tensor.data)
        for inner in module.modules()
        for place in (vars(inner), inner._parameters, inner._buffers)
        for name, tensor in place.items()
        if isinstance(tensor, torch.Tensor) and type(tensor) in _PLAIN
    ]
    moved: list[str] = []
    try:
        yield moved
    finally:
        for inner, name, tensor, data in before:
            if _key(tensor) != _key(data):
                with torch.inference_mode(mode=tensor.is_inference()):
                    tensor.data = data
                moved.append(f"{name}.data of a {type(inner).__name__}")


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() for name, value in attributes.items() if type(value) in {list, dict}}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(value is other[name] for name, value in one.items())
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
