"""The receipt: the stages that were tried on a loaded object, their measurements and the verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from accelerate_tts.errors import printable
from accelerate_tts.receipts.format import duration, error_text, json_number, ratio_text
from accelerate_tts.storage.files import write_whole

_FORMAT = 1
_PAGES = {".html", ".htm"}
# Openings of reasons that say by themselves what became of a stage. Any other one is a rejection.
_OUTCOMES = ("not ", "failed", "stopped", "undone")
_IS_FASTER = " is faster"


@dataclass(frozen=True)
class StageResult:
    """One stage tried on one part.

    Attributes:
        part: Path of the part in the loaded object.
        stage: Name of the stage.
        kept: True if the stage is on.
        reason: Reason of the verdict. It begins with the outcome if the stage was neither kept nor rejected: "not
            tried: ...", "failed: ...", "stopped: ..." or "undone: ...".
        before: Median seconds of the part for the warm-up's calls, without this stage and with those that were kept
            before it; with the slower alternative, where the reason names one ("over ..."). `None` if not timed.
        after: The same with the stage on.
        ratio: Median of the paired ratios before / after.
        low: Lower bound of the true ratio with 95 % confidence.
        error: Relative error of the outputs against the untouched part's; 0.0 is bit-exact.
        spectral: Log-spectral distance of the outputs in dB, if they look like audio.
        graphs: Number of compiled graphs; `None` for a stage that compiles nothing.
        seconds: Seconds that the trial took.
        divergence: Largest Kullback-Leibler divergence of a decoder's next-token distributions, in nats.
        sure: False if other programs used the machine during the trial. A later load tries the stage again.
    """

    part: str
    stage: str
    kept: bool
    reason: str
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    low: float | None = None
    error: float | None = None
    graphs: int | None = None
    seconds: float = 0.0
    spectral: float | None = None
    divergence: float | None = None
    sure: bool = True

    def dropped(self, reason: str) -> StageResult:
        """Return the same result, not kept, with another reason."""
        return replace(self, kept=False, reason=reason)

    def displaced(self, faster: str) -> StageResult:
        """Return the same result, not kept, since a faster alternative has taken its place."""
        return self.dropped(faster + _IS_FASTER)

    @property
    def faster(self) -> str | None:
        """Name of the alternative that has taken its place, or `None`."""
        return None if self.kept or not self.reason.endswith(_IS_FASTER) else self.reason.removesuffix(_IS_FASTER)

    def figures(self) -> tuple[str, str, str, str]:
        """Format before, after, ratio and error."""
        error = error_text(self.error, self.spectral, self.divergence)
        return duration(self.before), duration(self.after), ratio_text(self.ratio), error

    @property
    def verdict(self) -> str:
        """Verdict and reason, such as "kept, at least 1.60x (95 %)" or "rejected: error 3.5e-07, must be bit-exact"."""
        opening = "kept, " if self.kept else "" if self.reason.startswith(_OUTCOMES) else "rejected: "
        return f"{opening}{self.reason}{'' if self.sure else ' (uncertain)'}"


@dataclass(frozen=True)
class Receipt:
    """Result of tuning one loaded object. Prints as a table; `to_json` and `from_json` store it, `to_html` shows it.

    Attributes:
        what: A short name of the object.
        device: Kind and name of the device.
        versions: Versions of this library, torch and Python.
        stages: All stages tried, in order.
        cold: Seconds of the first warm-up pass, which the first request no longer pays.
        before: Median seconds of a warm pass of the untouched object, through the public path.
        after: The same for the tuned object.
        ratio: Median of the paired ratios of those passes; 1.0 if nothing was kept.
        error: Relative error of the whole object's output, tuned against untouched; `None` if unknown.
        spectral: Log-spectral distance of that output in dB, if it looks like audio.
        precision: Precision level: "exact", "balanced" or "fast".
        shares: Share of each part, by its name, of a warm pass of the untouched object, from 0 to 1. Empty if unknown.
        seconds: Seconds that tuning took.
        notes: Further remarks for the user, such as a check that could not be made.
        first_audio: Median seconds until the first piece of a warm-up call that speaks in pieces, tuned; `None` if none
            does.
        recompiled: Number of recompilations at the time of saving; see `recompiles`.
    """

    what: str
    device: str
    versions: dict[str, str]
    stages: tuple[StageResult, ...] = ()
    cold: float | None = None
    before: float | None = None
    after: float | None = None
    ratio: float = 1.0
    error: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    recompiled: int = 0
    spectral: float | None = None
    precision: str = "exact"
    shares: dict[str, float] = field(default_factory=dict)
    first_audio: float | None = None
    _live: Callable[[], int] | None = field(default=None, repr=False, compare=False)

    @property
    def kept(self) -> tuple[StageResult, ...]:
        """Stages that were kept."""
        return tuple(stage for stage in self.stages if stage.kept)

    @property
    def unsure(self) -> tuple[StageResult, ...]:
        """Verdicts, on any stage, that are uncertain because the machine was busy."""
        return tuple(stage for stage in self.stages if not stage.sure)

    @property
    def recompiles(self) -> int:
        """Number of compilations since warm-up: now for a live receipt, at the time of saving for a loaded one."""
        return self.recompiled if self._live is None else self._live()

    def to_json(self) -> str:
        """Return the receipt as a JSON text. Numbers are seconds and ratios."""
        frozen = replace(self, recompiled=self.recompiles, _live=None)
        content = {key: value for key, value in asdict(frozen).items() if not key.startswith("_")}
        return json.dumps({"format": _FORMAT, **content}, indent=2, default=str, allow_nan=False)

    def to_html(self) -> str:
        """Return the receipt as one HTML page without other files and scripts."""
        from accelerate_tts.receipts.html import to_html

        return to_html(self)

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Read a receipt that `to_json` wrote.

        Raises:
            ValueError: The text is not a receipt, or has another format version.
        """
        try:
            content = json.loads(text, parse_float=json_number, parse_constant=json_number)
            found = content.pop("format")
            if found != _FORMAT:
                raise ValueError(f"receipt format {found!r} is not {_FORMAT}; use the version that wrote it")
            known = {item.name for item in fields(cls)} - {"_live"}
            stages = tuple(StageResult(**stage) for stage in content.pop("stages"))
            rest = {key: value for key, value in content.items() if key in known}
            rest["notes"] = tuple(rest["notes"])
            loaded = cls(stages=stages, **rest)
            # Every figure is formatted once, so that a value of a wrong type raises here and not when it is shown.
            _ = str(loaded), loaded.versions.items(), *((duration(s.seconds), ratio_text(s.low)) for s in stages)
            _ = {name: 0.0 + share for name, share in loaded.shares.items()}
        except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"this is no receipt: {error!r}") from error
        return loaded

    def save(self, path: str | Path) -> None:
        """Write the receipt to `path`, as an HTML page if the name ends in .html or .htm, otherwise as JSON.

        `from_json` and `accelerate-tts receipt` read the JSON.

        Raises:
            OSError: It cannot be written. A file that was there before stays as it was.
        """
        path = Path(path)
        is_page = path.suffix.lower() in _PAGES
        write_whole(path, self.to_html() if is_page else self.to_json())

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("part", "stage", "before", "after", "ratio", "error", "verdict")]
        rows += [(stage.part, stage.stage, *stage.figures(), stage.verdict) for stage in self.stages]
        rows.append(("whole", "all kept stages", *self.figures(), self.verdict))
        rows = [tuple(map(printable, row)) for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [printable(f"{self.what} on {self.device}")]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        cold = f"first pass {duration(self.cold)}, " if self.cold is not None else ""
        first = f"first audio after {duration(self.first_audio)}, " if self.first_audio is not None else ""
        lines.append(f"{cold}{first}tuning took {self.seconds:.1f} s")
        lines += [printable(f"note: {note}") for note in self.notes]
        return "\n".join(lines)

    def figures(self) -> tuple[str, str, str, str]:
        """Format before, after, ratio and error of the whole object."""
        error = error_text(self.error, self.spectral)
        return duration(self.before), duration(self.after), ratio_text(self.ratio), error

    @property
    def verdict(self) -> str:
        """Number of stages kept and of recompilations, as a text."""
        return f"{len(self.kept)} kept, {self.recompiles} recompiles since warm-up"
