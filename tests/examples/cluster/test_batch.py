"""An audiobook on two nodes, one of which is killed; and one that is continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TEXT = " ".join(f"This is sentence {number} of some. And another one." for number in range(20))


def test_a_killed_node_loses_nothing_and_a_book_is_continued(cluster: Any, tmp_path: Path) -> None:
    import soundfile

    from accelerate_tts.streaming import sentences
    from cluster.batch import Voice, bind, make, speak

    voice, folder = Voice("standin:slow"), tmp_path / "sentences"
    seen: list[int] = []

    def heard(done: int, count: int) -> None:
        assert count == 21  # the same sentence is spoken once
        seen.append(done)
        if done >= 4 and cluster.second is not None:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None

    made = make(TEXT, folder, voice, together=2, ahead=6, heard=heard)
    assert cluster.second is None
    assert (made.spoken, made.kept) == (21, 0)
    assert seen == sorted(seen)
    assert seen[-1] == 21
    book = tmp_path / "book.wav"
    bind(TEXT, folder, voice, book)
    sound, rate = soundfile.read(book)
    _, alone = speak(voice, sentences(TEXT))
    pause = np.zeros(int(0.15 * rate))
    expected = np.concatenate([part for one in alone for part in (pause, one)][1:])
    assert len(sound) == len(expected)
    assert np.abs(sound - expected).max() <= 1 / 32767

    # Continued: half of it is gone, and one sentence is another one now.
    for path in sorted(folder.glob("*.wav"))[:8]:
        path.unlink()
    made = make(TEXT.replace("sentence 3 of", "sentence three of"), folder, voice)
    assert made.spoken + made.kept == 21
    assert made.spoken in {8, 9}  # the changed one may be among those that are gone
    assert not list(folder.glob("*.part"))
    assert make(TEXT, folder, voice).spoken <= 1
