r"""The output of commands: text of one line, JSON of one line, tables.

Rule: everything that a broker sends reaches the terminal as text of one line. Control characters, and
characters that turn the writing direction, come out as escapes: in JSON as JSON's own (`\u009b`), so that its
meaning stays the same, elsewhere as Python's (`\x9b`).
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import click
import msgspec

from broker import logs
from broker.core.messages import Publication

if TYPE_CHECKING:
    from broker.core.messages import ClientInfo

# Characters that `logs.escape` escapes. Outside of its strings JSON has none of these but white space.
_JSON_ESCAPES: Final = {
    code: f"\\u{code:04x}" for code in range(0x7F, 0x2070) if logs.escape(chr(code)) != chr(code)
}


def escape_json(text: str) -> str:
    """The same JSON, compact already, with nothing in it that a terminal obeys."""
    return text.translate(_JSON_ESCAPES)


def to_json(value: object) -> str:
    """A value as JSON of one line."""
    return escape_json(msgspec.json.encode(value).decode())


def echo_json(value: object) -> None:
    click.echo(to_json(value))


def publication_as_text(publication: Publication) -> str:
    """`topic offset data`."""
    return f"{logs.escape(publication.topic)} {publication.offset} {json_of(publication)}"


def publication_as_json(publication: Publication, epoch: str = "") -> str:
    """One JSON object with all that is known of it; `epoch` where that is known."""
    info = publication.info
    fields: dict[str, object] = {
        "topic": publication.topic,
        "offset": publication.offset,
        "data": msgspec.Raw(json_of(publication).encode()),
        "time": publication.time,
        "tags": dict(publication.tags or {}),
        "client": "" if info is None else info.client,
        "user": "" if info is None else info.user,
    }
    if epoch:
        fields["epoch"] = epoch
    return to_json(fields)


def json_of(publication: Publication) -> str:
    """The data of a publication as JSON of one line."""
    try:
        text = msgspec.json.format(publication.data, indent=-1).decode()
    except msgspec.DecodeError:
        # Half a surrogate pair, which msgspec does not take. Line ends and tabs can only stand
        # between the tokens; in strings they are escapes.
        text = publication.data.decode().translate({ord(end): " " for end in "\r\n\t"})
    return escape_json(text)


def raw_json(data: bytes | None) -> str:
    """Raw JSON that others have sent, as JSON of one line; "" for None."""
    return "" if data is None else json_of(Publication("", data))


def client_fields(info: "ClientInfo") -> dict[str, object]:
    """The JSON fields of a subscribed client."""
    fields: dict[str, object] = {"client": info.client, "user": info.user}
    for name in ("conn_info", "chan_info"):
        data = getattr(info, name)
        if data is not None:
            fields[name] = msgspec.Raw(raw_json(data).encode())
    return fields


# tables

_NUMBER: Final = re.compile(r"[0-9][0-9,]*(\.[0-9]+)?[A-Za-z]{0,2}")


def echo_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below their heads; numbers stand at the right."""
    lines = [[logs.escape(str(cell)) for cell in row] for row in rows]
    right = [
        bool(lines) and all(_is_number(line[column]) for line in lines)
        for column in range(len(head))
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    for line in [head, *lines]:
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return text in ("", "-") or _NUMBER.fullmatch(text) is not None


def echo_fields(fields: Mapping[str, object]) -> None:
    """Print names and values, one pair a line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{name.ljust(width)}  {logs.escape(str(value))}".rstrip())


# numbers and times in words


def in_bytes(size: float) -> str:
    """`17`, `1.2K`, `3.4M`."""
    if size < 1024:
        return f"{size:.0f}"
    for unit in "KMGTPE":
        size /= 1024
        if size < 1024 or unit == "E":
            break
    return f"{size:.1f}{unit}"


def in_time(seconds: float | None) -> str:
    """`0.4s`, `12s`, `5m`, `3h`, `2d`; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


def in_milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}ms"


def clock(when: float) -> str:
    """The local time of day, of Unix seconds."""
    whole, part = divmod(when, 1)
    return f"{time.strftime('%H:%M:%S', time.localtime(whole))}.{int(part * 1000):03d}"


def date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
