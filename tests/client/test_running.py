"""`broker.client.running`: Ctrl-C, wherever it arrives."""

import signal
from contextlib import suppress

import pytest
import trio

from broker.client import run


def test_it_returns_at_the_end_of_the_program() -> None:
    seen: list[object] = []

    async def main(one: int, other: str) -> None:
        seen.extend((one, other))

    run(main, 1, "a")
    assert seen == [1, "a"]


def test_ctrl_c_cancels_all_tasks_and_the_status_is_130() -> None:
    """Also where Python drops a `KeyboardInterrupt`, as in a callback; and what is to be done at the
    end is done."""
    goodbyes: list[str] = []

    async def interrupt() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    async def main() -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(interrupt)
                nursery.start_soon(trio.sleep_forever)
        finally:
            goodbyes.append("bye")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 130
    assert goodbyes == ["bye"]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_the_program_raises_comes_out_as_it_is() -> None:
    async def main() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run(main)
