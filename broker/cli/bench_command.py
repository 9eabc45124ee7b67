"""The command `bench`: its options, its progress, its table."""

import sys
from typing import TYPE_CHECKING

import attrs
import click

from broker.cli.errors import Refusal
from broker.cli.output import echo_json
from broker.cli.running import Target, as_client, check_text, run_as_client

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from broker.cli.bench import Plan, Result


@click.command(short_help="Measure what the broker sustains.")
@as_client
@click.option(
    "--topic", default="bench", show_default=True, callback=check_text, help="Topic to publish to."
)
@click.option(
    "--publishers",
    "--pub",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Connections that publish.",
)
@click.option(
    "--subscribers",
    "--sub",
    type=click.IntRange(0, 20_000),
    default=1,
    show_default=True,
    help="Connections that each get everything.",
)
@click.option(
    "--size",
    type=click.IntRange(19, 2**20),
    default=64,
    show_default=True,
    help="Bytes of a payload.",
)
@click.option("--messages", type=click.IntRange(1), help="Publications in all.  [default: 100000]")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help="Publish for so long, instead of a number of --messages.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Publications a second in all; without it as fast as they are delivered.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def bench(
    target: Target,
    topic: str,
    publishers: int,
    subscribers: int,
    size: int,
    messages: int | None,
    seconds: float | None,
    rate: float | None,
    as_json: bool,
) -> None:
    """Publish to TOPIC and count what all subscribers get: rates, and how long it took.

    All connections are in this one process, on one core: run it away from the broker's core, or
    both are slowed down. Use a topic that nobody else needs; its history keeps the last payloads.
    """
    from broker.cli.bench import Plan

    if messages is not None and seconds is not None:
        raise click.UsageError("--messages and --seconds: give one of them")
    if messages is None and seconds is None:
        messages = 100_000
    run_as_client(
        _bench,
        (
            Plan(
                url=target.url,
                token=target.token,
                ssl_context=target.ssl_context(),
                topic=topic,
                publishers=publishers,
                subscribers=subscribers,
                size=size,
                messages=messages,
                seconds=seconds,
                rate=rate,
            ),
            as_json,
        ),
    )


async def _bench(request: "tuple[Plan, bool]") -> None:
    from broker.cli.bench import measure

    plan, as_json = request
    length = plan.messages if plan.seconds is None else round(plan.seconds * 10)
    # To stderr, and only to a terminal: the result alone is piped on.
    bar: ProgressBar[int]
    with click.progressbar(
        length=length, label="publishing", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def show(published: int, elapsed: float) -> None:
            done = published if plan.seconds is None else min(round(elapsed * 10), bar.length or 0)
            bar.update(done - bar.pos)

        result = await measure(plan, show)
    if as_json:
        echo_json(attrs.asdict(result))
    else:
        click.echo(_bench_table(plan, result))
    if result.missing:
        raise Refusal(f"{result.missing:,} deliveries are missing: has a subscriber been cut?")


def _bench_table(plan: "Plan", result: "Result") -> str:
    def line(name: str, count: int, rate: float) -> str:
        return f"{name}  {count:>14,}  {rate:>14,.0f}/s  {rate * plan.size / 1e6:>10,.1f} MB/s"

    pace = "as fast as delivered" if plan.rate is None else f"{plan.rate:g}/s"
    rows = [
        f"{plan.publishers:,} → {plan.subscribers:,}, {plan.size:,} B, {pace}: {result.seconds:.2f} s",
        line("published", result.published, result.publishes_per_second),
        line("delivered", result.delivered, result.deliveries_per_second),
    ]
    if result.latency:
        shares = "  ".join(f"{name} {ms:.3g}" for name, ms in result.latency.items())
        rows.append(f"latency, ms  {shares}")
    return "\n".join(rows)
