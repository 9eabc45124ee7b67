"""Inputs of a client that speaks the Centrifuge protocol, badly: commands, names, positions, filters,
tokens, protobuf."""

import base64
import hmac
import json
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from tests.hostile.field import PLAIN, Attack, Field, Input, add, hostile, unless
from tests.hostile.heads import S1
from tests.hostile.target import SECRET, Setup
from tests.hostile.wire import BINARY, TEXT, Ended, Json, Peer, frame, result, said

APP: Final = "hostile peers, application level"
PROTOCOL: Final = "protocol"
REFUSED: Final = ("error 107", "close 3501")


async def _fate(peer: Peer) -> str:
    """The next reply, or the end."""
    try:
        return said(await peer.reply())
    except Ended as ended:
        return ended.how


def _sent(data: bytes, *, connected: bool = True, opcode: int = TEXT) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        if connected:
            peer = await field.open_client()
        else:
            peer = await field.open_ws(fields={"Sec-WebSocket-Protocol": "centrifuge-json"})
        await peer.send(frame(opcode, data))
        return [await _fate(peer)]

    return attack


def raw(name: str, source: str, data: bytes, *should: str, connected: bool = True) -> None:
    """Put a message of any bytes, and its answer, into the table."""
    attack = _sent(data, connected=connected)
    add(
        Input(
            name=f"message/{name}", source=source, should=should, attack=attack, times=5, quick=True
        )
    )


def command(name: str, source: str, fields: object, *should: str, setup: Setup = PLAIN) -> None:
    """Put one command of a client that is connected, and its answer, into the table."""
    attack = _sent(msgspec.json.encode({"id": 7, **fields} if isinstance(fields, dict) else fields))
    add(
        Input(
            name=f"command/{name}", source=source, should=should, attack=attack, setup=setup,
            times=5, quick=setup is PLAIN,
        )
    )  # fmt: skip


# what is no command

raw("not JSON", APP, b"hello", "close 3501")
raw("half an object", APP, b'{"id":1', "close 3501")
raw("a list", APP, b"[]", "close 3501")
raw("line ends alone", "issue 8", b"\n\n\n", *REFUSED)
raw("one line end", "issue 8", b"\n", *REFUSED)
raw("blanks alone", "issue 8", b"   ", *REFUSED)
raw("empty", "issue 8", b"", *REFUSED)
raw("line ends before a connect", "issue 8", b"\n\n", *REFUSED, connected=False)
raw("a byte order mark", APP, "\ufeff{}".encode(), "close 3501")
raw(
    "nested 10,000 deep", APP, b'{"id":7,"publish":{"channel":"a","data":' + b"[" * 10_000, *REFUSED
)
raw("nested 10,000 deep, whole", APP,
    b'{"id":7,"publish":{"channel":"a","data":' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
    *REFUSED, "ok")  # fmt: skip
raw("a filter nested 10,000 deep", APP,
    b'{"id":7,"subscribe":{"channel":"a","tf":' + b'{"op":"not","nodes":[' * 10_000, *REFUSED)  # fmt: skip
raw("a command before connect", APP, b'{"id":1,"subscribe":{"channel":"a"}}', "close 3501",
    connected=False)  # fmt: skip
raw("no id", APP, b'{"subscribe":{"channel":"a"}}', "close 3501")
raw("id 0", APP, b'{"id":0,"subscribe":{"channel":"a"}}', "close 3501")
raw("id -1", APP, b'{"id":-1,"subscribe":{"channel":"a"}}', "close 3501")
raw("id 2^64", APP, b'{"id":18446744073709551616,"subscribe":{"channel":"a"}}', "close 3501")
raw("id of 5,000 digits", APP, b'{"id":' + b"9" * 5000 + b"}", "close 3501")
raw("id 1.5", APP, b'{"id":1.5,"subscribe":{"channel":"a"}}', "close 3501")
raw("id as text", APP, b'{"id":"1","subscribe":{"channel":"a"}}', "close 3501")
raw(
    "an id twice in one object",
    APP,
    b'{"id":1,"id":7,"rpc":{"method":"x"}}',
    "error 104",
    "close 3501",
)
raw("connect twice", APP, b'{"id":7,"connect":{}}', "close 3501")
raw(
    "bytes that are not UTF-8",
    APP,
    b'{"id":7,"publish":{"channel":"a","data":"\xff"}}',
    "close 1007",
)


@hostile(
    "message/not UTF-8, in a binary frame", APP, "close 3501", "close 1007", times=5, quick=True
)
async def _binary(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await peer.send(frame(BINARY, b'{"id":7,"publish":{"channel":"a","data":"\xff"}}'))
    return [await _fate(peer)]


# commands

command("unknown", APP, {"frobnicate": {}}, "error 104")
command("two methods", APP, {"rpc": {"method": "x"}, "presence": {"channel": "a"}}, "error 107")
command("rpc, unknown", APP, {"rpc": {"method": "frobnicate"}}, "error 104")
command("rpc of 1 MB of name", APP, {"rpc": {"method": "x" * 10**6}}, "error 104", "error 107")
command("refresh without tokens", PROTOCOL, {"refresh": {"token": "x"}}, "error 108")

for name, topic in {
    "empty": "",
    "of 1 MB": "x" * 10**6,
    "of 256 bytes": "x" * 256,
    "with NUL": "a\x00b",
    "with a line end": "a\nb",
}.items():
    for method in ("subscribe", "publish"):
        fields = {"channel": topic, **({"data": 1} if method == "publish" else {})}
        command(f"{method}, topic {name}", APP, {method: fields}, "error 107")
raw("subscribe, half an emoji", APP, b'{"id":7,"subscribe":{"channel":"\\ud83d"}}', *REFUSED)
raw(
    "publish to half an emoji",
    APP,
    b'{"id":7,"publish":{"channel":"\\ud83d","data":1}}',
    *REFUSED,
)
for name, pattern in {
    "> in the middle": "a.>.b",
    "9 stars": ".".join("*" * 9),
    "33 tokens": ".".join(["a"] * 32) + ".>",
}.items():
    command(f"pattern, {name}", APP, {"subscribe": {"channel": pattern}}, "error 107")
command("publish to a pattern", APP, {"publish": {"channel": "a.*", "data": 1}}, "error 107")
command("publish without data", APP, {"publish": {"channel": "a"}}, "error 107")
command("history of a pattern", APP, {"history": {"channel": ">"}}, "error 108")
command("presence of a pattern", APP, {"presence": {"channel": ">"}}, "error 108")
command("presence of a fd", APP, {"presence": {"channel": "fd:1"}}, "error 108")
command(
    "history, limit -2^63", APP, {"history": {"channel": "a", "limit": -(2**63)}}, "ok", "error 107"
)
raw("history, limit 2^64", APP, b'{"id":7,"history":{"channel":"a","limit":18446744073709551616}}',
    *REFUSED, "ok")  # fmt: skip
command("history, unknown epoch", APP,
        {"history": {"channel": "a", "since": {"offset": 1, "epoch": "nonsense"}}}, "error 112")  # fmt: skip
command("history, from the future", APP,
        {"history": {"channel": "a", "limit": 9, "since": {"offset": 10**9}}}, "ok", "error 112")  # fmt: skip
raw("history, since 2^64", APP,
    b'{"id":7,"history":{"channel":"a","since":{"offset":18446744073709551616}}}', *REFUSED,
    "error 112", "ok")  # fmt: skip
command("history, reverse from 0", APP,
        {"history": {"channel": "a", "reverse": True, "since": {"offset": 0}}}, "error 107")  # fmt: skip
command("a map subscription", PROTOCOL, {"subscribe": {"channel": "a", "type": 1}}, "error 108")


@hostile(
    "command/send with an id", PROTOCOL, "close 3508", "close 3501", "served", times=5, quick=True
)
async def _send(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await peer.say({"id": 50, "send": {"data": 1}})
    await peer.call(presence_stats={"channel": "a"})
    return ["served"]


# direct messages

for name, to in {
    "that never was": "fd:999999",
    "0": "fd:0",
    "-1": "fd:-1",
    "of 20 digits": "fd:" + "9" * 20,
    "of 200 digits": "fd:" + "9" * 200,
    "in Arabic digits": "fd:١",
    "of a user who is not here": "user:nobody",
}.items():
    command(
        f"message to a fd {name}",
        APP,
        {"publish": {"channel": to, "data": 1}},
        "error 102",
        "error 107",
    )
command(
    "subscribe to the fd of another",
    PROTOCOL,
    {"subscribe": {"channel": "fd:1"}},
    "error 103",
    "error 107",
)


@hostile("command/message to oneself", APP, "error 107", times=5, quick=True)
async def _self(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    return [said(await peer.call(publish={"channel": f"fd:{peer.fd}", "data": 1}))]


@hostile("command/message to a fd that has gone", APP, "error 102", times=5, quick=True)
async def _gone(field: Field) -> Sequence[str]:
    peer, other = await field.open_clients(2)
    await field.api("disconnect", client=str(other.fd))
    await other.ending()
    other.reset()
    while (fate := said(await peer.call(publish={"channel": f"fd:{other.fd}", "data": 1}))) == "ok":
        pass  # until the broker has seen the reset
    return [fate]


# the broker's own methods

RPC: Final[dict[str, tuple[dict[str, object], str]]] = {
    "publish, unknown field": ({"topic": "a", "data": 1, "frob": 1}, "error 107"),
    "publish, key of 256 bytes": ({"topic": "a", "data": 1, "key": "k" * 256}, "error 107"),
    "publish, exclude texts": ({"topic": "a", "data": 1, "exclude": ["x"]}, "error 107"),
    "publish, exclude 100,000": ({"topic": "a", "data": 1, "exclude": list(range(100_000))}, "ok"),
    "request to nobody": ({"to": "fd:999999", "data": 1}, "error 503"),
    "request for -1 s": ({"to": "fd:1", "data": 1, "seconds": -1}, "error 107"),
    "request for 1e300 s": ({"to": "fd:1", "data": 1, "seconds": 1e300}, "error 107"),
    "reply to nothing": ({"reply_to": "nonsense", "data": 1}, "error 107"),
    "reply to 5,000 digits": ({"reply_to": "9" * 5000, "data": 1}, "error 102"),
    "will on a pattern": ({"topic": "a.>", "data": 1}, "error 107"),
    "will, retained": ({"topic": "a", "data": 1, "retain": True}, "ok"),
}
for name, (parameters, answer) in RPC.items():
    method = name.split()[0].rstrip(",")
    also: tuple[str, ...] = (
        ("error 106", "error 107") if answer == "ok" and "exclude" in name else ()
    )
    also += ("error 107", "error 108", "error 504") if answer == "error 102" else ()
    command(f"rpc {name}", "protocol" if "will" not in name else "issue 8",
            {"rpc": {"method": method, "data": parameters}}, answer, *also)  # fmt: skip

# filters

LEAF: Final[dict[str, object]] = {"key": "a", "cmp": "eq", "val": "b"}


def _deep(levels: int) -> dict[str, object]:
    node = LEAF
    for _ in range(levels):
        node = {"op": "not", "nodes": [node]}
    return node


for name, node in {
    "101 nodes": {"op": "or", "nodes": [LEAF] * 100},
    "17 deep": _deep(17),
    "1,001 values": {"key": "a", "cmp": "in", "vals": [str(n) for n in range(1001)]},
    "an unknown operation": {"op": "xor", "nodes": [LEAF]},
    "an unknown comparison": {"key": "a", "cmp": "like", "val": "b"},
    "not of two": {"op": "not", "nodes": [LEAF, LEAF]},
    "a comparison without a key": {"cmp": "eq", "val": "b"},
    "1e999999999": {"key": "a", "cmp": "gt", "val": "1e999999999"},
    "a number of 100,000 digits": {"key": "a", "cmp": "gt", "val": "9" * 100_000},
    "NaN": {"key": "a", "cmp": "gt", "val": "NaN"},
}.items():
    command(f"filter, {name}", PROTOCOL, {"subscribe": {"channel": "a", "tf": node}}, "error 107")


# recovery


async def _three(field: Field) -> tuple[Peer, str, str]:
    """A client, a topic with three publications, and its epoch."""
    peer = await field.open_client()
    topic = f"recover-{peer.fd}"
    await peer.call(subscribe={"channel": topic, "recoverable": True})
    for number in range(3):
        await peer.call(publish={"channel": topic, "data": number})
    top = result(await peer.call(history={"channel": topic}))
    await peer.call(unsubscribe={"channel": topic})
    return peer, topic, top["epoch"]


def _recover(offset: int, epoch: str = "", flag: int = 0) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        peer, topic, current = await _three(field)
        asked = {"channel": topic, "recover": True, "epoch": epoch or current, "offset": offset}
        try:
            found = result(await peer.call(subscribe={**asked, "flag": flag}))
        except Ended as ended:
            return [ended.how]
        if not found.get("recovered"):
            return [f"not recovered, {len(found.get('publications', ()))} replayed"]
        return [f"recovered {len(found['publications'])}, answered {found.get('offset', 0)}"]

    return attack


NOT = "not recovered, 0 replayed"
for name, attack, fates in (
    ("future offset", _recover(10**6), (NOT,)),
    ("unknown epoch", _recover(1, "nonsense"), (NOT,)),
    ("offset 2^63", _recover(2**63), (NOT, *REFUSED)),
    ("offset 2^64", _recover(2**64 - 1), (NOT, *REFUSED)),
    ("future offset, refused if so", _recover(10**6, flag=2), ("error 112",)),
    ("the position that was asked for", _recover(1), ("recovered 2, answered 1",)),
):
    source = "issue 8" if "asked" in name else APP
    add(
        Input(
            name=f"recovery/{name}",
            source=source,
            should=fates,
            attack=attack,
            times=5,
            quick=True,
        )
    )


# tokens

TOKENS: Final = Setup(
    env={"BROKER_TOKENS_HMAC_SECRET": SECRET, "BROKER_TOKENS_ALLOW_ANONYMOUS": "true"}
)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(claims: object, header: Json | None = None, secret: str = SECRET) -> str:
    """A JSON Web Token (RFC 7515), signed by HMAC-SHA256 whatever its header says."""
    head = {"alg": "HS256", "typ": "JWT", **(header or {})}
    signed = f"{_base64(json.dumps(head).encode())}.{_base64(msgspec.json.encode(claims))}"
    return f"{signed}.{_base64(hmac.digest(secret.encode(), signed.encode(), 'sha256'))}"


def _unsigned(claims: object, algorithm: str) -> str:
    return token(claims, {"alg": algorithm}).rpartition(".")[0] + "."


def _shows(shown: str) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        await field.open_client(token=shown)
        return ["let in"]

    return attack


NO: Final = "close 3500"
for name, shown, answer, source in (
    ("nonsense", "nonsense", NO, APP),
    ("three dots", "...", NO, APP),
    ("alg none", _unsigned({"sub": "eve"}, "none"), NO, APP),
    ("alg None", _unsigned({"sub": "eve"}, "None"), NO, APP),
    ("alg none, signed", token({"sub": "eve"}, {"alg": "none"}), NO, APP),
    ("alg RS256, signed by HMAC", token({"sub": "eve"}, {"alg": "RS256"}), NO, APP),
    ("alg a number", token({"sub": "eve"}, {"alg": 256}), NO, APP),
    ("a wrong key", token({"sub": "eve"}, secret="x" * 40), NO, APP),
    ("of 100 KB", token({"sub": "eve", "meta": "x" * 100_000}), NO, APP),
    ("a list of claims", token(["sub", "eve"]), NO, APP),
    ("claims nested 3,000 deep", token({"sub": "eve"})[:40] + "." * 3, NO, APP),
    ("sub a number", token({"sub": 7}), NO, APP),
    ("critical header", token({"sub": "eve"}, {"crit": ["b64"], "b64": False}), NO, "RFC 7515 4.1.11"),
    ("kid a path", token({"sub": "eve"}, {"kid": "../../etc/passwd"}), "let in", "RFC 7515 4.1.4"),
    ("expired", token({"sub": "eve", "exp": 1}), "error 109", APP),
    ("exp 1e300", token({"sub": "e", "exp": 1e300}),
     "let in", APP),
    ("not yet valid", token({"sub": "eve", "nbf": time.time() + 10**6}), "error 109", APP),
    ("for one topic", token({"sub": "eve", "channel": "a"}), NO, APP),
    ("claims that are null", token({"sub": "eve", "exp": None, "channels": None, "info": None,
                                    "aud": None, "subs": None}), "let in", "issue 8"),
    ("jti a number", token({"sub": "eve", "jti": 5}), "let in", "issue 8"),
    ("1,400 channels, 9 KB", token({"sub": "e", "channels": [f"{n}" for n in range(1400)]}), NO, APP),
    ("1,001 channels", token({"sub": "e", "channels": [f"{n:x}" for n in range(1001)]}), "error 106",
     "protocol"),
):  # fmt: skip
    add(
        Input(
            name=f"token/{name}", source=source, should=(answer,), attack=_shows(shown),
            setup=TOKENS, times=5,
        )
    )  # fmt: skip


# protobuf


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _command(number: int, field: int, payload: bytes) -> bytes:
    body = b"\x08" + _varint(number) + _field(field, payload)
    return _varint(len(body)) + body


CONNECT: Final = _command(1, 4, b"")


def _protobuf(data: bytes) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.open_ws(fields={"Sec-WebSocket-Protocol": "centrifuge-protobuf"})
        await peer.send(frame(BINARY, CONNECT))
        await peer.message()
        await peer.send(frame(BINARY, data))
        with_deadline = await peer.ending(1)
        return ["answered" if with_deadline == "open" else with_deadline]

    return attack


BAD: Final = "close 3501"
for name, data, answers in (
    ("a length without end", b"\xff" * 12, (BAD,)),
    ("a length of 2^63", b"\xff" * 8 + b"\x7f", (BAD,)),
    ("half a command", CONNECT[:-1], (BAD,)),
    ("field 0", b"\x02\x00\x00", (BAD,)),
    ("wire type 7", b"\x02\x0f\x00", (BAD,)),
    ("16,385 commands", b"\x00" * 16_385, (BAD,)),
    ("16,385 fields", _varint(2 * 16_385) + b"\x08\x01" * 16_385, (BAD,)),
    ("groups within groups", _varint(5000) + b"\x0b" * 5000, (BAD,)),
    ("a topic that is not UTF-8", _command(2, 5, _field(1, b"\xff")), (BAD, "answered")),
    ("JSON", b'{"id":2,"rpc":{"method":"x"}}', (BAD,)),
    ("nothing", b"", (BAD, "answered")),
):
    add(
        Input(
            name=f"protobuf/{name}", source=PROTOCOL, should=answers, attack=_protobuf(data),
            times=5, quick=True,
        )
    )  # fmt: skip


# payloads are not the peer's fault


@hostile("payload/half an emoji", "issue 8", "delivered", "refused", times=5, quick=True)
async def _emoji(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    topic = f"emoji-{peer.fd}"
    await peer.call(subscribe={"channel": topic})
    message = b'{"id":7,"publish":{"channel":"%b","data":"\\ud83d"}}' % topic.encode()
    await peer.send(frame(TEXT, message))
    reply = await peer.reply(7)
    await peer.call(presence_stats={"channel": topic})  # it is still here
    return ["refused" if "error" in reply else "delivered"]


async def _open_protobuf(field: Field) -> Peer:
    peer = await field.open_ws(fields={"Sec-WebSocket-Protocol": "centrifuge-protobuf"})
    await peer.send(frame(BINARY, CONNECT))
    await peer.message()
    return peer


HALF: Final = b'"\\ud83d"'


@hostile("payload/half an emoji, to protobuf", "ADR 14", "replaced", quick=True)
async def _emoji_to_protobuf(field: Field) -> Sequence[str]:
    reader, peer = await _open_protobuf(field), await field.open_client()
    await reader.send(frame(BINARY, _command(2, 5, _field(1, b"emoji"))))
    await reader.message()
    await peer.send(frame(TEXT, b'{"id":7,"publish":{"channel":"emoji","data":%b}}' % HALF))
    return unless(b'"\\ufffd"' not in await reader.message() and "not replaced", "replaced")


@hostile("payload/half an emoji, by protobuf", "ADR 14", "as it came, replaced", quick=True)
async def _emoji_by_protobuf(field: Field) -> Sequence[str]:
    reader, listener = await _open_protobuf(field), await field.open_client()
    await listener.call(subscribe={"channel": "emojis"})
    await reader.send(frame(BINARY, _command(2, 5, _field(1, b"emojis"))))
    await reader.message()
    await reader.send(frame(BINARY, _command(3, 7, _field(1, b"emojis") + _field(2, HALF))))
    kept = HALF in await reader.message()
    (publication,) = await listener.publications()
    replaced = publication["data"] == "\ufffd"
    return [f"{'as it came' if kept else 'changed'}, {'replaced' if replaced else 'kept'}"]


@hostile("payload/half an emoji by API", "issue 8", "ok", "error 107", "400", times=5, quick=True)
async def _emoji_api(field: Field) -> Sequence[str]:
    from tests.hostile.heads import KEYED
    from tests.hostile.wire import request

    body = b'{"channel":"a","data":"\\ud83d"}'
    answer = await field.ask(request("POST /api/publish", [KEYED, ("Connection", "close")], body))
    return [said(msgspec.json.decode(answer.body)) if answer.status == 200 else str(answer.status)]


for name, nulls in {
    "token": {"subscribe": {"channel": "null", "token": None}},
    "data": {"subscribe": {"channel": "null", "data": None}},
    "offset": {"subscribe": {"channel": "null", "offset": None, "epoch": None}},
    "limit": {"history": {"channel": "null", "limit": None, "since": None}},
    "rpc data": {"rpc": {"method": "will", "data": None}},
}.items():
    command(f"null for {name}", "issue 8", nulls, "ok", "error 107")


@hostile("payload/null in connect", "issue 8", "let in", times=5, quick=True)
async def _null_connect(field: Field) -> Sequence[str]:
    await field.open_client(token=None, data=None, subs=None, name=None)
    return ["let in"]


@hostile("message/half a connect, then RST", S1, "gone", times=20, quick=True)
async def _half_connect(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(frame(TEXT, b'{"id":1,"connect":{}}')[:-4])
    peer.reset()
    return ["gone"]
