"""How events become lines: three formats, one line per event, and a lid on repetition.

The rest of the package says what happened (`log.info("open", fd=7, peer=…)`) and never how it
looks. `console` and `json` write to stderr, so that stdout stays free for a program's output;
`article` writes the tutorial's four lines to stdout and nothing else.

Rule 1: text of a peer cannot start a line of its own or move a terminal's cursor: control
characters come out escaped, in tracebacks too. (`rendering`)

Rule 2: a log that cannot be written (a closed pipe, a full disk) never fails the broker, and one
that nobody reads never delays it. (`writer`)

Rule 3: a peer cannot fill the disk: of lines with one name, a few a second are written, and the
rest is counted. (`limiter`)

Only `configure` starts threads. A program that embeds a broker has none of ours.
"""

from broker.logs.rendering import escape
from broker.logs.setup import (
    FLUSH_SECONDS,
    capture_strays,
    configure,
    configure_if_unset,
    flush,
    reconfigure,
    release,
    statistics,
)
from broker.logs.writer import LogStatistics

__all__ = [
    "FLUSH_SECONDS",
    "LogStatistics",
    "capture_strays",
    "configure",
    "configure_if_unset",
    "escape",
    "flush",
    "reconfigure",
    "release",
    "statistics",
]
