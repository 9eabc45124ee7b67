"""The keeper of the memory budget: a task that ends the connections and requests which the budget names, and
gives freed memory back to the system.

Rules:

1. It wakes when memory is short, and once a second. A look at all holdings is paid for by the tenth
   of the limit that comes free, and between two there is `PAUSE`.
2. Others have their turn after each few that give way, and after each step in a store.
3. Freed memory is given back to the system in a quiet moment; at any when there is much of it, because others
   on this machine, or the limit of a container, do not know that it is free.
"""

from collections.abc import Callable
from math import inf
from typing import Final

import attrs
import structlog
import trio

from broker.config.machine import find_room, resident_bytes, trim
from broker.config.settings import Config
from broker.core.event_queue import EVENT_BYTES
from broker.core.idempotency import MAX_BYTES as KEYS_BYTES
from broker.core.memory import Holding, MemoryBudget
from broker.session.services import Services
from broker.transport.head import Head

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

BEAT: Final = 1.0
PAUSE: Final = 0.02
"""Seconds in which those who give way may say so to their peers, before others follow. Meanwhile more may come, and is
beyond the limit: 20 MB of a gigabyte a second, as on one machine."""

AT_ONCE: Final = 8
"""So many give way before others get their turn: each costs about 0.1 ms."""

STEP_BYTES: Final = 256 * 2**10
"""Kept data that are given back before others get their turn: 900 small publications, 2 ms."""

GARBAGE_BYTES: Final = 32 * 2**20
"""Freed memory that is given back in a quiet moment: less is soon used again, and to look for it
takes some milliseconds however little there is."""

MUCH_GARBAGE_BYTES: Final = 256 * 2**20
"""Freed memory that is given back at any moment, or a quarter of the limit where that is less: 15 ms in
large pieces, 50 ms in small ones."""

QUIET: Final = 50_000.0
"""Work in a second, in microseconds, up to which it counts as quiet: a twentieth of the loop."""


# who gives way


async def keep_memory(services: Services) -> None:
    """Keep to the budget, until cancelled."""
    memory = services.memory
    heap = Heap(memory, lambda: services.router.meter.done)
    while True:
        short = trio.Event()
        memory.on_short = short.set
        memory.look()
        with trio.move_on_after(BEAT) as beat:
            await short.wait()
        if not beat.cancelled_caught:
            await _relieve(services)
            await trio.sleep(BEAT if memory.is_exhausted else PAUSE)
        heap.look(trio.current_time())


async def _relieve(services: Services) -> None:
    """Have as much given back as memory is short of."""
    memory = services.memory
    held, goal = memory.held, memory.shortage
    before, kept_before = memory.gave_way, memory.kept
    goal -= await _give_back(services, min(goal, memory.surplus_kept))
    for number, (holding, size) in enumerate(memory.givers(goal), 1):
        goal -= size
        holding.give_way()
        if not number % AT_ONCE:
            await trio.lowlevel.checkpoint()
    await services.router.office.wait_freed()  # or the next look would find it still there
    # Nobody holds much, and yet it is too much.
    goal -= await _give_back(services, goal)
    memory.set_exhausted(goal > 0)
    log.warning(
        "memory_short",
        held=in_words(held),
        limit=in_words(memory.limit),
        gave_way=memory.gave_way - before,
        forgotten=in_words(max(0, kept_before - memory.kept)),
        refuses_newcomers=memory.is_exhausted,
    )


async def _give_back(services: Services, size: float) -> float:
    """Have the stores forget so many bytes, the heaviest owner's first; how many they have."""
    engine, retained = services.router.engine, services.router.retained
    given = 0
    while given < size:
        if not engine.prepare(STEP_BYTES):
            await trio.lowlevel.checkpoint()
            continue
        step = min(STEP_BYTES, int(size - given) + 1)
        if engine.heaviest_bytes >= retained.heaviest_bytes:
            came = engine.give_back(step)
        else:
            came = retained.give_back(step)
        if not came:
            break
        given += came
        await trio.lowlevel.checkpoint()
    return given


@attrs.define(eq=False)
class _Request:
    """A request of a peer that is no connection, as the holder of its body."""

    party: str
    give_way: Callable[[], None]
    waiting: int = 0

    def own_waiting(self) -> int:
        return 0


def hold_request(
    services: Services, address: str, head: Head, give_way: Callable[[], None]
) -> Holding:
    """The holding of a request, to be entered for as long as the request is there. `give_way` is called when
    it must end, perhaps several times; it must not wait."""
    party = services.party_of("", address, f"request {id(head)}")
    return services.memory.hold(_Request(party, give_way))


# what was freed


@attrs.define(eq=False)
class Heap:
    """The heap of this process, of which freed memory is given back to the system.

    `work` is all that was done so far, in microseconds. `resident` and `trim` are the system's.
    """

    budget: MemoryBudget
    work: Callable[[], float]
    resident: Callable[[], int] = resident_bytes
    trim: Callable[[], object] = trim
    trims: int = 0
    _least: float = attrs.field(init=False)
    _before: tuple[float, int, float] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._before = (-inf, self.resident(), self.work())
        self._least = self._before[1] - self.budget.held

    def look(self, now: float) -> None:
        """See whether the process has far more memory than is held for clients; more than it had besides
        when this was last set right. Call it once a second, or more often."""
        held, resident = self.budget.held, self.resident()
        self._least = min(self._least, resident - held)
        garbage = resident - held - self._least
        much = min(MUCH_GARBAGE_BYTES, self.budget.limit / 4)
        if garbage >= much or (garbage >= GARBAGE_BYTES and self._is_quiet(now, resident)):
            self.trim()
            self.trims += 1
            self._least = self.resident() - held
        if now - self._before[0] >= BEAT:
            self._before = now, resident, self.work()

    def _is_quiet(self, now: float, resident: int) -> bool:
        """Whether little was done in the last second, and no memory was taken."""
        when, resident_before, work = self._before
        is_long_enough = now - when >= BEAT
        return is_long_enough and resident <= resident_before and self.work() - work < QUIET


# what is said of it


def fixed_bytes(config: Config, event_readers: int) -> int:
    """Bytes that may be held whatever connections do: the bounds on stores and queues, together."""
    events = event_readers * config.webhooks.max_events * EVENT_BYTES
    return config.history_bytes + config.retained_bytes + KEYS_BYTES + events


def memory_fields(services: Services) -> dict[str, object]:
    """The fields of the line that tells of the budget at start."""
    config = services.config
    places, most = services.admission.capacity.connections, config.connection_most
    of = "max_memory_bytes"
    if config.max_memory_bytes is None:
        of = f"half of this {find_room().of}"
    elif config.workers > 1:  # which is set for each
        of = f"the part of one of {config.workers} workers"
    return {
        "limit": in_words(services.memory.limit),
        "of": of,
        "stores": in_words(fixed_bytes(config, _event_readers(services))),
        "connections": f"{places:,} of {in_words(most)} at most",
    }


def memory_warning(services: Services) -> str | None:
    """Say in one line that stores and queues alone may take more than the limit; None if not."""
    config, limit = services.config, services.memory.limit
    fixed = fixed_bytes(config, _event_readers(services))
    if fixed <= limit:
        return None
    return (
        f"memory for clients is limited to {in_words(limit)} (max_memory_bytes), and history_bytes, "
        f"retained_bytes, keys and events alone may take {in_words(fixed)}: histories will be shorter "
        "than they are meant to be; raise the one or lower the others"
    )


def _event_readers(services: Services) -> int:
    events = services.router.events
    return 0 if events is None else events.readers


def in_words(size: float) -> str:
    if size >= 10 * 2**30:
        return f"{size / 2**30:,.1f} GiB"
    return f"{size / 2**20:,.1f} MiB"
