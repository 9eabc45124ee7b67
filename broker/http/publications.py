"""Publications as backends ask for them: by `publish`, by `broadcast`, and in a batch.

A publication is *plain* if it asks for nothing but to be published: JSON, and none of the options. Nearly all
are, and a backend sends them by the hundred. So a plain one is read in one go, joins the router's open run as
what clients publish does, and has its result written by hand.

Rules:

1. Plain is a way, not a kind: what comes of it is the same, byte for byte, as of the way for all others.
2. It takes what is usual alone: data in JSON, no option, no trace that is sampled, an engine that keeps nothing
   first, a topic and no connection. It is decided anew in the step in which it is carried out.
3. Text that a strict decoder refuses is read with care, by `core.json_reader`; so is all that is not plain.
"""

import base64
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import attrs
from msgspec import Raw, Struct, field

from broker.core.json_reader import read_strictly
from broker.core.messages import Delivery, Fd, Position
from broker.core.work import BATCHED, COMMAND, KILOBYTE, PUBLICATION
from broker.errors import ErrorCode, Refused
from broker.events.spans import TAG, is_sampled
from broker.node import Publishing
from broker.protocols.json_text import check_json, one_line, to_json, written
from broker.routing.publishing import PublishOptions
from broker.session.rpc import report

TOGETHER: Final = 250.0
"""Work of plain publications in a row that a batch has in one step: 125 small ones. Those of a client that
come in one read take as much."""


class Content(Struct, kw_only=True):
    data: Raw = field(default_factory=Raw)
    b64data: str = ""
    """Base64 of any bytes; those that are JSON are taken for it."""
    tags: dict[str, str] | None = None
    skip_history: bool = False
    idempotency_key: str = ""
    retain: bool = False
    exclude: list[Fd] = []
    report: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it has data as JSON, and asks for nothing else."""
        return bool(self.data) and not (
            self.b64data
            or self.tags is not None
            or self.skip_history
            or self.idempotency_key
            or self.retain
            or self.exclude
            or self.report
        )


class Publish(Content, kw_only=True):
    channel: str


class Broadcast(Content, kw_only=True):
    channels: list[str]


class Command(Struct, forbid_unknown_fields=True):
    """A command of a batch that is one publish."""

    publish: Publish


# plain ones


def read_plain(params: bytes) -> Publish | None:
    """The parameters of a plain publish; None for all others, and for what is not right."""
    found = read_strictly(params, Publish)
    return found if found is not None and found.is_plain else None


def read_plain_command(command: bytes) -> Publish | None:
    """The parameters of a command of a batch that is a plain publish; None for any other."""
    found = read_strictly(command, Command)
    return found.publish if found is not None and found.publish.is_plain else None


def plain_data(content: Content) -> bytes:
    """The data of a plain publication: as `publication_of` gives it."""
    return one_line(bytes(content.data))


def plain_results(name: bytes, last: Position | None, count: int = 1) -> list[bytes]:
    """The results of so many plain publications in a row under this name, as `written` has them: `last` is
    where the last of them stands in its topic's history, None if that keeps none."""
    if last is None:
        return [b'{"%b":{}}' % name] * count
    epoch = written(last.epoch)
    if count == 1:
        return [b'{"%b":{"offset":%d,"epoch":%b}}' % (name, last.offset, epoch)]
    offsets = range(last.offset - count + 1, last.offset + 1)
    return [b'{"%b":{"offset":%d,"epoch":%b}}' % (name, offset, epoch) for offset in offsets]


@attrs.define(eq=False)
class Row:
    """Plain publications to one topic that follow each other in a batch, and the work that they are
    besides their fan-out."""

    topic: str
    work: float = COMMAND
    publishes: list[Publish] = attrs.field(factory=list)
    contents: list[bytes] = attrs.field(factory=list)

    def takes(self, publish: Publish) -> bool:
        """Whether this one may be the next in it."""
        return publish.channel == self.topic and self.work < TOGETHER

    def add(self, publish: Publish) -> None:
        data = plain_data(publish)
        self.publishes.append(publish)
        self.contents.append(data)
        self.work += BATCHED + PUBLICATION + len(data) / 1024 * KILOBYTE


# all


def publication_of(content: Content, traceparent: str) -> tuple[bytes, PublishOptions]:
    """The data and the options to publish with. Raises `Refused` (107)."""
    tags = content.tags
    if is_sampled(traceparent):
        tags = {TAG: traceparent, **(tags or {})}
    opaque = _bytes(content.b64data)
    options = PublishOptions(
        exclude=content.exclude,
        tags=tags,
        opaque=bool(opaque),
        skip_history=content.skip_history,
        retain=content.retain,
        key=content.idempotency_key,
        report=content.report,
    )
    return opaque or to_json(payload("data", content.data, "")), options


def payload(name: str, data: Raw, b64: str, *, needed: bool = True) -> Raw | None:
    """A payload in one line; where it is `needed`, null is one, and elsewhere none is given then."""
    if b64:
        try:
            return Raw(check_json(base64.b64decode(b64, validate=True)))
        except ValueError as error:
            text = f"b64{name} is not base64 of JSON: {error}"
            raise Refused(ErrorCode.BAD_REQUEST, text) from None
    if data and (needed or bytes(data) != b"null"):
        return Raw(bytes(data))
    if needed:
        raise Refused(ErrorCode.BAD_REQUEST, f"{name} is missing")
    return None


def _bytes(b64data: str) -> bytes:
    try:
        return base64.b64decode(b64data, validate=True)
    except ValueError as error:
        raise Refused(ErrorCode.BAD_REQUEST, f"b64data is not base64: {error}") from None


def result_of(result: Delivery | Refused, content: Content) -> object:
    """The result of a publish. Raises `Refused`."""
    if isinstance(result, Refused):
        raise result
    shown: dict[str, object] = {}
    if result.position is not None:
        shown |= {"offset": result.position.offset, "epoch": result.position.epoch}
    if content.report:
        shown |= report(result)
    return shown


async def result_later(publishing: Publishing, content: Content) -> object:
    """The same, when it is known."""
    return result_of(await publishing.wait(), content)


def response_of(ended: Publishing, content: Content) -> bytes:
    """The response of a broadcast for one of its channels."""
    assert ended.result is not None, "it has ended"
    if isinstance(ended.result, Refused):
        return written(error_of(ended.result))
    return written({"result": result_of(ended.result, content)})


async def responses_later(begun: Sequence[Publishing | bytes], content: Content) -> object:
    """The result of a broadcast, when all of it is known."""
    responses = [
        each if isinstance(each, bytes) else await _response_later(each, content) for each in begun
    ]
    return {"responses": Raw(b"[%b]" % b",".join(responses))}


async def _response_later(publishing: Publishing, content: Content) -> bytes:
    with suppress(Refused):  # which is its response
        await publishing.wait()
    return response_of(publishing, content)


def error_of(refusal: Refused) -> object:
    """A refusal, as answers have it."""
    return {"error": {"code": refusal.code, "message": refusal.message}}
