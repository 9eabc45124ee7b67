"""The table of hostile inputs (`python -m tests.hostile`): what it calls harm, and that it runs."""

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import trio

from tests.hostile.bystander import Heard, percentile
from tests.hostile.field import MIB, Field, Input, can_stand_on, stood_on
from tests.hostile.judge import Measured, Verdict, judge, line_of, log_errors
from tests.hostile.target import Sample, Setup
from tests.hostile.wire import Ended, Peer

ROOT = Path(__file__).parent.parent
BEFORE = Sample(rss=50 * MIB, files=10, threads=1, cpu=1.0, waited=0.0)


async def _attack(field: Field) -> Sequence[str]:
    return ["400"]


ENTRY = Input(name="head/zeros", source="a row", should=("400",), attack=_attack)
GOOD = Measured(
    outcomes=("400", "400"),
    heard=Heard(sent=100, p50=0.001, p99=0.004, worst=0.005, ping_p99=0.002),
    before=BEFORE,
    after=BEFORE,
    peak=BEFORE.rss + MIB,
    clients_before=2,
    clients_after=2,
    took=1.0,
)


def _heard(**changes: object) -> Measured:
    return attrs.evolve(GOOD, heard=attrs.evolve(GOOD.heard, **changes))  # type: ignore[arg-type]


def _after(**changes: object) -> Measured:
    return attrs.evolve(GOOD, after=attrs.evolve(BEFORE, **changes))  # type: ignore[arg-type]


def test_inputs_about_the_process_stand_where_they_stand_and_others_anywhere() -> None:
    assert can_stand_on(ENTRY)
    assert stood_on(ENTRY, "redis").setup.ground == "redis"
    for setup in (Setup(files=256), Setup(stderr="pipe"), Setup(ground="nodes")):
        assert not can_stand_on(attrs.evolve(ENTRY, setup=setup))
    assert not can_stand_on(attrs.evolve(ENTRY, finale=_attack))
    assert not can_stand_on(attrs.evolve(ENTRY, control=True))


def test_an_input_that_leaves_no_trace_is_no_harm() -> None:
    assert judge(ENTRY, GOOD) == ()


@pytest.mark.parametrize(
    "found, fault",
    [
        (attrs.evolve(GOOD, outcomes=("400", "EOF")), "should be 400"),
        (attrs.evolve(GOOD, outcomes=()), "nothing came"),
        (attrs.evolve(GOOD, finale=("signal 9",)), "should be 400"),
        (_heard(p99=0.051), "p99 51 ms"),
        (_heard(ping_p99=0.06), "ping p99 60 ms"),
        (_heard(lost=3), "3 of 100 lost"),
        (_heard(twice=1), "1 came twice"),
        (_heard(closed="close 3008"), "a bystander was ended: close 3008"),
        (attrs.evolve(GOOD, after=None), "the broker has ended"),
        (attrs.evolve(GOOD, hung=True), "the broker does not answer any more"),
        (attrs.evolve(GOOD, peak=BEFORE.rss + 65 * MIB), "RSS +65 MiB"),
        (_after(rss=BEFORE.rss + 33 * MIB), "keeps 33 MiB"),
        (_after(files=11), "1 files left open"),
        (attrs.evolve(GOOD, clients_after=4), "2 connections left"),
        (attrs.evolve(GOOD, log=("Traceback (most recent call last):",)), "log: Traceback"),
        (attrs.evolve(GOOD, trouble="the broker did not start"), "the broker did not start"),
    ],
    ids=str,
)
def test_each_kind_of_harm_is_told(found: Measured, fault: str) -> None:
    (told,) = judge(ENTRY, found)
    assert told.startswith(fault)
    assert told in line_of(Verdict(ENTRY, found, (told,)))


def test_a_start_that_is_refused_is_right_only_where_that_was_expected() -> None:
    refused = attrs.evolve(GOOD, outcomes=("not started",), trouble="the broker did not start: x")
    assert judge(ENTRY, refused) == ("the broker did not start: x",)
    mistaken = attrs.evolve(ENTRY, should=("101", "not started"))
    assert judge(mistaken, refused) == ()
    crashed = attrs.evolve(refused, trouble="the broker did not start: Traceback: KeyError")
    assert judge(mistaken, crashed) == (crashed.trouble,)


def test_a_crowd_may_be_noticed_twice_as_much() -> None:
    crowd = attrs.evolve(ENTRY, attackers=50)
    assert judge(crowd, _heard(p99=0.099)) == ()
    assert judge(crowd, _heard(p99=0.101)) == ("p99 101 ms",)


def test_an_input_may_bound_the_median_and_allow_errors() -> None:
    strict = attrs.evolve(ENTRY, p50_ms=10.0, errors=1)
    line = '{"level": "error", "event": "hook_failed"}'
    assert judge(strict, attrs.evolve(_heard(p50=0.011), log=(line,))) == ("p50 11 ms",)


def test_a_control_is_good_only_where_harm_was_found() -> None:
    control = attrs.evolve(ENTRY, control=True)
    assert Verdict(control, GOOD, ("p99 500 ms",)).is_good
    assert not Verdict(control, GOOD, ()).is_good


def test_only_lateness_is_blamed_on_others_and_only_where_they_had_the_core() -> None:
    late = _heard(p99=0.2, waited=0.15)
    assert Verdict(ENTRY, late, judge(ENTRY, late)).is_disturbed
    alone = _heard(p99=0.2, waited=0.05)
    assert not Verdict(ENTRY, alone, judge(ENTRY, alone)).is_disturbed
    lossy = _heard(p99=0.2, waited=0.15, lost=1)
    assert not Verdict(ENTRY, lossy, judge(ENTRY, lossy)).is_disturbed


def test_errors_are_found_in_logs_of_both_formats() -> None:
    lines = [
        '{"level": "info", "event": "refused", "reason": "Traceback of a peer"}',
        '{"level": "error", "event": "api_failed", "exception": "Traceback\\nKeyError: 1"}',
        "12:00:00 [error    ] connection_failed",
        "12:00:00 [info     ] open",
    ]
    assert log_errors(lines) == ["api_failed KeyError: 1", "12:00:00 [error    ] connection_failed"]


def test_an_error_in_the_log_is_no_chance_and_memory_alone_is_looked_at_again() -> None:
    assert Verdict(ENTRY, GOOD, ("log: api_failed KeyError: 1", "p99 51 ms")).is_logged
    assert not Verdict(ENTRY, GOOD, ("p99 51 ms",)).is_logged
    assert Verdict(ENTRY, GOOD, ("keeps 40 MiB",)).only_keeps
    assert not Verdict(ENTRY, GOOD, ("keeps 40 MiB", "RSS +90 MiB")).only_keeps
    assert not Verdict(ENTRY, GOOD, ()).only_keeps


def test_a_percentile_is_the_nearest_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert percentile(values, 0.99) == 100
    assert percentile(values, 0.5) == 51
    assert percentile([], 0.99) == 0


@pytest.mark.parametrize("resets", [True, False])
async def test_a_reset_is_told_though_a_write_was_told_of_it_first(resets: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    peer = Peer(trio.SocketStream(trio.socket.from_stdlib_socket(client)))
    if resets:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.close()

    async def send_on() -> None:
        while True:
            await peer.send(b"x")

    if resets:
        with pytest.raises(Ended, match="RST"):
            await send_on()
    assert await peer.ending() == ("RST" if resets else "EOF")
    await peer.aclose()


def _table(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.hostile", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_handful_of_inputs_is_run_and_written_down(tmp_path: Path) -> None:
    names = ["head/zeros", "frame/opcode 3", "command/unknown", "leave/a Ping, then RST"]
    done = _table("--only", *names, "control/an answer*", "--json", str(tmp_path / "found.json"))
    records = json.loads((tmp_path / "found.json").read_text())
    assert {record["name"] for record in records} == {*names, "control/an answer that is another"}
    came = {record["name"]: set(record["came"]) for record in records}
    assert came["head/zeros"] == {"400"}
    assert came["frame/opcode 3"] == {"close 1002"}
    assert came["command/unknown"] == {"error 104"}
    for record in records:
        assert record["bystander"]["sent"] > 10
        assert record["clients_before"] == 2
        assert "took" in record
    # Whether bystanders were late is this machine's business; all else must be as it should be.
    faults = [fault for each in records if not each["good"] for fault in each["faults"]]
    assert all("p99" in fault for fault in faults), done.stdout


def test_names_are_listed_and_a_name_that_is_not_there_is_told() -> None:
    listed = _table("--list")
    assert listed.returncode == 0, listed.stderr
    assert int(listed.stdout.splitlines()[-1].split()[0]) >= 120
    missing = _table("--only", "no such input")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "--list" in missing.stderr
