"""Inputs that try to be somebody else, or to read what is not theirs: issue 8's table, as far as a
peer can cause it."""

import signal
from collections.abc import Sequence

import trio

from tests.hostile.field import Field, hostile, unless
from tests.hostile.target import Setup
from tests.hostile.wire import Ended, handshake, request, result, said

ISSUE = "issue 8"
RULE = '[[topics.patterns]]\nmatch = "slow"\nmay_publish = "{}"\n'
DOCS_APP = Setup(app="tests.hostile.apps:authorizing", connect={"token": "s3cret"})


def _app(name: str) -> Setup:
    return Setup(app=f"tests.hostile.apps:{name}")


@hostile("right/raw protocol to the next fd", ISSUE, "error 102", "kept for later", quick=True)
async def _next_fd(field: Field) -> Sequence[str]:
    attacker = await field.open_client()
    victim = await field.open_ws()
    disconnect = {"push": {"disconnect": {"code": 3500}}}
    reply = await attacker.call(publish={"channel": f"fd:{attacker.fd + 1}", "data": disconnect})
    first = await victim.call(connect={})
    if victim.pushes or "connect" not in first:
        return ["the victim got it raw"]
    if "error" in reply:
        return [said(reply)]
    found = await victim.publications()
    return unless(found[0]["data"] != disconnect and "changed", "kept for later")


@hostile("right/raw protocol from the API", ISSUE, "refused", "kept for later", quick=True)
async def _push_early(field: Field) -> Sequence[str]:
    before = await field.open_client()
    victim = await field.open_ws(fields={"Sec-WebSocket-Protocol": "centrifuge-json"})
    answer = await field.api(
        "push", fd=before.fd + 1, data={"push": {"disconnect": {"code": 3500}}}
    )
    first = await victim.call(connect={})
    if victim.pushes or "connect" not in first:
        return ["the victim got it raw"]
    status = answer.get("result", {}).get("status")
    return ["kept for later" if status == "queued" else "refused"]


@hostile("right/two strangers, one key", ISSUE, "both", quick=True, times=3)
async def _keys(field: Field) -> Sequence[str]:
    one, two, reader = await field.open_clients(3)
    topic = f"keys-{one.fd}"
    await reader.call(subscribe={"channel": topic})
    for peer, data in ((one, 1), (two, 2)):
        result(await peer.rpc("publish", topic=topic, data=data, key=topic))
    heard: list[object] = []
    with trio.move_on_after(1):
        while len(heard) < 2:
            heard += [each["data"] for each in await reader.publications()]
    return unless(heard != [1, 2] and f"only {heard}", "both")


@hostile("right/a map in connect's subs", ISSUE, "refused, and not connected", times=5, quick=True)
async def _map_in_connect(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    reply = await peer.call(connect={"subs": {"news": {"type": 1}}})
    if "error" not in reply:
        return [
            "refused, and not connected" if "news" not in reply["connect"]["subs"] else "let in"
        ]
    try:
        again = await peer.call(subscribe={"channel": "a"})
    except Ended:
        return ["refused, and not connected"]
    return unless("error" not in again and "refused, yet connected", "refused, and not connected")


@hostile("right/a map in connect's subs, by token", ISSUE, "refused, and not connected", "let in",
         setup=_app("subscribing"))  # fmt: skip
async def _map_in_server_sub(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    reply = await peer.call(connect={"subs": {"news": {"type": 1}}})
    if "error" not in reply:
        return ["let in"]
    try:
        again = await peer.call(subscribe={"channel": "a"})
    except Ended:
        return ["refused, and not connected"]
    return unless("error" not in again and "refused, yet connected", "refused, and not connected")


@hostile("right/a hook that returns False", ISSUE, "error 103", "error 100",
         setup=_app("false_subscribe"), errors=2)  # fmt: skip
async def _false(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    return [said(await peer.call(subscribe={"channel": "$payroll"}))]


@hostile("right/what a hook refuses, by pattern", ISSUE, "nothing", setup=DOCS_APP)
async def _by_pattern(field: Field) -> Sequence[str]:
    alice = await field.open_client(token="s3cret")
    bob = await field.open_client(token="b0b")
    for pattern in (">", "*.*", "staff.*", "*.plans", "staff.>"):
        await bob.call(subscribe={"channel": pattern})
    result(await alice.call(publish={"channel": "staff.plans", "data": "secret"}))
    with trio.move_on_after(0.5):
        found = await bob.publications()
        return [f"bob reads {found[0]['data']} by pattern"]
    return ["nothing"]


@hostile("right/what a hook refuses, by history", ISSUE, "error 103", setup=DOCS_APP)
async def _by_history(field: Field) -> Sequence[str]:
    alice = await field.open_client(token="s3cret")
    bob = await field.open_client(token="b0b")
    result(await alice.call(publish={"channel": "staff.plans", "data": "secret"}))
    return [said(await bob.call(history={"channel": "staff.plans", "limit": 9}))]


@hostile("right/what a hook refuses, by presence", ISSUE, "error 103", setup=DOCS_APP)
async def _by_presence(field: Field) -> Sequence[str]:
    bob = await field.open_client(token="b0b")
    return [said(await bob.call(presence={"channel": "staff.plans"}))]


@hostile("right/another user by bind", ISSUE, "bob everywhere", setup=_app("binding"))
async def _bind(field: Field) -> Sequence[str]:
    peer, reader = await field.open_clients(2)
    topic = f"bind-{peer.fd}"
    await reader.call(subscribe={"channel": topic})
    await peer.call(subscribe={"channel": topic})
    await peer.rpc("be", user="alice")
    await peer.call(subscribe={"channel": "#alice"})
    await peer.rpc("be", user="bob")
    await peer.call(publish={"channel": topic, "data": 1})
    (publication, *_) = await reader.publications()
    user = publication["info"].get("user", "")
    if user != "bob":
        return [f"publishes as {user!r}"]
    present = result(await reader.call(presence={"channel": topic}))["presence"]
    if present[str(peer.fd)].get("user") != "bob":
        return [f"present as {present[str(peer.fd)].get('user')!r}"]
    still = result(await field.api("connection", fd=peer.fd))
    return unless("#alice" in str(still) and "keeps #alice", "bob everywhere")


@hostile("right/a publish that a reload overtakes", ISSUE, "error 103",
         setup=Setup(app="tests.hostile.apps:slow_publish", toml=RULE.format("all")))  # fmt: skip
async def _reload(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    replies: list[str] = []
    config = field.target.config_file

    async def publish() -> None:
        replies.append(said(await peer.rpc("publish", topic="slow", data=1)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        await trio.sleep(0.3)
        config.write_text(RULE.format("none"))
        field.signal(signal.SIGHUP)
    config.write_text(RULE.format("all"))
    field.signal(signal.SIGHUP)
    await trio.sleep(0.2)
    return replies


@hostile(
    "right/two X-Forwarded-For lines", "issue 8; RFC 9110 5.3", "joined", setup=_app("headers")
)
async def _forwarded(field: Field) -> Sequence[str]:
    lines = [("X-Forwarded-For", "192.0.2.1"), ("X-Forwarded-For", "192.0.2.2"),
             ("Cookie", "a=1"), ("Cookie", "b=2")]  # fmt: skip
    data = handshake().replace(
        b"Upgrade: websocket",
        "\r\n".join(f"{k}: {v}" for k, v in lines).encode() + b"\r\nUpgrade: websocket",
    )
    peer = await field.connect()
    await peer.send(data)
    await peer.head()
    seen = result(await peer.call(connect={}))["data"]
    whole = "192.0.2.1, 192.0.2.2" in seen["x-forwarded-for"] and "a=1; b=2" in seen["cookie"]
    return unless(not whole and f"seen: {seen['x-forwarded-for']}; {seen['cookie']}", "joined")


@hostile("right/the API's key in a guess", "HTTP API", "401", times=10, quick=True)
async def _guess(field: Field) -> Sequence[str]:
    answers = []
    for key in ("", "x", "hostile-ke", "hostile-keyy", "\xff" * 50):
        found = await field.ask(request("POST /api/info", [("X-API-Key", key)], b"{}"))
        answers.append(str(found.status))
    return answers
