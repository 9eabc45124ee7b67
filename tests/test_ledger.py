"""A broker that is killed keeps what it has acknowledged, and nobody is told otherwise.

Few kills, as each costs the start of a process; `nox -s ledger` does as many as it is told to.
"""

import pytest

from tests.ledger import keep
from tests.shared_ledger import keep_shared
from tests.worker_ledger import keep_workers


@pytest.mark.parametrize("query", ["", "?sync=process"])
async def test_nothing_acknowledged_is_lost_to_a_kill(query: str) -> None:
    books = await keep(kills=3, seconds=0.3, query=query)
    assert books.is_clean, str(books)
    assert sum(map(len, books.acked.values())) > 100
    assert books.recoveries == 6


async def test_brokers_on_one_redis_lose_nothing_to_any_fault() -> None:
    books = await keep_shared(faults=4, seconds=0.3)
    assert books.is_clean, str(books)
    assert sum(map(len, books.acked.values())) > 100


@pytest.mark.parametrize("fault", ["flush", "snapshot", "failover"])
async def test_a_redis_that_loses_something_costs_nobody_what_he_was_not_told_of(
    fault: str,
) -> None:
    books = await keep_shared(faults=1, seconds=0.2, kinds=(fault,))
    assert books.is_clean, str(books)
    assert books.told > 0
    assert books.unrecovered == 3


async def test_workers_lose_nothing_to_the_kill_of_one() -> None:
    books = await keep_workers(kills=2, seconds=0.3)
    assert books.is_clean, str(books)
    assert sum(map(len, books.acked.values())) > 100
