"""Harm, and how it is told: from measurements to a verdict, a table and a file.

Nothing here measures anything, so it is tested by itself.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Final

import attrs

from tests.hostile.bystander import Heard
from tests.hostile.field import MIB, Input
from tests.hostile.target import Sample

P99_MS: Final = 50.0
CROWD_P99_MS: Final = 100.0
CROWD: Final = 50
"""Issue 9: a bystander's round trip is under 50 ms at p99 whatever one client sends, under 100 ms
with 50 attackers."""

GROSS: Final = 20
"""So many times the bound is no chance, unless others had the core."""

KEEPS: Final = "keeps"
LOGGED: Final = "log:"

NOT_STARTED: Final = "not started"
"""The outcome where the broker refused its settings: right where an input's setup is the mistake."""

MAX_SHOWN: Final = 3
"""Outcomes that the table names; more are counted."""


@attrs.frozen
class Measured:
    """One run of one input."""

    outcomes: tuple[str, ...]
    heard: Heard
    before: Sample
    after: Sample | None
    """None: the process has ended."""
    peak: int
    clients_before: int
    clients_after: int
    took: float
    log: tuple[str, ...] = ()
    finale: tuple[str, ...] = ()
    hung: bool = False
    """Whether the broker did not answer at the end."""
    trouble: str = ""
    """The reason that kept the input from being run at all."""

    @property
    def is_over(self) -> bool:
        """Whether the broker is as it was before, so that it may be attacked again."""
        return (
            self.after is not None
            and not self.hung
            and not self.heard.closed
            and self.after.files <= self.before.files
            and self.clients_after <= self.clients_before
        )

    @property
    def stolen(self) -> float:
        """Seconds for which broker and bystanders were ready to run while others had their cores."""
        waited = 0.0 if self.after is None else self.after.waited - self.before.waited
        return waited + self.heard.waited


@attrs.frozen
class Verdict:
    entry: Input
    measured: Measured
    faults: tuple[str, ...]
    runs: int = 1

    @property
    def is_logged(self) -> bool:
        """Whether the log tells of an error. That is no chance, and a second one within a second
        would be swallowed: another try on the same broker could only hide it."""
        return any(fault.startswith(LOGGED) for fault in self.faults)

    @property
    def only_keeps(self) -> bool:
        """Whether memory was not given back, and nothing else is wrong."""
        return bool(self.faults) and all(fault.startswith(KEEPS) for fault in self.faults)

    @property
    def is_gross(self) -> bool:
        """Whether it was so late that another try would tell nothing."""
        return self.measured.heard.p99 * 1000 > GROSS * P99_MS and not self.is_disturbed

    @property
    def is_disturbed(self) -> bool:
        """Whether others may be to blame for what is wrong: it is late, and nothing else."""
        late = max(self.measured.heard.p99, self.measured.heard.ping_p99)
        return (
            all("p99 " in fault or "p50 " in fault for fault in self.faults)
            and self.measured.stolen > late / 2
        )

    @property
    def is_good(self) -> bool:
        """Whether all is as it should be; a control must be found harmful."""
        return bool(self.faults) == self.entry.control


def judge(entry: Input, found: Measured) -> tuple[str, ...]:
    """The faults found; empty if there are none."""
    if found.trouble:
        refused = found.outcomes == (NOT_STARTED,) and "Traceback" not in found.trouble
        return () if refused and NOT_STARTED in entry.should else (found.trouble,)
    faults = [*_wrong_outcomes(entry, found), *_harm(entry, found)]
    if found.after is None:
        return (*faults, "the broker has ended")
    if found.hung:
        faults.append("the broker does not answer any more")
    faults += _left(entry, found, found.after)
    errors = log_errors(found.log)
    if len(errors) > entry.errors:
        faults.append(f"{LOGGED} {errors[0][:160]}")
    return tuple(faults)


def log_errors(lines: Sequence[str]) -> list[str]:
    """The lines that tell of a fault of the broker's own."""
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            if "Traceback" in line or " [error" in line:
                found.append(line)
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "critical"):
            last = str(entry.get("exception", "")).strip().rpartition("\n")[2]
            found.append(f"{entry.get('event')} {last or entry.get('detail', '')}")
    return found


def _wrong_outcomes(entry: Input, found: Measured) -> list[str]:
    came = [*found.outcomes, *found.finale]
    if not came:
        return ["nothing came"]
    if all(each in entry.should for each in came):
        return []
    return [f"should be {' or '.join(entry.should)}"]


def _harm(entry: Input, found: Measured) -> list[str]:
    heard, faults = found.heard, []
    if heard.closed:
        faults.append(f"a bystander was ended: {heard.closed}")
    if heard.lost:
        faults.append(f"{heard.lost} of {heard.sent} lost")
    if heard.twice:
        faults.append(f"{heard.twice} came twice")
    bound = CROWD_P99_MS if entry.attackers >= CROWD else P99_MS
    for name, value in (("p99", heard.p99), ("ping p99", heard.ping_p99)):
        if value * 1000 > bound:
            faults.append(f"{name} {value * 1000:.0f} ms")
    if entry.p50_ms and heard.p50 * 1000 > entry.p50_ms:
        faults.append(f"p50 {heard.p50 * 1000:.0f} ms")
    return faults


def _left(entry: Input, found: Measured, after: Sample) -> list[str]:
    faults = []
    gained = (found.peak - found.before.rss) / MIB
    if gained > entry.peak_mib:
        faults.append(f"RSS +{gained:.0f} MiB")
    kept = (after.rss - found.before.rss) / MIB
    if kept > entry.left_mib:
        faults.append(f"{KEEPS} {kept:.0f} MiB")
    if after.files > found.before.files + entry.files:
        faults.append(f"{after.files - found.before.files} files left open")
    if found.clients_after > found.clients_before:
        faults.append(f"{found.clients_after - found.clients_before} connections left")
    return faults


# how it is told

HEADER: Final = (
    f"{'input':50} {'':4} {'p99':>7} {'max':>7} {'RSS':>6} {'left':>6} {'files':>5}  what came\n"
    f"{'':50} {'':4} {'ms':>7} {'ms':>7} {'MiB':>6} {'MiB':>6}"
)


def line_of(verdict: Verdict) -> str:
    """One row of the table."""
    entry, found = verdict.entry, verdict.measured
    word = "ok" if verdict.is_good else "FAIL"
    after = found.after or found.before
    row = (
        f"{entry.name:50} {word:4} {found.heard.p99 * 1000:7.1f} {found.heard.worst * 1000:7.1f} "
        f"{(found.peak - found.before.rss) / MIB:6.1f} {(after.rss - found.before.rss) / MIB:6.1f} "
        f"{after.files - found.before.files:5d}  {came(found)}"
    )
    if verdict.faults:
        row += f"  [{'; '.join(verdict.faults)}]"
        if verdict.is_disturbed:
            row += f" (others took {found.stolen * 1000:.0f} ms)"
    if entry.control and verdict.is_good:
        row += "  (a control: found, as it must be)"
    elif verdict.runs > 1 and verdict.is_good:
        row += "  (at the second try)"
    return row


def came(found: Measured) -> str:
    """The outcomes in short: `400 ×10, EOF`."""
    counted = Counter([*found.outcomes, *found.finale])
    shown = [f"{each} ×{n}" if n > 1 else each for each, n in counted.most_common(MAX_SHOWN)]
    if len(counted) > MAX_SHOWN:
        shown.append(f"{len(counted) - MAX_SHOWN} more kinds")
    return ", ".join(shown)


def as_record(verdict: Verdict) -> dict[str, object]:
    """A row for `--json`. Times in seconds, sizes in bytes."""
    entry, found = verdict.entry, verdict.measured
    return {
        "name": entry.name,
        "source": entry.source,
        "should": entry.should,
        "good": verdict.is_good,
        "control": entry.control,
        "faults": verdict.faults,
        "runs": verdict.runs,
        "came": dict(Counter([*found.outcomes, *found.finale])),
        "took": found.took,
        "peak": found.peak,
        "before": attrs.asdict(found.before),
        "after": None if found.after is None else attrs.asdict(found.after),
        "clients_before": found.clients_before,
        "clients_after": found.clients_after,
        "stolen": found.stolen,
        "bystander": attrs.asdict(found.heard),
        "log": found.log[-5:],
    }
