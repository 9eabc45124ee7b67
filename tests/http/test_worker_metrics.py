"""The metrics of several workers as one text."""

from pathlib import Path

import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from broker import Broker, Config
from broker.http.metrics import exposition
from broker.http.worker_metrics import (
    ANSWER_SECONDS,
    exposition_of_all,
    merged,
    serve_others,
)
from broker.testing import open_test_broker
from broker.transport.listeners import open_unix

ONE = b"""# HELP a_total What a is.
# TYPE a_total counter
a_total{x="1",y="}"} 3.0
# HELP b B, without a label.
# TYPE b gauge
b 1.0
"""


def test_each_sample_has_its_worker_and_each_family_is_in_one_piece() -> None:
    assert merged({2: ONE, 1: ONE.replace(b"3.0", b"4.0"), 3: None}).decode() == (
        "# HELP a_total What a is.\n"
        "# TYPE a_total counter\n"
        'a_total{worker="1",x="1",y="}"} 4.0\n'
        'a_total{worker="2",x="1",y="}"} 3.0\n'
        "# HELP b B, without a label.\n"
        "# TYPE b gauge\n"
        'b{worker="1"} 1.0\n'
        'b{worker="2"} 1.0\n'
        "# HELP broker_worker_up 1 where a worker has answered whoever was scraped.\n"
        "# TYPE broker_worker_up gauge\n"
        'broker_worker_up{worker="1"} 1\n'
        'broker_worker_up{worker="2"} 1\n'
        'broker_worker_up{worker="3"} 0\n'
    )


async def test_one_asks_the_others_and_waits_for_no_one_that_hangs(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    names = {number: tmp_path / f"worker-{number}.sock" for number in (1, 2, 3)}
    async with (
        open_test_broker(Broker(Config())) as first,
        open_test_broker(Broker(Config())) as second,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve_others, second.node, await open_unix(names[2]))
        hung = await open_unix(names[3])
        first.node.worker = 1
        first.node.others = {number: names[number] for number in (2, 3)}
        began = trio.current_time()
        text = (await exposition_of_all(first.node)).decode()
        alone = (await exposition(first.node)).decode()
        assert trio.current_time() - began <= ANSWER_SECONDS
        nursery.cancel_scope.cancel()
    await hung.aclose()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names_alone = {family.name for family in text_string_to_metric_families(alone)}
    assert set(families) == {*names_alone, "broker_worker_up"}
    up = {each.labels["worker"]: each.value for each in families["broker_worker_up"].samples}
    assert up == {"1": 1, "2": 1, "3": 0}
    for family in families.values():
        assert {each.labels["worker"] for each in family.samples} <= {"1", "2", "3"}
