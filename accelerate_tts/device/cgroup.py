"""Folders of this process's control groups and their parents, in cgroup v2 and v1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def groups(controller: str, root: Path | str = "/") -> Iterator[tuple[Path, int]]:
    """Yield the folders whose limits apply to this process, with their cgroup version: its group and the parents.

    Inside a container, the group's path may be that of the host and not exist; the root of the mount is the group then.

    Args:
        controller: "cpu" or "memory".
        root: Folder of `/proc` and `/sys`; another folder in tests.
    """
    root = Path(root)
    # Each line of /proc/self/cgroup is "id:controllers:path"; v2 has the one line "0::/path".
    text = read(root / "proc/self/cgroup") or f"0::/\n1:{controller}:/"
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, group = rest.partition(":")
        if not separator:
            continue
        if controllers == "":
            yield from ((folder, 2) for folder in _with_parents(root / "sys/fs/cgroup", group))
        elif controller in controllers.split(","):
            for mount in dict.fromkeys((controller, f"{controller},cpuacct", controllers)):
                yield from ((folder, 1) for folder in _with_parents(root / "sys/fs/cgroup" / mount, group))


def _with_parents(mount: Path, group: str) -> list[Path]:
    folder = Path(group.lstrip("/"))
    return [mount / relative for relative in (folder, *folder.parents)]


def read(path: Path) -> str | None:
    """Return the text of a file, or `None` if it is missing or unreadable."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
