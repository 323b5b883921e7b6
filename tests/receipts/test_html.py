"""The page of a receipt: what it shows, that it is well-formed, and that no text of a receipt becomes a part of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import escape

from accelerate_tts.receipts.format import duration, error_text, ratio_text
from accelerate_tts.receipts.receipt import Receipt, StageResult, printable

STAGES = (
    StageResult("decoder", "fold weight norm", True, "faster", 0.4, 0.1, 4.0, 3.5, 3e-7, None, 0.5),
    StageResult("encoder", "torch.compile", False, "no gain", 0.0002, 0.0004, 0.5, 0.4, 0.0, 1, 2.0),
    StageResult("flow", "channels-last", False, "not tried: 1.5 % of the time"),
)
RECEIPT = Receipt(
    "Vits", "cpu (Test)", {"torch": "2.14"}, STAGES, 1.5, 0.8, 0.4, 2.0, 3e-5, 4.5, ("a note", "more"),
    shares={"encoder": 0.1, "decoder": 0.8},
)  # fmt: skip


# --- a reader of pages that takes no nonsense ----------------------------------------------------------------------


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""  # of the node and of all that is in it
    children: list[Node] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Node]:
        """Every node below of that tag and those attributes (`class_` for class), in order."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        found = [self] if self.tag == tag and wanted.items() <= self.attributes.items() else []
        return found + [node for child in self.children for node in child.all(tag, **attributes)]

    def one(self, tag: str, **attributes: str) -> Node:
        (node,) = self.all(tag, **attributes)
        return node

    def skeleton(self) -> Any:
        """Tags and attributes, without texts and without the figures that follow from numbers."""
        return self.tag, self.attributes, [child.skeleton() for child in self.children]


class Page(HTMLParser):
    """A strict reader: every element is closed, in the right order, and there is nothing but elements and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert self.open == [self.root], f"not closed: {[node.tag for node in self.open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr":  # where a long name may be broken: no part of what the page has, nor of its text
            assert attrs == []
            return
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute is given twice: {attrs}"
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text += data

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html"
        assert self.root.children == []

    def refuse(self, data: str) -> None:
        raise AssertionError(f"this has no place on the page: {data!r}")

    handle_comment = handle_pi = unknown_decl = refuse


def page_of(receipt: Receipt) -> Node:
    return Page(receipt.to_html()).root.one("html")


def rows_of(page: Node, part: str) -> list[list[str]]:
    return [[cell.text for cell in row.children] for row in page.one(part).all("tr")]


def test_the_reader_of_these_tests_is_strict() -> None:
    for broken in (
        "<p>",
        "</p>",
        "<p><b></p></b>",
        "<p a='1' a='2'></p>",
        "<!-- x -->",
        "<?x>",
        "<p>\n<!DOCTYPE x></p>",
    ):
        with pytest.raises(AssertionError):
            Page(broken)


# --- what it shows -------------------------------------------------------------------------------------------------


def test_the_headline() -> None:
    page = page_of(RECEIPT)
    assert page.one("head").one("title").text == "Receipt: Vits on cpu (Test)"
    assert page.one("h1").text == "Receipt: Vits"
    assert [p.text for p in page.one("main").all("p")][:2] == ["on cpu (Test)", "torch 2.14"]
    facts = {node.one("dt").text: node.one("dd").text for node in page.one("dl").all("div")}
    assert facts == {
        "speed-up of the whole": "2.00x",
        "relative error": "3e-05",
        "warm pass before": "800.0 ms",
        "warm pass after": "400.0 ms",
        "cold first pass": "1.50 s",
        "tuning took": "4.50 s",
        "stages kept": "1 of 3",
        "recompiles": "0",
    }
    assert [node.text for node in page.one("ul").all("li")] == ["a note", "more"]


def test_the_recompiles_are_those_of_this_moment() -> None:
    page = page_of(replace(RECEIPT, _live=lambda: 7))
    assert "7" in [node.text for node in page.one("dl").all("dd")]
    assert rows_of(page, "tfoot")[0][-1] == "1 kept, 7 recompiles since warm-up"


def bars(page: Node) -> list[list[tuple[str, float, float]]]:
    """The bars of the chart: of each segment the class, and where it begins and how wide it is, in per cent."""
    rects = page.one("svg", role="img").all("rect")
    rows = sorted({int(rect.attributes["y"] or "") for rect in rects})
    return [
        [
            ((r.attributes["class"] or "").removeprefix("bar "), percent(r, "x"), percent(r, "width"))
            for r in rects
            if r.attributes["y"] == str(row)
        ]
        for row in rows
    ]


def percent(rect: Node, name: str) -> float:
    value = rect.attributes[name] or ""
    assert value.endswith("%")
    return float(value[:-1])


def legend(page: Node) -> list[str]:
    return [" ".join(node.text.split()) for node in page.one("ol").all("li")]


def test_both_bars_are_divided_by_parts() -> None:
    page = page_of(RECEIPT)
    # The decoder takes a quarter: of 0.1 + 0.1 + 0.8 / 4 = 0.4 the decoder is a half.
    assert bars(page) == [
        [("s0", 0.0, 80.0), ("s1", 80.0, 10.0), ("rest", 90.0, 10.0)],
        [("s0", 0.0, 25.0), ("s1", 25.0, 12.5), ("rest", 37.5, 12.5)],
    ]
    assert legend(page) == [
        "decoder 640.0 ms, now 200.0 ms",
        "encoder 80.0 ms, now 100.0 ms",
        "everything else 80.0 ms, now 100.0 ms",
    ]
    chart = page.one("svg", role="img")
    assert [node.text for node in chart.children if node.tag == "text"] == ["before: 800.0 ms", "after: 400.0 ms"]
    assert [group.one("title").text for group in chart.all("g")][:2] == ["decoder: 640.0 ms", "encoder: 80.0 ms"]
    assert [node.text for group in chart.all("g") for node in group.all("text")] == ["1", "2", "3"] * 2


def test_stages_that_build_on_each_other_shorten_their_part_together() -> None:
    """A ratio is to the stages before it, or to the slower alternative whose place it takes."""
    first = StageResult("decoder", "a", kept=True, reason="at least 1.9x (95 %)", ratio=2.0)
    slow = StageResult("decoder", "b", kept=False, reason="c is faster", ratio=1.25)
    slower = StageResult("decoder", "c", kept=False, reason="d is faster", ratio=1.28)
    better = StageResult("decoder", "d", kept=True, reason="at least 1.2x over c (95 %)", ratio=1.25)
    other = StageResult("decoder", "e", kept=False, reason="slower", ratio=0.5)
    page = page_of(replace(RECEIPT, stages=(first, slow, slower, better, other)))
    assert bars(page) == bars(page_of(RECEIPT))  # 2 * 1.25 * 1.28 * 1.25 is four times as fast, too


def test_an_earlier_receipt_has_one_segment() -> None:
    page = page_of(replace(RECEIPT, shares={}))
    assert bars(page) == [[("rest", 0.0, 100.0)], [("rest", 0.0, 50.0)]]
    assert legend(page) == ["everything 800.0 ms, now 400.0 ms"]


def test_many_parts_and_parts_beside_each_other() -> None:
    page = page_of(replace(RECEIPT, stages=(), shares={f"part {n}": 0.5 for n in range(8)}))
    before, after = bars(page)
    assert [kind for kind, *_ in before] == ["s0", "s1", "s2", "s3", "s4", "s5", "rest", "rest"]
    assert [round(width, 1) for *_, width in before] == [12.5] * 6 + [25.0, 0.0]
    assert [round(width, 2) for *_, width in after] == [6.25] * 6 + [12.5, 0.0]
    assert legend(page)[-2].startswith("smaller parts")


def test_bars_lie_in_the_chart_and_do_not_cover_each_other() -> None:
    chart = page_of(RECEIPT).one("svg", role="img")
    spans = sorted({(int(r.attributes["y"] or ""), int(r.attributes["height"] or "")) for r in chart.all("rect")})
    assert all(top + height <= below[0] for (top, height), below in pairwise(spans))
    assert sum(spans[-1]) <= int(chart.attributes["height"] or "")
    for row in bars(page_of(RECEIPT)):
        assert all(left + width == pytest.approx(after) for (_, left, width), (_, after, _) in pairwise(row))


def test_the_table_has_every_stage_and_the_whole() -> None:
    page = page_of(RECEIPT)
    assert rows_of(page, "thead") == [
        ["part", "stage", "before", "after", "ratio", "at least", "error", "trying took", "verdict"]
    ]
    assert rows_of(page, "tbody") == [
        ["decoder", "fold weight norm", "400.0 ms", "100.0 ms", "4.00x", "3.50x", "3e-07", "500.0 ms", "kept, faster"],
        ["encoder", "torch.compile", "200 us", "400 us", "0.50x", "0.40x", "bit-exact", "2.00 s", "rejected: no gain"],
        ["flow", "channels-last", "-", "-", "-", "-", "-", "-", "not tried: 1.5 % of the time"],
    ]
    assert rows_of(page, "tfoot") == [
        ["the whole", "all kept stages", "800.0 ms", "400.0 ms", "2.00x", "-", "3e-05", "4.50 s",
         "1 kept, 0 recompiles since warm-up"]
    ]  # fmt: skip
    kinds = [row.attributes["class"] for part in ("tbody", "tfoot") for row in page.one(part).all("tr")]
    assert kinds == ["kept", "rejected", "rejected", "whole"]


def test_a_receipt_of_nothing() -> None:
    page = page_of(Receipt("Vits", "cpu", {}))
    assert page.all("svg") == []
    assert "Nothing was timed." in page.text
    assert rows_of(page, "tbody") == [["No stage was tried."]]
    assert page.all("ul") == []
    assert page.one("dl").text.count("not known") == 4


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_figures_that_are_no_lengths_draw_no_bar(value: float) -> None:
    for odd in ({"before": value}, {"after": value}, {"before": None}, {"before": 0.0}):
        assert page_of(replace(RECEIPT, **odd)).all("svg") == []
    assert bars(page_of(replace(RECEIPT, shares={"decoder": value})))[0] == [("rest", 0.0, 100.0)]


def test_the_largest_figures_still_draw_bars() -> None:
    largest = sys.float_info.max
    for odd in ({"before": largest}, {"after": largest}, {"before": largest, "after": largest}):
        for row in bars(page_of(replace(RECEIPT, shares={"decoder": largest, "encoder": largest}, **odd))):
            assert all(0.0 <= left + width <= 100.1 for _, left, width in row)


def test_a_long_name_is_not_cut() -> None:
    part = "decoder." + "resblocks." * 20 + "weight"
    page = page_of(replace(RECEIPT, stages=(replace(STAGES[0], part=part),), shares={part: 0.5}))
    assert legend(page)[0].startswith(f"{part} ")
    assert rows_of(page, "tbody")[0][0] == part
    assert "resblocks.<wbr>resblocks." in replace(RECEIPT, shares={part: 0.5}).to_html()
    style = page.one("style").text
    assert "overflow-wrap: anywhere" in style
    assert "ellipsis" not in style


def test_on_a_phone_each_figure_stands_beside_its_name() -> None:
    page = page_of(RECEIPT)
    figures = page.one("tbody").all("tr")[0].all("td", class_="number")
    assert [cell.attributes["data-label"] for cell in figures] == [
        "before", "after", "ratio", "at least", "error", "trying took",
    ]  # fmt: skip
    assert "@media (max-width: 45rem)" in page.one("style").text


# --- what kind of page it is ---------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    source = RECEIPT.to_html()
    page = Page(source).root
    tags = {node.tag for node in walk(page)}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "a"}
    names = {name for node in walk(page) for name in node.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "style", "action", "data"}
    assert not [name for name in names if name.startswith("on")]
    for word in ("url(", "@import", "http:", "https:", "javascript"):
        assert word not in source.lower()
    assert "default-src 'none'" in source


def walk(node: Node) -> list[Node]:
    return [node, *(below for child in node.children for below in walk(child))]


def test_the_page_is_accessible() -> None:
    page = page_of(RECEIPT)
    assert page.attributes["lang"] == "en"
    assert page.one("meta", name="viewport").attributes["content"] == "width=device-width, initial-scale=1"
    assert page.one("meta", charset="utf-8")
    chart, *keys = page.all("svg")
    assert chart.attributes["role"] == "img"
    assert chart.attributes["aria-label"]
    assert all(key.attributes["aria-hidden"] == "true" for key in keys)
    assert all(cell.attributes == {"scope": "col"} for cell in page.one("thead").all("th"))
    assert all(len(row.all("th", scope="row")) == 1 for row in page.one("tbody").all("tr"))
    region = page.one("div", role="region")
    assert region.attributes["tabindex"] == "0"
    assert [node.text for node in page.all("h2", id=region.attributes["aria-labelledby"] or "")]


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    digits = colour if len(colour) == 6 else "".join(c * 2 for c in colour)
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_is_legible_in_both_modes() -> None:
    style = page_of(RECEIPT).one("style").text
    light, dark = (dict(re.findall(r"--(\w+): #(\w+)", block)) for block in re.findall(r":root \{[^}]*\}", style))
    assert style.index("prefers-color-scheme: dark") > style.index(":root")
    assert set(light) == set(dark) == set(re.findall(r"var\(--(\w+)\)", style))
    assert luminance(light["page"]) > 0.9
    assert luminance(dark["page"]) < 0.1
    for mode in (light, dark):
        segments = [mode[name] for name in ("s0", "s1", "s2", "s3", "s4", "s5", "rest")]
        assert len(set(segments)) == 7
        for text in ("ink", "quiet", "kept", "rejected"):  # 4.5 and 3.0 are WCAG's AA for text and for graphics
            assert contrast(mode[text], mode["page"]) >= 4.5, text
        for graphic in segments:
            assert contrast(graphic, mode["page"]) >= 3.0, graphic


def test_the_page_is_small() -> None:
    part = "decoder.resblocks.3.convs1.0.parametrizations.weight"
    reason = "at least 1.20x with 95 % confidence, relative error 3e-07 of 1e-04"
    stages = tuple(replace(STAGES[index % 2], part=part, reason=reason) for index in range(20))
    assert len(replace(RECEIPT, stages=stages, notes=(reason,) * 4).to_html().encode()) < 30_000


# --- nothing in a receipt is trusted -------------------------------------------------------------------------------

NASTY = (
    "</title>",
    "<script>alert(1)</script>",
    "<!--",
    "]]>",
    "&lt;",
    "&amp;",
    "&#60;",
    "'\"><b",
    "</svg>",
    "</style>",
)
ODD = ("\x00", "\x1b[31m", "\r\n", "\u2028", "\u202e", "\ud800", "\ufeff", "日本語", "e\u0301", "<" * 50)
texts = st.lists(st.one_of(st.text(max_size=10), st.sampled_from(NASTY + ODD)), max_size=4).map("".join)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0.0, 1e6)
stages_of_any_kind = st.builds(
    StageResult, texts, texts, st.booleans(), texts, numbers, numbers, numbers, numbers, numbers,
    st.none() | st.integers(0, 9), seconds,
)  # fmt: skip
receipts = st.builds(
    Receipt, texts, texts, st.dictionaries(texts, texts, max_size=3),
    st.lists(stages_of_any_kind, max_size=4).map(tuple), numbers, numbers, numbers, st.floats(0.0, 1e3), numbers,
    seconds, st.lists(texts, max_size=3).map(tuple), st.integers(0, 9),
    shares=st.dictionaries(texts, st.floats(0.0, 2.0), max_size=8),
)  # fmt: skip


def harmless(receipt: Receipt) -> Receipt:
    """The same receipt with an x for every text."""
    names = {name: f"x{number}" for number, name in enumerate(receipt.shares)}
    stages = tuple(replace(one, part=names.get(one.part, "x"), stage="x", reason="x") for one in receipt.stages)
    shares = {names[name]: share for name, share in receipt.shares.items()}
    notes = tuple("x" for _ in receipt.notes)
    return replace(receipt, what="x", device="x", versions={}, stages=stages, notes=notes, shares=shares)


WORST = StageResult("<script>alert(1)</script>", "</title></svg>", False, "RuntimeError: <b onclick='x'>&lt;", 1.0, 2.0)


@given(receipts)
@example(Receipt("<!--", "</title><script>", {"</style>": "&amp;"}, (WORST,), before=1.0, after=1.0, notes=("]]>",)))
def test_no_text_of_a_receipt_becomes_a_part_of_the_page(receipt: Receipt) -> None:
    source = receipt.to_html()
    source.encode()  # half of a surrogate pair would refuse
    page = Page(source).root
    assert page.skeleton() == Page(harmless(receipt).to_html()).root.skeleton()
    words = [receipt.what, receipt.device, *receipt.versions, *receipt.versions.values(), *receipt.notes]
    words += [word for stage in receipt.stages for word in (stage.part, stage.stage, stage.verdict)]
    for word in words:
        assert str(escape(printable(word))) in source.replace("<wbr>", "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", source)


@given(receipts)
def test_what_was_given_is_what_a_reader_sees(receipt: Receipt) -> None:
    page = page_of(receipt)
    assert page.one("h1").text == f"Receipt: {printable(receipt.what)}"
    assert [node.text for ul in page.all("ul") for node in ul.all("li")] == [printable(note) for note in receipt.notes]
    expected = [
        [printable(s.part), printable(s.stage), duration(s.before), duration(s.after), ratio_text(s.ratio),
         ratio_text(s.low), error_text(s.error), duration(s.seconds or None), printable(s.verdict)]
        for s in receipt.stages
    ]  # fmt: skip
    assert rows_of(page, "tbody") == (expected or [["No stage was tried."]])
    if page.all("svg"):
        for row in bars(page):
            assert all(0.0 <= left + width <= 100.1 for _, left, width in row)
        shown = sorted(receipt.shares, key=lambda name: -receipt.shares[name])[:6]
        names = [name for name in shown if receipt.shares[name] > 0.0]
        texts_of = [" ".join(printable(name).split()) for name in names]
        assert all(line.startswith(text) for line, text in zip(legend(page), texts_of, strict=False))


@given(receipts)
def test_json_and_back_gives_the_same_page(receipt: Receipt) -> None:
    loaded = Receipt.from_json(receipt.to_json())
    assert loaded == receipt
    assert loaded.to_html() == receipt.to_html()


@given(texts)
def test_printable_text_is_one_clean_line(text: str) -> None:
    clean = printable(text)
    assert clean.isprintable()
    assert clean == clean.strip()
    assert printable(clean) == clean


def test_printable_text_keeps_what_can_be_read() -> None:
    assert printable("Ünïcode 日本語 <b>&'\"") == "Ünïcode 日本語 <b>&'\""
    assert printable(" two\r\n\tlines\u00a0here ") == "two lines here"
    assert printable("a\x1b[31mb\u202ec\ud800") == "a�[31mb�c�"
    assert printable(3) == "3"


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["receipt.html", "receipt.htm", "RECEIPT.HTML"])
def test_a_name_of_a_page_saves_the_page(tmp_path: Path, name: str) -> None:
    receipt = replace(RECEIPT, what="日本語 \ud800")
    receipt.save(str(tmp_path / name))
    assert (tmp_path / name).read_bytes().decode() == receipt.to_html()


@pytest.mark.parametrize("name", ["receipt.json", "receipt", "html", "receipt.html.json", ".html"])
def test_any_other_name_saves_json(tmp_path: Path, name: str) -> None:
    RECEIPT.save(tmp_path / name)
    assert Receipt.from_json((tmp_path / name).read_text()) == RECEIPT


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads(RECEIPT.to_json())
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        edited(lambda receipt: receipt.update(ratio=float("inf"))),
        edited(lambda receipt: receipt.update(error=float("nan"))),
        RECEIPT.to_json().replace("0.8", "1e999"),
        edited(lambda receipt: receipt.update(before=10**400)),
        edited(lambda receipt: receipt["stages"][0].update(seconds="long")),
        edited(lambda receipt: receipt["stages"][0].update(low=[])),
        edited(lambda receipt: receipt.update(shares={"a": "b"})),
        "[" * 100_000,
    ],
    ids=["Infinity", "NaN", "1e999", "a huge integer", "a stage's seconds", "a stage's bound", "a share", "deep"],
)
def test_what_could_not_be_shown_is_refused_when_it_is_loaded(text: str) -> None:
    with pytest.raises(ValueError, match="this is no receipt"):
        Receipt.from_json(text)


def test_the_page_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, accelerate_tts.receipts.receipt\nprint('accelerate_tts.receipts.html' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
