"""Builds the kernels' library into the wheel, which is then for a platform and for every Python 3: py3-none-<platform>.

Without a C++ compiler, or with ACCELERATE_TTS_PURE=1, the wheel is a pure one: it works, without our kernels, and the
first load that would have used them says so. ACCELERATE_TTS_PURE=0 makes a missing compiler an error instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PURE = "ACCELERATE_TTS_PURE"


class KernelsBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's generic of a builder's config
    """Called by hatchling before it packs a wheel."""

    PLUGIN_NAME = "custom"
    _folder = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, and say which platform the wheel is for.

        Args:
            version: "standard" or "editable".
            build_data: Values that hatchling reads afterwards.

        Raises:
            RuntimeError: The compiler failed, or there is none and ACCELERATE_TTS_PURE=0 forbids to go on without.
        """
        if self.target_name != "wheel" or os.environ.get(_PURE, "") not in {"", "0"}:
            return
        build = _module(Path(self.root) / "accelerate_tts" / "kernels" / "build.py")
        # An editable install uses this folder itself.
        self._folder = "" if version == "editable" else tempfile.mkdtemp()
        try:
            library = build.build(Path(self._folder) if self._folder else None)
        except build.NoCompilerError as error:
            if os.environ.get(_PURE) == "0":
                raise
            self.app.display_warning(f"accelerate_tts is built without its kernels: {error}")
            return
        if self._folder:
            build_data["force_include"][str(library)] = f"accelerate_tts/kernels/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Tidy up when the wheel is packed.

        Args:
            version: As for `initialize`.
            build_data: As for `initialize`.
            artifact_path: The wheel.
        """
        del version, build_data, artifact_path
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _module(path: Path) -> Any:
    """A file of the package by itself: the package cannot be imported where wheels are built."""
    spec = importlib.util.spec_from_file_location("_accelerate_tts_build", path)
    if spec is None or spec.loader is None:  # never, of a file that is there
        raise RuntimeError(f"{path} cannot be read")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
