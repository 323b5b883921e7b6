"""The page in a headless Chromium: heard, used with the keyboard alone, and read aloud by its labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serving import Served

pytest.importorskip("playwright", reason="it drives the browser: pip install 'accelerate_tts[screenshots]'")

from service.screenshot import find_browser, opened, wait_for

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator[Any]:
    with opened(served.url) as page:
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if line.type in {"error", "warning"} else None)
        yield page
        assert [one for one in troubles if "status of 400" not in one] == []  # a refused text is in the browser's log


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id"))


def figure(page: Any, name: str) -> str:
    return str(page.locator(f"dt:has-text('{name}') + dd").text_content())


def test_it_is_used_with_the_keyboard_alone(page: Any) -> None:
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        if focused(page) in seen:
            break
        seen.append(focused(page))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{seen[-1]} does not show that it has the focus"
    assert seen[:6] == ["text", "model", "voice", "precision", "stream", "speak"]
    page.get_by_label("Text").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("one two three four")
    for _ in range(5):
        page.keyboard.press("Tab")
    assert focused(page) == "speak"
    page.keyboard.press("Enter")
    wait_for(page, "Done.")
    assert figure(page, "Speech") == "1.00 s"
    assert figure(page, "First audio").endswith(" s")
    assert float(figure(page, "Real-time factor")) > 0.0


def test_what_it_plays_is_heard(page: Any) -> None:
    """The loudspeaker's clock has run for as long as the speech is, and what was played is what was said."""
    page.evaluate("""() => {
      window.heard = [];
      const start = AudioBufferSourceNode.prototype.start;
      AudioBufferSourceNode.prototype.start = function (at) {
        window.heard.push({ at, length: this.buffer.duration, now: this.context.currentTime,
                            loud: Math.max(...this.buffer.getChannelData(0)) });
        start.call(this, at);
      };
    }""")
    page.get_by_label("Text").fill("one two WAIT:0.2 three")
    page.get_by_role("button", name="Speak").click()
    wait_for(page, "Done.")
    heard = page.evaluate("window.heard")
    assert sum(piece["length"] for piece in heard) == pytest.approx(0.75, abs=0.01)
    assert all(after["at"] >= before["at"] + before["length"] - 1e-6 for before, after in zip(heard, heard[1:]))  # noqa: RUF007, B905
    assert max(piece["loud"] for piece in heard) == pytest.approx(0.3, abs=0.03)


def test_without_streaming_there_is_a_player(page: Any) -> None:
    page.get_by_label("Stream it").uncheck()
    page.get_by_label("Text").fill("one two")
    page.get_by_role("button", name="Speak").click()
    wait_for(page, "Done.")
    player = page.locator("audio")
    assert player.is_visible()
    page.wait_for_function("document.getElementById('player').duration > 0.49")
    page.get_by_label("Stream it").check()


def test_stop_and_a_refusal_are_said_aloud(page: Any) -> None:
    page.get_by_label("Text").fill("one WAIT:1 two")
    page.get_by_role("button", name="Speak").click()
    page.get_by_role("button", name="Stop").click()
    wait_for(page, "Stopped.")
    page.get_by_label("Text").fill("REFUSE")
    page.get_by_role("button", name="Speak").click()
    wait_for(page, "that cannot be said")
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"


def test_each_control_has_a_name(page: Any) -> None:
    """The accessibility tree, as a screen reader has it."""
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, select, textarea, button, audio, a")]
      .filter((one) => one.checkVisibility())
      .filter((one) => !(one.labels?.length || one.textContent.trim() || one.getAttribute("aria-label")))
      .map((one) => one.id)""")
    assert nameless == []
    for role, name in (("combobox", "Model"), ("combobox", "Voice"), ("combobox", "Precision"), ("textbox", "Text"),
                       ("checkbox", "Stream it"), ("button", "Speak"), ("button", "Stop")):  # fmt: skip
        assert page.get_by_role(role, name=name).count() == 1


def test_it_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
