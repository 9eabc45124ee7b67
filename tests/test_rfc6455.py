"""The RFC 6455 and RFC 7692 suite of kosoku, which runs the Autobahn test cases, against an echo broker."""

import asyncio
import importlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import structlog
import trio
from kosoku import FailureError, run_fuzzingclient
from kosoku._caseindex import initialize_shims

from broker import Broker, Config, Connection
from broker.core.messages import Frame

CASES = 301
"""Cases that the suite has of RFC 6455, all but sections 12 and 13."""

TOO_LARGE = (
    *(f"9.{group}.{number}" for group in (1, 2) for number in (4, 5, 6)),
    *(f"9.{group}.{number}" for group in (3, 4) for number in range(1, 10)),
)
"""Of these the cases whose message has 4, 8 or 16 MiB: by default it is answered with 1009."""

COMPRESSED = ("12.*", "13.*")
COMPRESSED_CASES = 216

MESSAGES = 3
"""Messages of each of these cases, in place of 1,000, so that all take seconds."""


async def test_by_default_the_rfc_6455_suite_finds_no_fault_but_that_some_is_too_large(
    logging_restored: None,
) -> None:
    config = Config(host="127.0.0.1", port=0)
    failed, passed = await _run(config, exclude_cases=[*COMPRESSED, *TOO_LARGE])
    assert not failed
    assert passed == CASES - len(TOO_LARGE)


async def test_with_larger_limits_it_finds_no_fault_in_the_rest(logging_restored: None) -> None:
    # It sends 16 MiB in pieces of 64 bytes, and expects all of it back.
    size = 2**25
    config = Config(
        host="127.0.0.1", port=0, max_message_bytes=size, max_fragments=size, outbox_bytes=size
    )
    failed, passed = await _run(config, cases=TOO_LARGE)
    assert not failed
    assert passed == len(TOO_LARGE)


@pytest.mark.filterwarnings("ignore:unclosed file .*autobahntestsuite:ResourceWarning")
@pytest.mark.parametrize("keeps", [False, True], ids=["alone", "context"])
async def test_the_rfc_7692_suite_finds_no_fault(
    keeps: bool, logging_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in _compressed_cases():
        monkeypatch.setattr(case, "COUNT", MESSAGES)
        monkeypatch.setattr(case, "onMessage", _with_bytes(case.onMessage))
    config = Config(
        host="127.0.0.1",
        port=0,
        compression=True,
        compression_min_bytes=0,
        compression_client_context=keeps,
    )
    failed, passed = await _run(config, cases=COMPRESSED)
    assert not failed
    assert passed == COMPRESSED_CASES


def _compressed_cases() -> Sequence[Any]:
    initialize_shims()  # its cases are from the time of Python 2
    module = importlib.import_module("case12_x_x")
    return [*module.Case12_X_X, *module.Case13_X_X]


def _with_bytes(on_message: Any) -> Any:
    """kosoku 0.1 hands over a message that came uncompressed as `str`, where these cases hash bytes."""

    def on_bytes(self: Any, message: Any, binary: bool) -> None:
        if isinstance(message, str):
            message = message.encode("latin-1" if binary else "utf-8")
        on_message(self, message, binary)

    return on_bytes


async def _run(config: Config, **which: Sequence[str]) -> tuple[dict[str, str], int]:
    """The cases that failed, with the suite's words for it, and how many cases passed."""
    # Its messages of 16 MiB are not worth a log line each.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    broker = Broker(config)

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(broker.serve)
        outcome = await trio.to_thread.run_sync(partial(_run_suite, addresses[0], **which))
        broker.stop()
    return outcome


def _run_suite(address: str, **which: Sequence[str]) -> tuple[dict[str, str], int]:
    try:
        results = asyncio.run(run_fuzzingclient(address, concurrency=4, **which))
    except FailureError as failure:
        results = failure.results
    failed = {
        result.case_id: f"{result.behavior.value}, {result.behavior_close.value}: "
        f"{result.result} {result.result_close}"
        for result in results
        if not result.passed
    }
    by_client = [
        each.case_id for each in results if each.behavior_close.value == "FAILED BY CLIENT"
    ]
    assert not by_client, "who breaks the rules is sent away by us"
    return failed, len(results) - len(failed)
