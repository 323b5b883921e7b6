"""Fixtures of the service's tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serving import Served

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[2] / "examples"

for folder in (str(EXAMPLES), str(HERE)):
    if folder not in sys.path:
        sys.path.append(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the tests of the example service as slow: each starts processes."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="package", autouse=True)
def workers_path() -> Iterator[None]:
    """Put the stand-in where the worker finds it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), before)))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start services, and end them with the test."""
    from serving import Served, options_of

    with ExitStack() as stack:

        def start(*, provider: Any = None, **changes: Any) -> Served:
            served = Served(options_of(tmp_path, **changes), provider)
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One service for all tests of a file."""
    from serving import Served, options_of

    one = Served(options_of(tmp_path_factory.mktemp("service"), upload_bytes=2**20, characters=10_000))
    one.ready()
    yield one
    one.stop()
