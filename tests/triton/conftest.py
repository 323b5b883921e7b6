"""Tests of the Triton kernels in Triton's interpreter, on a CPU. `test_interpreter.py` starts them in a process each.

Triton decides when it is imported whether it interprets, so this process stays as it is.
"""

from __future__ import annotations

import os

IS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_interpreter.py"] if IS_INTERPRETER else ["test_token_*.py"]
