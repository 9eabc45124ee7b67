"""`broker.process.signals`: one handler from the first line on, and what it does when."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cli.main import main
from broker.process.signals import CLIENTS, Order, Signals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def handled() -> Iterator[Signals]:
    signals = Signals()
    # As a terminal has them: `nohup` has SIGHUP ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with signals.installed():
            yield signals
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGHUP, hang_up)


def test_nothing_that_takes_time_is_imported_before_the_handler_stands() -> None:
    code = (
        "import sys, signal, broker.__main__\n"
        "heavy = {'trio', 'click', 'structlog', 'msgspec', 'attrs', 'broker.app', 'logging'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == b"[]\n"


def test_the_commands_that_do_not_serve_are_all_but_one() -> None:
    assert {*CLIENTS, "serve"} == set(main.commands)


def test_a_block_leaves_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    signals = Signals()
    with signals.installed():
        assert all(signal.getsignal(each) not in before for each in NUMBERS)
        with signals.installed():
            pass
        assert all(signal.getsignal(each) not in before for each in NUMBERS)
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_client_has_ctrl_c_and_the_terminals_end_back(handled: Signals) -> None:
    handled.begin_serving()
    assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
    handled.begin_client()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_signals_while_serving_are_delivered_in_order(handled: Signals) -> None:
    orders: list[Order] = []
    handled.begin_serving()
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    handled.hand_over(orders.append, lambda _: None)
    assert orders == ["reload"]  # of two that came before, one
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)
    assert orders == ["reload", "reload", "drain", "reload"]


@pytest.mark.parametrize(
    "arguments, status",
    [(["pub", "a", "1"], 143), (["sub", "a"], 143), ([], 0), (["--port", "1"], 0)],
)
def test_a_signal_before_the_arguments_are_read_has_the_status_of_the_command(
    arguments: list[str], status: int
) -> None:
    code = (
        "import signal\n"
        "from broker.process.signals import process\n"
        "process.install()\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == status


def test_when_it_is_over_a_signal_ends_it_with_1() -> None:
    code = (
        "import signal\n"
        "from broker.process.signals import process\n"
        "process.install()\n"
        "process.begin_serving()\n"
        "process.hand_over(print, print)\n"
        "process.before_exit = lambda: print('flushed', flush=True)\n"
        "process.take_back()\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert (done.returncode, done.stdout) == (1, b"flushed\n")
