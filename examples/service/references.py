"""Uploaded reference voices: checked, converted to one form, and kept in a folder."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from service.decode import REFUSED
from service.options import Options
from service.problems import bad_request

_HERE = Path(__file__).parent.parent
_ID = re.compile(r"voice_[0-9a-f]{24}")
_LONGEST_NAME = 64
_DECODE_SECONDS = 30.0


@dataclass(frozen=True)
class Reference:
    """An uploaded voice, as the API shows it."""

    id: str
    name: str
    created_at: int
    object: str = "audio.voice"


class References:
    """The voices in a folder: a WAV file and a JSON file for each. The id is made of the sound."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._folder = options.folder / "voices"
        self._decoding = asyncio.Semaphore(1)

    def all(self) -> list[Reference]:
        """Return all voices, the oldest first."""
        found = []
        for path in self._folder.glob("voice_*.json"):
            # Deleted meanwhile, or not ours.
            with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
                voice = Reference(**json.loads(path.read_text("utf-8")))
                if _ID.fullmatch(voice.id) and voice.name.isprintable() and type(voice.created_at) is int:
                    found.append(voice)
        return sorted(found, key=lambda voice: (voice.created_at, voice.id))

    def path(self, name: str) -> Path | None:
        """Return the recording of a voice by its id, or `None` if there is none."""
        if not _ID.fullmatch(name):  # it becomes part of a path
            return None
        path = self._folder / f"{name}.wav"
        return path.absolute() if path.is_file() else None

    def delete(self, name: str) -> bool:
        """Delete a voice. Returns False if there is none."""
        path = self.path(name)
        if path is None:
            return False
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return True

    async def add(self, name: str, read: Callable[[], Awaitable[bytes]]) -> Reference:
        """Keep a recording, which is read when it is its turn. Recordings are decoded one at a time.

        Raises:
            Problem: The name or the recording is refused.
        """
        if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
            raise bad_request(f"name must have 1 to {_LONGEST_NAME} printable characters", "name")
        async with self._decoding:
            if len(self.all()) >= self._options.voices:
                raise bad_request(f"{self._options.voices} voices are kept already; delete one", None, "too_many", 409)
            content = await read()
            if len(content) > self._options.upload_bytes:
                most = self._options.upload_bytes
                message = f"the recording has {len(content)} bytes; send at most {most}"
                raise bad_request(message, "audio_sample", "too_large", 413)
            with self._workshop() as temporary:
                source, target = temporary / "source", temporary / "target"
                await asyncio.to_thread(source.write_bytes, content)
                await self._decode(source, target)
                return await asyncio.to_thread(self._keep, name, target)

    @contextmanager
    def _workshop(self) -> Generator[Path, None, None]:
        """Have a folder for a block, on the disk of the voices, so that files can be moved and not only copied."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            yield Path(folder)

    def _keep(self, name: str, sound: Path) -> Reference:
        key = hashlib.sha256(sound.read_bytes()).hexdigest()[:24]
        voice = Reference(f"voice_{key}", name, int(time.time()))
        description = sound.with_name("description")
        description.write_text(json.dumps(asdict(voice)), "utf-8")
        sound.replace(self._folder / f"{voice.id}.wav")
        description.replace(self._folder / f"{voice.id}.json")
        return voice

    async def _decode(self, source: Path, target: Path) -> None:
        path = os.pathsep.join(filter(None, (str(_HERE), os.environ.get("PYTHONPATH"))))
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service.decode", str(source), str(target),
            *map(str, self._options.upload_seconds), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            said, _ = await asyncio.wait_for(child.communicate(), _DECODE_SECONDS)
        except asyncio.TimeoutError:
            said = b""
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode == REFUSED:
            raise bad_request(said.decode("utf-8", "replace").strip(), "audio_sample", "bad_recording")
        if child.returncode != 0:
            raise bad_request("the recording cannot be decoded", "audio_sample", "bad_recording")
