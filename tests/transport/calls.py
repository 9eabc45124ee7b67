"""The owner of an outbox, as a test has it."""

from collections.abc import Callable, Mapping

import attrs

from broker.transport.tasks import Work


@attrs.frozen(eq=False)
class Calls:
    """Each call goes to a function of the test's; by default nothing comes of it."""

    start: Callable[[Work], object] = lambda writer: None
    slow: Callable[[], object] = lambda: None
    dropped: Callable[[Mapping[str, int]], object] = lambda dropped: None
    broken: Callable[[], object] = lambda: None

    def start_soon(self, work: Work, /, *args: object) -> None:
        self.start(work)

    def give_up(self) -> None:
        self.slow()

    def note_dropped(self, topics: Mapping[str, int], /) -> None:
        self.dropped(topics)

    def note_broken(self) -> None:
        self.broken()
