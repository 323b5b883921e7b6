"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[2] / "examples"
STAND_IN = HERE.parent / "service"

for folder in (str(EXAMPLES), str(STAND_IN)):
    if folder not in sys.path:
        sys.path.append(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the tests of the cluster as slow: each starts a dozen processes."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what Ray on this machine alone wants; skip a test without Ray."""
    # Read when ray is imported: with 0 it finds nodes at the loopback address, as it does on macOS and Windows.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    pytest.importorskip("ray", reason="the cluster needs it: pip install 'accelerate_tts[cluster]'")
    for name in ("fastapi", "prometheus_client", "soundfile", "soxr"):
        pytest.importorskip(name, reason="its voices are the service's: pip install 'accelerate_tts[service]'")
    path = os.pathsep.join(filter(None, (str(EXAMPLES), str(STAND_IN), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, ray_here: None) -> Iterator[Any]:
    """Two nodes of one processor each; the test's process is at the first one, and the second may be killed."""
    del ray_here
    import ray
    from ray.cluster_utils import Cluster

    # Of 5 seconds: on a busy machine a proxy takes longer to be imported, and is killed before it has run.
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    monkeypatch.setenv("RAY_health_check_period_ms", "200")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "1000")
    for name in ("REPLICA", "HANDLE"):
        monkeypatch.setenv(f"RAY_SERVE_{name}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.2")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
    nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        nodes.second = nodes.add_node(**small)
        ray.init(address=nodes.address, log_to_driver=False)
        nodes.wait_for_nodes()
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
