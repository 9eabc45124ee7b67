"""The command `sub`: prints publications, and says where some were lost."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs
import click
import trio

from broker.cli.errors import INTERRUPTED, Refusal
from broker.cli.output import echo_json, publication_as_json, publication_as_text
from broker.cli.positions import position_before, read_position
from broker.cli.running import (
    Target,
    as_client,
    check_text,
    json_option,
    refusal_text,
    with_client,
)
from broker.core.names import is_connection_name
from broker.core.topics import is_pattern, matches
from broker.errors import ClientError, ErrorCode, RequestFailed, Unavailable

if TYPE_CHECKING:
    from broker.client import Client, Subscription
    from broker.core.messages import Position, Publication

TOPICS_MOST: Final = 10_000
"""Topics of a pattern whose last offset is known: a few MB. With more topics fewer losses are reported."""


@click.command(short_help="Print what is published to PATTERN.")
@as_client
@click.option("--group", default="", callback=check_text, help="Take turns with all others of it.")
@click.option(
    "--since", metavar="OFFSET[:EPOCH]", help="Begin behind this position, if it is kept."
)
@click.option("--history", "last", type=click.IntRange(1), help="Begin with the last so many kept.")
@click.option("--count", type=click.IntRange(1), help="End after so many publications.")
@json_option
@click.argument("pattern", callback=check_text)
def sub(
    target: Target,
    pattern: str,
    group: str,
    since: str | None,
    last: int | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Print what is published to PATTERN, one line each: topic, offset, data as JSON.

    PATTERN is a topic, or a pattern: in news.* the star stands for one token, in news.> the
    angle for all the rest. Quote it for the shell. Ends with Ctrl-C, exit status 130; while the
    broker is away it waits and comes back.

    Where publications are missing, a line says so: on stderr, with --json on stdout.

    Publications of topics to which the token, or the broker's app, has subscribed this client are printed as
    well where PATTERN matches them, and recovered as any other. So is what somebody sends to this
    connection, or to its user, alone: as fd:7 or user:ann, with offset 0.
    """
    if since is not None and last is not None:
        raise click.UsageError("--since and --history: give one of them")
    if (since is not None or last is not None) and (group or is_pattern(pattern)):
        raise click.UsageError("--since and --history are for one topic, without a --group")
    from broker.client.running import until_signal

    was_interrupted = False

    async def work(client: "Client") -> None:
        nonlocal was_interrupted

        async def follow() -> None:
            position = None
            try:
                position = await read_position(client, pattern, since)
                if last is not None:
                    position = await position_before(client, pattern, last)
                async with client.subscribe(pattern, since=position, group=group) as subscription:
                    output = Output(Losses(is_group=bool(group)), count, as_json)
                    await _print_with_direct(client, subscription, output)
            except RequestFailed as error:
                by_server = error.code == ErrorCode.ALREADY_SUBSCRIBED
                if not by_server or position is not None or group:
                    raise Refusal(f"subscribe to {pattern!r}: {refusal_text(error)}") from error
            else:
                return
            await _print_messages(client, pattern, Output(Losses(), count, as_json))

        was_interrupted = await until_signal(follow)()

    with_client(target, work)
    if was_interrupted:
        sys.exit(INTERRUPTED)


@attrs.define(eq=False)
class Output:
    """Publications and losses as they are printed, until so many publications are; None: for ever."""

    losses: "Losses"
    left: int | None
    as_json: bool

    def print(self, publication: "Publication", epoch: str = "") -> bool:
        """Print one, and the losses before it; true if it was the last."""
        self.tell(self.losses.before(publication))
        if self.as_json:
            click.echo(publication_as_json(publication, epoch))
        else:
            click.echo(publication_as_text(publication))
        if self.left is not None:
            self.left -= 1
        return self.left == 0

    def tell(self, losses: "Iterator[Loss]") -> None:
        """Say what is lost: an object on stdout with JSON, else a line on stderr."""
        for loss in losses:
            if self.as_json:
                lost = loss.last - loss.first + 1 if loss.first else None
                echo_json(
                    {"lost": lost, "topic": loss.topic, "first": loss.first, "last": loss.last}
                )
            else:
                click.echo(str(loss), err=True)


async def _print_with_direct(
    client: "Client", subscription: "Subscription[Publication]", output: Output
) -> None:
    """Print a subscription, and what comes for this connection alone, until one of them is the last."""

    async def print_direct() -> None:
        with suppress(Unavailable):  # which the subscription raises as well
            async for publication in client.messages:
                if is_connection_name(publication.topic) and output.print(publication):
                    nursery.cancel_scope.cancel()
                    return

    raised: ClientError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(print_direct)
        try:
            await _print_all(subscription, output)
        except ClientError as error:
            raised = error  # and not in a group
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


async def _print_all(subscription: "Subscription[Publication]", output: Output) -> None:
    topic = subscription.topic
    if subscription.position is not None:
        output.losses.begin(topic, subscription.position)
    output.tell(output.losses.gap(topic, subscription.gaps))
    async for publication in subscription:
        output.tell(output.losses.gap(topic, subscription.gaps))
        position = subscription.position
        if output.print(publication, "" if position is None else position.epoch):
            return


async def _print_messages(client: "Client", pattern: str, output: Output) -> None:
    """The same where the server has subscribed us: its publications come among the messages for this fd."""
    messages = client.messages
    for topic, position in messages.positions.items():
        output.losses.begin(topic, position)
    async for publication in messages:
        for topic, gaps in messages.gaps.items():
            if matches(pattern, topic):
                output.tell(output.losses.gap(topic, gaps))
        topic = publication.topic
        if not matches(pattern, topic) and not is_connection_name(topic):
            continue
        at = messages.positions.get(topic)
        if output.print(publication, "" if at is None else at.epoch):
            return


@attrs.frozen
class Loss:
    """Publications that did not come. `first` and `last` are their offsets, 0 where nobody knows."""

    topic: str
    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        if not self.first:
            return (
                f"lost: publications of {self.topic!r} may be missing here: it was away for longer "
                "than they are kept"
            )
        number = self.last - self.first + 1
        which = f"offset {self.first}" if number == 1 else f"offsets {self.first} to {self.last}"
        return (
            f"lost: {number} of {self.topic!r}, {which}: this was too slow for them, or they were "
            "not for it"
        )


@attrs.define(eq=False)
class Losses:
    """The losses between the publications that come. Members of a group get only their own part, so for them
    no loss is known."""

    is_group: bool = False
    _last: dict[str, int] = attrs.field(init=False, factory=dict)
    _gaps: dict[str, int] = attrs.field(init=False, factory=dict)

    def begin(self, topic: str, position: "Position") -> None:
        """A subscription has begun: the next publication has the offset behind its position."""
        self._last[topic] = position.offset

    def gap(self, topic: str, gaps: int) -> Iterator[Loss]:
        """Whether more may be missing than the offsets show: a recovery has failed. `gaps` is how often so
        far, of a topic or of all that a pattern matches."""
        if gaps > self._gaps.get(topic, 0):
            if is_pattern(topic):
                self._last.clear()
            self._last.pop(topic, None)
            yield Loss(topic)
        self._gaps[topic] = gaps

    def before(self, publication: "Publication") -> Iterator[Loss]:
        """The losses right before this publication."""
        topic, offset = publication.topic, publication.offset
        if not offset or self.is_group:
            return
        last = self._last.pop(topic, None)
        if last is not None and last + 1 < offset:
            yield Loss(topic, last + 1, offset - 1)
        # One that comes again, such as a retained one, is no step back.
        self._last[topic] = offset
        if len(self._last) > TOPICS_MOST:
            del self._last[next(iter(self._last))]
