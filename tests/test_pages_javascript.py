"""How-to pages with the JavaScript SDK: their modules, run under Node with the bundle that our own page has."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest

from tests.conftest import HMAC_SECRET, PATIENCE, Process

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.sdk

BUNDLE = ROOT / "broker" / "http" / "static" / "vendor" / "centrifuge-5.8.0.js"

HEAD = """\
import { readFileSync } from "node:fs";
import vm from "node:vm";
vm.runInThisContext(readFileSync(%r, "utf-8"));
const url = process.argv[2];
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const opened = [];
async function open(options = {}) {
  const client = new Centrifuge(`${url}/connection/websocket`, options);
  opened.push(client);
  client.connect();
  await client.ready(5000);
  return client;
}
async function until(what, is) {
  for (let n = 0; n < 2000; n++) {
    if (is()) return;
    await sleep(10);
  }
  throw new Error(`never ${what}`);
}
function check(is, what) {
  if (!is) throw new Error(what);
}
"""
FOOT = "opened.forEach((client) => client.disconnect());\nprocess.exit(0);\n"

TYPING = """
import { typingIndicator } from "./typing.mjs";
const [ann, ben, carl] = [await open(), await open(), await open()];
const shown = [];
const annTypes = typingIndicator(ann, "7", () => check(false, "nobody types but ann"), 400);
typingIndicator(ben, "7", (names) => shown.push(names.join()), 400);
typingIndicator(carl, "8", () => check(false, "another room"), 400);
await until("subscribed", () => ann.getSubscription("typing.7").state === "subscribed");
await until("subscribed", () => ben.getSubscription("typing.7").state === "subscribed");
let published = 0;
const publish = ann.getSubscription("typing.7").publish.bind(ann.getSubscription("typing.7"));
ann.getSubscription("typing.7").publish = (data) => { published++; return publish(data); };
for (let n = 0; n < 20; n++) annTypes.typed();
await until("shown", () => shown.length === 1);
check(published === 1, `told ${published} times`);
await until("quiet", () => shown.length === 2);
await sleep(250);
annTypes.typed();
await until("shown again", () => shown.length === 3);
annTypes.sent();
await until("sent", () => shown.length === 4);
annTypes.typed();
await until("shown once more", () => shown.length === 5);
ann.disconnect();
await until("left", () => shown.length === 6);
check(shown.join("|") === "fd 1||fd 1||fd 1|", shown.join("|"));
"""

PRIVATE = """
import { privateMessages } from "./private.mjs";
const tokens = process.argv.slice(3);
const [ann, phone, ben] = [await open({ token: tokens[0] }), await open({ token: tokens[0] }), await open({ token: tokens[1] })];
const got = [[], [], []];
const annSends = privateMessages(ann, (user, text) => got[0].push(`${user}: ${text}`));
privateMessages(phone, (user, text) => got[1].push(`${user}: ${text}`));
const benSends = privateMessages(ben, (user, text) => got[2].push(`${user}: ${text}`));
check(await annSends("ben", "hello"), "ben is here");
check(await benSends("ann", "hi"), "ann is here");
check(!(await annSends("carl", "hello?")), "carl is not here");
await until("received", () => got.flat().length === 3);
await sleep(100);
check(JSON.stringify(got) === '[["ben: hi"],["ben: hi"],["ann: hello"]]', JSON.stringify(got));
"""


DOCUMENT = """
const shown = { textContent: "" }, heard = {};
const hears = (name) => ({ addEventListener: (kind, handle) => { heard[`${name} ${kind}`] = handle; } });
globalThis.document = { querySelector: (name) => (name === "#typing" ? shown : hears(name)) };
"""

TYPES = """
opened.push(centrifuge);
await centrifuge.ready(5000);
const ben = await open(), seen = [];
const benTypes = typingIndicator(ben, "7", (names) => seen.push(names.join()));
for (const each of [centrifuge, ben]) {
  await until("subscribed", () => each.getSubscription("typing.7").state === "subscribed");
}
benTypes.typed();
await until("shown", () => shown.textContent === "fd 2 typing…");
benTypes.sent();
await until("gone", () => shown.textContent === "");
heard["#text input"]();
await until("told", () => seen.length === 1);
heard["form submit"]();
await until("sent", () => seen.length === 2);
check(seen.join("|") === "fd 1|", seen.join("|"));
"""

BACKEND = """
const printed = [];
console.log = (line) => printed.push(line);
globalThis.fetch = async (path) => {
  check(path === "/token", path);
  return { json: async () => ({ token: process.argv[3] }) };
};
"""

WRITES = """
opened.push(centrifuge);
check(printed.join() === "ben is not here: he will find it in his inbox", printed.join());
const ben = await open({ token: process.argv[4] });
check(await privateMessages(ben, () => {})("ann", "hi"), "ann is here");
await until("printed", () => printed.length === 2);
check(printed[1] === "ben: hi", printed[1]);
"""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "howto" / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(node: list[str], folder: Path, program: str, *arguments: str) -> None:
    (folder / "main.mjs").write_text(HEAD % str(BUNDLE) + program + FOOT, "utf-8")
    done = subprocess.run(
        [*node, "main.mjs", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def typing(start_broker: Callable[..., Process], tmp_path: Path) -> str:
    """The URL of a broker as the page about the typing indicator has it, whose module is `typing.mjs`."""
    (tmp_path / "broker.toml").write_text(blocks("typing-indicator.md", "toml")[0], "utf-8")
    module, _ = blocks("typing-indicator.md", "javascript")
    (tmp_path / "typing.mjs").write_text(module, "utf-8")
    return start_broker("--config", str(tmp_path / "broker.toml")).ws


@pytest.fixture
def private(
    start_broker: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The URL of a broker as the page about private messages has it, whose module is `private.mjs`; and the
    tokens of ann and ben."""
    monkeypatch.setenv("BROKER_TOKENS_HMAC_SECRET", HMAC_SECRET)
    module, _ = blocks("private-messages.md", "javascript")
    (tmp_path / "private.mjs").write_text(module, "utf-8")
    tokens = [jwt.encode({"sub": user}, HMAC_SECRET, "HS256") for user in ("ann", "ben")]
    return [start_broker().ws, *tokens]


def test_the_typing_indicator_of_its_page_works(
    node: list[str], tmp_path: Path, typing: str
) -> None:
    run(node, tmp_path, TYPING, typing)


def test_private_messages_of_their_page_reach_one_person(
    node: list[str], tmp_path: Path, private: list[str]
) -> None:
    run(node, tmp_path, PRIVATE, *private)


def used(page: str) -> str:
    """The module of a page that uses the one above it, for `main.mjs`."""
    _, code = blocks(page, "javascript")
    for shown, here in (
        ('import { Centrifuge } from "centrifuge";\n', ""),
        ('.js"', '.mjs"'),
        ('"ws://localhost:9501/connection/websocket"', "`${url}/connection/websocket`"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    return code


def test_the_page_that_uses_the_typing_indicator_shows_who_types_and_tells_the_others(
    node: list[str], tmp_path: Path, typing: str
) -> None:
    run(node, tmp_path, DOCUMENT + used("typing-indicator.md") + TYPES, typing)


def test_the_page_that_uses_private_messages_gets_one_and_says_who_is_not_here(
    node: list[str], tmp_path: Path, private: list[str]
) -> None:
    run(node, tmp_path, BACKEND + used("private-messages.md") + WRITES, *private)


@pytest.mark.parametrize("page", ["../javascript/tokens.md", "private-messages.md"])
def test_a_broker_with_a_key_is_told_where_the_page_is(page: str) -> None:
    """Or the page gets 403: those of one's own machine are let in only while no key is set."""
    (commands,) = [text for text in blocks(page, "shell") if "HMAC_SECRET" in text]
    assert "--allowed-origin http://localhost:3000" in commands
