"""What goes between a client and a broker: commands as bytes, and what comes as structs.

Unknown fields are skipped, payloads stay raw JSON. Decides nothing.
"""

from collections.abc import Mapping

import msgspec

from broker.core.messages import ClientInfo, Publication


class ErrorReply(msgspec.Struct):
    code: int = 0
    message: str = ""
    temporary: bool = False


class Info(msgspec.Struct):
    client: str = ""
    user: str = ""
    conn_info: msgspec.Raw = msgspec.Raw()
    chan_info: msgspec.Raw = msgspec.Raw()

    def freeze(self) -> ClientInfo:
        return ClientInfo(
            self.client,
            self.user,
            bytes(self.conn_info) or None,
            bytes(self.chan_info) or None,
        )


class Pub(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"null")
    info: Info | None = None
    offset: int = 0
    time: int = 0
    channel: str = ""
    tags: dict[str, str] | None = None

    def freeze(self, topic: str) -> Publication:
        info = None if self.info is None else self.info.freeze()
        # A copy: a slice of the frame would keep all of the frame alive.
        data = bytes(self.data)
        return Publication(self.channel or topic, data, info, self.offset, self.time, self.tags)


class Connected(msgspec.Struct):
    client: str = ""
    ping: int = 0
    pong: bool = False
    subs: dict[str, msgspec.Raw] = {}


class Subscribed(msgspec.Struct):
    recoverable: bool = False
    positioned: bool = False
    epoch: str = ""
    offset: int = 0
    publications: list[Pub] = []
    recovered: bool = False


class HistoryResult(msgspec.Struct):
    publications: list[Pub] = []
    epoch: str = ""
    offset: int = 0


class PresenceResult(msgspec.Struct):
    presence: dict[str, Info] = {}


class StatsResult(msgspec.Struct):
    num_clients: int = 0
    num_users: int = 0


class Data(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"null")


class Member(msgspec.Struct):
    info: Info = msgspec.field(default_factory=Info)


class Ended(msgspec.Struct):
    code: int = 0
    reason: str = ""


class Push(msgspec.Struct):
    channel: str = ""
    pub: Pub | None = None
    join: Member | None = None
    leave: Member | None = None
    unsubscribe: Ended | None = None
    subscribe: dict[str, object] | None = None
    message: Data | None = None
    disconnect: Ended | None = None


class Reply(msgspec.Struct):
    id: int = 0
    error: ErrorReply | None = None
    push: Push | None = None
    connect: Connected | None = None
    subscribe: Subscribed | None = None
    history: HistoryResult | None = None
    presence: PresenceResult | None = None
    presence_stats: StatsResult | None = None
    rpc: Data | None = None


decode = msgspec.json.Decoder(Reply).decode_lines


def encode(command: Mapping[str, object]) -> bytes:
    # A newline separates commands. Ready JSON from the caller may hold some, between tokens only:
    # inside a JSON string it would have to be escaped.
    return msgspec.json.encode(command).replace(b"\n", b" ")
