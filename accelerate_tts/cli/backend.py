"""Backends of the user that the command line names as `module:Class`: found, made, loaded and called."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_tts.decorators import is_load_function
from accelerate_tts.errors import AccelerateTTSError, described

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from types import ModuleType


_SHAPE = "such as my_service.backends:ChatterboxBackend"


class BackendError(AccelerateTTSError, ValueError):
    """A backend cannot be found, made, loaded or called as asked. The message names the value and the solution."""


@dataclass(frozen=True)
class Backend:
    """A class with a decorated load method.

    Attributes:
        module: Name of its module.
        cls: The class.
        load: Name of the method that `@optimized_model` decorates.
        methods: Names of the methods that `@inference` decorates, at least one.
    """

    module: str
    cls: type
    load: str
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.cls.__qualname__

    def made(self, given: dict[str, Any]) -> Any:
        """Make an object of the class, without loading it.

        Args:
            given: Keyword arguments of the class.

        Raises:
            BackendError: The class needs other arguments, or raised an exception.
        """
        try:
            signature = inspect.signature(self.cls)
        except ValueError:  # a built-in base without a signature
            signature = None
        if signature is not None:
            _check_arguments(self.name, signature, given, "--init")
        try:
            made = self.cls(**given)
        except (Exception, SystemExit) as error:  # of the user's code
            raise BackendError(f"{self.name}() failed: {described(error)}; {self._alone('')}") from error
        needed = _missing(inspect.signature(getattr(made, self.load)), {})
        if needed:
            raise BackendError(
                f"{self.name}.{self.load}() needs {', '.join(needed)}; give each a default, or take it in the class"
                f" and give --init {needed[0]}=VALUE"
            )
        return made

    def loaded(self, made: Any) -> Any:
        """Call the load method, to its end if it is a coroutine. Returns its result.

        Raises:
            BackendError: It raised an exception.
            AccelerateTTSError: Its warm-up does not fit, or an option has an invalid value.
        """
        try:
            return _completed(getattr(made, self.load)())
        except AccelerateTTSError:
            raise
        except (Exception, SystemExit) as error:  # of the user's code
            why = f"{self.name}.{self.load}() failed: {described(error)}"
            raise BackendError(f"{why}; {self._alone(f'.{self.load}()')}") from error

    def method(self, made: Any, name: str | None, given: dict[str, Any]) -> str:
        """Return the name of the `@inference` method that speaks a text.

        Args:
            made: An object of the class.
            name: The name, or `None` for the one that a warm-up text would take.
            given: Its other arguments, by name.

        Raises:
            BackendError: There is no such method, or several could be meant.
        """
        from accelerate_tts.tuning.warmup import SPEAKING

        if name is not None:
            if name not in self.methods:
                known = ", ".join(self.methods)
                raise BackendError(f"--method {name}: {self.name} has no @inference method of this name, but {known}")
            return name
        able = [method for method in self.methods if self._is_able(made, method, given)]
        usual = [method for method in SPEAKING if method in able]
        if usual or len(able) == 1:
            return (usual or able)[0]
        if able:
            raise BackendError(f"any of {', '.join(able)} could speak the text; give --method {able[0]}")
        if len(self.methods) == 1:
            return self.methods[0]  # the call says what it lacks
        raise BackendError(
            f"none of {', '.join(self.methods)} of {self.name} takes the text alone; give --method {self.methods[0]},"
            " and its other arguments as --arg NAME=VALUE"
        )

    def call(self, made: Any, method: str, text: str, given: dict[str, Any]) -> Callable[[], Any]:
        """Return a call of a method with a text, which runs to its end; of a stream it returns the list of pieces.

        Args:
            made: An object of the class.
            method: Name of the method.
            text: The text, for the first parameter that is not in `given`.
            given: Further arguments, by name.

        Raises:
            BackendError: The method takes no text, needs other arguments, or has none of these names. The call itself
                raises it for an exception of the method.
        """
        bound = getattr(made, method)
        signature = inspect.signature(bound)
        what = f"{self.name}.{method}"
        first = _text_parameter(signature, given)
        if first is None:
            raise BackendError(f"{what}{signature} takes no text beside {', '.join(given) or 'nothing'}; name another"
                               " --method, or leave the argument that is the text out of --arg")  # fmt: skip
        _check_arguments(what, signature, given | {first: text}, "--arg")
        positional = signature.parameters[first].kind is inspect.Parameter.POSITIONAL_ONLY

        def speak() -> Any:
            try:
                return _completed(bound(text, **given) if positional else bound(**{first: text}, **given))
            except AccelerateTTSError:
                raise
            except (Exception, SystemExit) as error:  # of the user's code
                raise BackendError(
                    f"{what}({text[:40]!r}) failed: {described(error)}; mend it, or give other --arg"
                ) from error

        return speak

    def _is_able(self, made: Any, method: str, given: dict[str, Any]) -> bool:
        signature = inspect.signature(getattr(made, method))
        first = _text_parameter(signature, given)
        return first is not None and not _missing(signature, given | {first: ""})

    def _alone(self, call: str) -> str:
        line = f"from {self.module} import {self.name}; {self.name}(){call}"
        return f'python -c "{line}" shows where'


def find(target: str, load: str | None = None) -> Backend:
    """Import a backend's module and find the class and its decorated methods.

    Modules are looked for in the current folder, and where Python finds packages.

    Args:
        target: `module:Class`.
        load: Name of the load method; needed only if several methods are decorated with `@optimized_model`.

    Raises:
        BackendError: The module cannot be imported, or has no such class with decorated methods.
    """
    module_name, colon, class_name = target.partition(":")
    if not (colon and module_name and class_name):
        raise BackendError(f"{target!r} names no class; give module:Class, {_SHAPE}")
    if module_name.endswith(".py") or os.sep in module_name:
        name = ".".join(Path(os.path.relpath(module_name)).with_suffix("").parts).strip(".")
        raise BackendError(f"{module_name!r} is a file; give the name of the module, {name}:{class_name}")
    cls = _attribute(_imported(module_name), class_name)
    if not isinstance(cls, type):
        raise BackendError(
            f"{target!r} is a {type(cls).__name__}, not a class; give the class with the decorated methods, {_SHAPE}"
        )
    from accelerate_tts.tuning.warmup import inference_methods

    loads = _loads(cls)
    if not loads:
        raise BackendError(f"{class_name} has no method decorated with @optimized_model; decorate the one that loads")
    if load is None and len(loads) > 1 and "load" not in loads:
        raise BackendError(f"any of {', '.join(loads)} could load {class_name}; give --load {loads[0]}")
    if load is not None and load not in loads:
        raise BackendError(
            f"--load {load}: {class_name} has no @optimized_model method of this name, but {', '.join(loads)}"
        )
    methods = inference_methods(cls)
    if not methods:
        raise BackendError(f"{class_name} has no method decorated with @inference; decorate the one that speaks")
    chosen = load or ("load" if "load" in loads else loads[0])
    return Backend(module_name, cls, chosen, tuple(methods))


def _completed(result: Any) -> Any:
    from accelerate_tts.runtime.completion import complete

    return complete(result, _service_loop() if isinstance(result, (Awaitable, AsyncIterator)) else None)


@cache
def _service_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs to the end of the process, as a service's does.

    What a backend begins on it, such as a task that collects batches, goes on between its calls.
    """
    import asyncio

    loop = asyncio.new_event_loop()

    def serve() -> None:
        while not loop.is_closed():
            with suppress(SystemExit, KeyboardInterrupt):  # of a backend's call, whose caller gets it, too
                loop.run_forever()

    threading.Thread(target=serve, name="accelerate_tts-service", daemon=True).start()
    return loop


def values_of(words: Sequence[str], option: str) -> dict[str, Any]:
    """Read `name=value` words. Values are Python's literals (`0.5`, `None`, `[1, 2]`), all else is text.

    Raises:
        BackendError: A word has no "=", or no name before it.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (equals and name.isidentifier()):
            raise BackendError(f"{option} {word!r}: write NAME=VALUE, such as {option} language=en")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal, so a text
            found[name] = text
    return found


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and f"{name}.".startswith(f"{missing}."):
            raise BackendError(
                f"there is no module {missing!r} in {here}, nor where Python finds packages; run the command in the"
                " folder that has it, or name that folder in PYTHONPATH"
            ) from None
        raise BackendError(f"{name} cannot be imported: {error}; install {missing}, which it needs") from error
    except (Exception, SystemExit) as error:  # of the user's code
        raise BackendError(
            f'{name} cannot be imported: {described(error)}; python -c "import {name}" shows where'
        ) from error


def _attribute(module: ModuleType, name: str) -> Any:
    found: Any = module
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise BackendError(_no_class(module, name)) from None
    except Exception as error:  # of the user's __getattr__
        what = f"{module.__name__}:{name}"
        raise BackendError(f"{what} cannot be read: {described(error)}; mend that, or name another class") from error
    return found


def _no_class(module: ModuleType, name: str) -> str:
    found = [key for key, value in vars(module).items() if isinstance(value, type) and _loads(value)]
    near = get_close_matches(name, found, 1)
    mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(found)}" if found else (
        "no class in it has a load method decorated with @optimized_model"
    )  # fmt: skip
    return f"{module.__name__} has no {name}; {mend}"


def _loads(cls: type) -> list[str]:
    return [name for name in dict.fromkeys(name for base in cls.__mro__ for name in vars(base))
            if is_load_function(inspect.getattr_static(cls, name))]  # fmt: skip


def _text_parameter(signature: inspect.Signature, given: dict[str, Any]) -> str | None:
    kinds = inspect.Parameter
    takes = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    return next((name for name, one in signature.parameters.items() if one.kind in takes and name not in given), None)


def _missing(signature: inspect.Signature, given: dict[str, Any]) -> list[str]:
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, one in signature.parameters.items()
        if one.default is one.empty and one.kind not in many and name not in given
    ]


def _check_arguments(what: str, signature: inspect.Signature, given: dict[str, Any], option: str) -> None:
    parameters = signature.parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        for name, value in given.items():
            if name not in parameters:
                known = ", ".join(parameters) or "nothing"
                raise BackendError(f"{option} {name}={value}: {what}() has no argument {name}; it takes {known}")
    needed = _missing(signature, given)
    if needed:
        raise BackendError(f"{what}() needs {', '.join(needed)}, too; give {option} {needed[0]}=VALUE")
