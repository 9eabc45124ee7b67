"""The RFC 6455 suite of kosoku, which runs the Autobahn test cases, against an echo broker."""

import asyncio
import logging
from functools import partial

import structlog
import trio
from kosoku import FailureError, run_fuzzingclient

from broker import Broker, Config, Connection
from broker.core.messages import Frame

# Cases that the suite has of RFC 6455: sections 12 and 13 are about compression, which we do not offer.
CASES = 301


async def test_the_rfc_6455_suite_finds_no_fault(logging_restored: None) -> None:
    # Its messages of 16 MiB are not worth a log line each.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    # It sends 16 MiB in pieces of 64 bytes, and expects all of it back.
    size = 2**25
    config = Config(
        host="127.0.0.1", port=0, max_message_bytes=size, max_fragments=size, outbox_bytes=size
    )
    broker = Broker(config)

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(broker.serve)
        failed, passed = await trio.to_thread.run_sync(partial(_run_suite, addresses[0]))
        broker.stop()
    assert not failed
    assert passed == CASES


def _run_suite(address: str) -> tuple[dict[str, str], int]:
    """The cases that failed, with the suite's words for it, and how many cases passed."""
    try:
        results = asyncio.run(
            run_fuzzingclient(address, exclude_cases=["12.*", "13.*"], concurrency=4)
        )
    except FailureError as failure:
        results = failure.results
    failed = {
        result.case_id: f"{result.behavior.value}, {result.behavior_close.value}: "
        f"{result.result} {result.result_close}"
        for result in results
        if not result.passed
    }
    return failed, len(results) - len(failed)
