"""One hostile input: its name, what it does, what it must get; and the field on which it does it.

An input's `attack` returns outcomes, texts such as `400`, `close 1002`, `error 107` or `EOF`: one for
each peer whose fate matters. Every one of them must be among the input's `should`. Whether the
bystanders were harmed or something was left behind is judged for all inputs alike (`judge`).
"""

import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeAlias, TypedDict, Unpack

import attrs
import msgspec
import trio

from tests.hostile.target import API_KEY, Ground, Sample, Setup, Target
from tests.hostile.wire import (
    Ended,
    Json,
    Peer,
    Response,
    connect,
    handshake,
    request,
)

Attack: TypeAlias = "Callable[[Field], Awaitable[Sequence[str]]]"

MIB: Final = 2**20
MAX_NAME: Final = 50
"""As wide as its column."""
PLAIN: Final = Setup()


@attrs.frozen(kw_only=True)
class Input:
    """A named input. Sizes in MiB, times in seconds."""

    name: str
    source: str
    """The row, the rule or the section that says what must come."""
    should: tuple[str, ...]
    """Outcomes that are right; each that comes must be one of them."""
    attack: Attack
    setup: Setup = PLAIN
    times: int = 1
    """How often at the same time: what comes must be the same each time, and a leak of one file is
    seen better ten times over."""
    attackers: int = 1
    """Of 50 and more a bystander may notice twice as much."""
    p50_ms: float = 0.0
    """A bound on the bystander's median, where the input's row names one; 0: none."""
    seconds: float = 20.0
    """The attack is cut after this, which is a failure."""
    peak_mib: float = 64.0
    """The most RSS that the broker may gain meanwhile: a wide default, that no single peer's
    1 MiB messages come near."""
    left_mib: float = 32.0
    """The most that it may keep afterwards: arenas that stay half used, and code that was
    imported on first use."""
    files: int = 0
    """Open files that it may leave: connections to a backend are kept for the next question."""
    fresh: bool = False
    """Whether it has a broker of its own, as it leaves histories or wills behind."""
    finale: "Attack | None" = None
    """The step at the very end, when nobody is judged any more: a stop."""
    quick: bool = False
    """Whether `--quick` runs it."""
    control: bool = False
    """Whether it must be found harmful: proof that this table can fail."""
    errors: int = 0
    """Errors that the log may hold: of hooks that raise."""


class Bounds(TypedDict, total=False):
    """The fields of an `Input` that have defaults."""

    times: int
    attackers: int
    p50_ms: float
    seconds: float
    peak_mib: float
    left_mib: float
    files: int
    fresh: bool
    finale: Attack
    quick: bool
    control: bool
    errors: int


TABLE: Final[list[Input]] = []


def can_stand_on(entry: Input) -> bool:
    """Whether an input says as much of a broker that stands elsewhere than on memory: not where it is about
    its process, or has chosen."""
    setup = entry.setup
    of_process = setup.files or setup.disk_bytes or setup.cgroup_bytes or setup.stderr != "file"
    return not (of_process or entry.finale or entry.control or setup.ground != "memory")


def stood_on(entry: Input, ground: Ground) -> Input:
    """The same input for a broker that stands there."""
    return attrs.evolve(entry, setup=attrs.evolve(entry.setup, ground=ground))


def add(entry: Input) -> None:
    """Put an input into the table. Raises `ValueError` for a name that is there, or too long."""
    if len(entry.name) > MAX_NAME:
        raise ValueError(f"{entry.name} is longer than {MAX_NAME} characters")
    if any(entry.name == each.name for each in TABLE):
        raise ValueError(f"two inputs are called {entry.name}")
    TABLE.append(entry)


def hostile(
    name: str,
    source: str,
    *should: str,
    setup: Setup = PLAIN,
    **bounds: Unpack[Bounds],
) -> Callable[[Attack], Attack]:
    """Put the decorated function into the table, as the attack of an input."""

    def decorate(attack: Attack) -> Attack:
        add(Input(name=name, source=source, should=should, attack=attack, setup=setup, **bounds))
        return attack

    return decorate


class Field:
    """Where an attack happens: opens peers of every kind, and closes them afterwards."""

    def __init__(self, target: Target, nursery: trio.Nursery) -> None:
        self.target = target
        self.nursery = nursery
        self.peers: list[Peer] = []

    # peers

    async def connect(self, *, receive_buffer: int = 0) -> Peer:
        """A bare connection. Raises `Ended` with `refused`."""
        peer = Peer(await connect(self.target.address, receive_buffer=receive_buffer))
        self.peers.append(peer)
        return peer

    async def open_ws(
        self,
        path: str = "/",
        fields: Mapping[str, str | None] | None = None,
        *,
        receive_buffer: int = 0,
    ) -> Peer:
        """A peer after its handshake. Raises `Ended` with the status if that was refused."""
        peer = await self.connect(receive_buffer=receive_buffer)
        await peer.send(handshake(path, fields, host=self.target.address.name))
        status = (await peer.head()).status
        if status != 101:
            raise Ended(str(status))
        return peer

    async def open_client(
        self, *, receive_buffer: int = 0, subprotocol: str | None = None, **fields: object
    ) -> Peer:
        """A Centrifuge client in JSON after its `connect`. Raises `Ended` if that was refused."""
        offered = {"Sec-WebSocket-Protocol": subprotocol}
        peer = await self.open_ws(fields=offered, receive_buffer=receive_buffer)
        reply = await peer.call(connect=fields)
        if "connect" not in reply:
            raise Ended(f"error {reply['error']['code']}")
        peer.fd = int(reply["connect"]["client"])
        return peer

    async def open_clients(self, count: int, *, receive_buffer: int = 0) -> list[Peer]:
        return [await self.open_client(receive_buffer=receive_buffer) for _ in range(count)]

    async def open_stream(self, path: str, body: object = None, *, receive_buffer: int = 0) -> Peer:
        """A client without WebSocket, after the head of its stream: `body` is its first command.
        Raises `Ended` with the status."""
        peer = await self.connect(receive_buffer=receive_buffer)
        fields = [("Content-Type", "application/json")]
        await peer.send(request(f"POST {path}", fields, msgspec.json.encode(body)))
        head = await peer.head()
        if head.status != 200:
            raise Ended(str(head.status))
        return peer

    async def ask(self, data: bytes, *, finish: bool = False) -> Response:
        """The response to these bytes on a connection of their own. Raises `Ended`."""
        peer = await self.connect()
        with suppress(Ended):
            await peer.send(data)
            if finish:
                await peer.finish()
        return await peer.response()

    async def api(self, method: str, **params: object) -> Json:
        """Call the HTTP API. Raises `Ended` with the status where it is not 200."""
        fields = [("X-API-Key", API_KEY), ("Connection", "close")]
        answer = await self.ask(
            request(f"POST /api/{method}", fields, msgspec.json.encode(params) or b"{}")
        )
        if answer.status != 200:
            raise Ended(str(answer.status))
        found: Json = msgspec.json.decode(answer.body)
        return found

    async def keep_api(self) -> "Api":
        """A kept connection to the HTTP API."""
        return Api(await self.connect())

    # the broker's process

    def sample(self) -> Sample:
        return self.target.sample()

    def log(self) -> str:
        """The log since the attack began, or since it was last asked."""
        return "\n".join(self.target.log_lines())

    def signal(self, number: signal.Signals) -> None:
        self.target.signal(number)

    # the end

    async def close(self) -> None:
        """End all peers, without a word. Shielded: closing by force waits for nobody."""
        with trio.CancelScope(shield=True):
            for peer in self.peers:
                await peer.aclose()
        self.peers.clear()


class Api:
    """A backend that keeps its connection, as backends do."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def call(self, method: str, **params: object) -> Json:
        """Raises `Ended` with the status where it is not 200."""
        (answer,) = await self.batch([(method, params)])
        return answer

    async def batch(self, calls: Sequence[tuple[str, Mapping[str, object]]]) -> list[Json]:
        """Several at once, as a pool of backends would send them."""
        fields = [("X-API-Key", API_KEY)]
        await self._peer.send(
            b"".join(
                request(f"POST /api/{method}", fields, msgspec.json.encode(dict(params)))
                for method, params in calls
            )
        )
        answers = []
        for _ in calls:
            answer = await self._peer.response()
            if answer.status != 200:
                raise Ended(str(answer.status))
            answers.append(msgspec.json.decode(answer.body))
        return answers


async def outcome_of(attack: Attack, field: Field) -> Sequence[str]:
    """The outcomes of an attack; how a peer was ended is one as well."""
    try:
        return await attack(field)
    except Ended as ended:
        return [ended.how]


def unless(fault: object, good: str = "ok") -> list[str]:
    """`good` where there is no fault, else the fault, in words."""
    return [str(fault)] if fault else [good]
