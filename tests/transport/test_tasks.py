"""The function that starts a task, where there is no connection any more."""

import pytest
import trio

from broker.transport.tasks import start_nothing


async def test_none_is_started_for_a_connection_that_has_ended() -> None:
    with pytest.raises(RuntimeError, match="has ended"):
        start_nothing(trio.sleep_forever)
