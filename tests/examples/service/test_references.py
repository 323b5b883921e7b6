"""The folder of uploaded voices."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from service.options import Options
from service.references import Reference, References

ID = f"voice_{'0' * 24}"
OURS = f'{{"id": "{ID}", "name": "Ann", "created_at": 3, "object": "audio.voice"}}'


@pytest.mark.parametrize(
    "other",
    [
        "null", "[]", "{}", "[" * 100_000, OURS.replace("3", "1e999"), OURS.replace("3", '"x"'),
        OURS.replace('"Ann"', "2"), OURS.replace("Ann", "\\ud800"), OURS.replace(ID, "other"),
    ],
)  # fmt: skip
def test_a_description_that_is_not_ours_hides_no_voice(other: str, tmp_path: Path) -> None:
    references = References(Options(folder=tmp_path))
    assert references.all() == []
    (tmp_path / "voices").mkdir()
    (tmp_path / "voices" / "voice_1.json").write_text(OURS, "utf-8")
    (tmp_path / "voices" / "voice_2.json").write_text(other, "utf-8")
    assert references.all() == [Reference(ID, "Ann", 3)]
