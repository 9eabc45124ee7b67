"""Make the pictures of the dashboard for the docs: `nox -s screenshots`.

A broker of its own, with people in it, is looked at in Chromium: desktop and phone, light and dark. The
pictures are `dashboard-*.png` in `docs/images/`; look at them before they are committed.
"""

import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

HERE = Path(__file__).parent
IMAGES = HERE / "images"
PORT = int(os.environ.get("SCREENSHOTS_PORT", "20650"))
KEY = "a-key-for-pictures"
URL = f"http://127.0.0.1:{PORT}"
PEOPLE = [
    "mei",
    "jonas",
    "amara",
    "luca",
    "sofia",
    "kenji",
    "priya",
    "tomás",
    "nadia",
    "olu",
    "ines",
    "björn",
]
ROOMS = ["chat.lobby", "chat.design", "chat.ops", "news.world", "news.tech", "prices.eur"]
WARM_UP = 75.0
"""Seconds of traffic before the first picture: enough for charts that have something to say."""


# the broker, and the people in it


async def serve() -> None:
    from broker import Broker, Config
    from broker.hooks import ConnectEvent, ConnectReply

    config = Config(
        host="127.0.0.1", port=PORT, admin_key=KEY, name="eu-west-1", log_level="warning"
    )
    broker = Broker(config)

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    await broker.serve()


async def live() -> None:
    async with trio.open_nursery() as nursery:
        for number in range(60):
            nursery.start_soon(person, number)
        nursery.start_soon(prices)
        nursery.start_soon(passers_by)


async def person(number: int) -> None:
    from broker.client import open_client

    chance = random.Random(number)
    user = PEOPLE[number % len(PEOPLE)]
    await trio.sleep(chance.uniform(0, 40))
    async with (
        open_client(f"ws://127.0.0.1:{PORT}", token=user) as client,
        trio.open_nursery() as here,
    ):
        for room in chance.sample(ROOMS, chance.randint(1, 4)):
            here.start_soon(listen, client, room)
        while True:
            await trio.sleep(chance.expovariate(1 / 1.5))
            said = chance.choice(
                ["On my way", "Shipped it!", "Can you look at this?", "lunch?", "+1"]
            )
            await client.publish(chance.choice(ROOMS[:3]), {"text": said, "from": user})


async def listen(client: Any, room: str) -> None:
    async with client.subscribe(room) as subscription:
        async for _ in subscription:
            pass


async def prices() -> None:
    """A busy topic, which comes and goes like a market."""
    from broker.client import open_client

    chance = random.Random(7)
    async with open_client(f"ws://127.0.0.1:{PORT}", token="ticker") as client:
        for second in range(10_000):
            count = int(20 + 14 * abs((second % 40) - 20) / 10 + chance.uniform(0, 12))
            for _ in range(count):
                await client.publish(
                    "prices.eur", {"usd": round(1.08 + chance.gauss(0, 0.002), 5)}, reply=False
                )
            await trio.sleep(1)


async def passers_by() -> None:
    """People who stay for a moment, and go in different ways."""
    from broker.client import open_client

    for number in range(10_000):
        with suppress(Exception), trio.move_on_after(3):
            async with open_client(f"ws://127.0.0.1:{PORT}", token=PEOPLE[number % 7]) as client:
                async with client.subscribe("chat.lobby"):
                    await trio.sleep(1 + number % 3)
        stream = await trio.open_tcp_stream("127.0.0.1", PORT)
        if number % 2:
            from broker.testing import handshake

            await stream.send_all(handshake(host=f"127.0.0.1:{PORT}"))
            await stream.receive_some(1000)
            await trio.sleep(0.3)
        await trio.aclose_forcefully(stream)
        await trio.sleep(2)


# the pictures

VIEWS = {
    "overview": ("#/overview", ".u-wrap"),
    "connections": ("#/connections", "tbody tr"),
    "connection": ("#/connections/3", ".meters"),
    "topics": ("#/topics", "tbody tr"),
    "topic": ("#/topics/chat.lobby", ".publication"),
    "closed": ("#/closed", "tbody tr"),
    "trace": ("#/trace/topic/chat.*", ".lines li:nth-child(8)"),
    "tree": ("#/tree", ".tree li li"),
    "budgets": ("#/budgets", "tbody tr"),
    "engine": ("#/engine", "tbody tr"),
    "config": ("#/config", "tbody tr"),
}
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1360, "height": 880}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "has_touch": True,
    },
}
KEPT = {
    ("overview", "desktop", "light"), ("overview", "desktop", "dark"), ("overview", "phone", "light"),
    ("overview", "phone", "dark"), ("connections", "desktop", "light"), ("connection", "phone", "dark"),
    ("closed", "desktop", "dark"), ("trace", "desktop", "light"), ("tree", "desktop", "light"),
}  # fmt: skip
"""The pictures that the docs show; `--all DIR` makes all of them, for whoever changes the page."""


def take(everything: Path | None) -> None:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("BROKER_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        for screen, options in SCREENS.items():
            for theme in ("light", "dark"):
                context = browser.new_context(color_scheme=theme, **options)
                context.set_default_timeout(60_000)
                page = context.new_page()
                page.goto(f"{URL}/admin")
                if everything:
                    page.locator("#key").wait_for()
                    page.screenshot(path=everything / f"login-{screen}-{theme}.png")
                page.get_by_label("Key").fill(KEY)
                page.get_by_role("button", name="Log in").click()
                page.locator("#nav a").first.wait_for()
                for name, (address, there) in VIEWS.items():
                    folder = IMAGES if (name, screen, theme) in KEPT else everything
                    if folder is None:
                        continue
                    page.goto(f"{URL}/admin{address}")
                    page.locator(f"#view {there}").first.wait_for(state="attached")
                    page.wait_for_timeout(2500 if name == "trace" else 1200)
                    page.screenshot(path=folder / f"dashboard-{name}-{screen}-{theme}.png")
                context.close()
        browser.close()


def main(arguments: list[str]) -> None:
    if arguments in (["--serve"], ["--live"]):
        trio.run(serve if arguments == ["--serve"] else live)
        return
    everything = Path(arguments[1]) if arguments[:1] == ["--all"] else None
    begin = [sys.executable, __file__]
    process = subprocess.Popen([*begin, "--serve"])
    people = None
    try:
        _wait_healthy(process)
        people = subprocess.Popen([*begin, "--live"])
        time.sleep(float(os.environ.get("SCREENSHOTS_WARM_UP", WARM_UP)))
        take(everything)
    finally:
        for each in filter(None, (people, process)):
            each.terminate()
            each.wait()


def _wait_healthy(process: "subprocess.Popen[bytes]") -> None:
    for _ in range(100):
        assert process.poll() is None, "the broker did not start"
        with suppress(OSError), urllib.request.urlopen(f"{URL}/healthz"):
            return
        time.sleep(0.1)
    raise TimeoutError("the broker does not answer")


if __name__ == "__main__":
    main(sys.argv[1:])
