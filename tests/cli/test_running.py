"""The options that commands have in common, and where their values come from."""

import json
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trustme

from broker.cli.running import run_as_client
from tests.cli.conftest import COMMAND, PATIENCE, Served, serve
from tests.conftest import HMAC_SECRET

pytestmark = pytest.mark.usefixtures("logging_restored")


def test_ca_names_the_certificates_to_trust_and_without_tls_one_is_told_so(tmp_path: Path) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    stranger.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(tmp_path / "cert.pem"), append=number > 0)
    tls = ("--host", "127.0.0.1", "--tls-cert", "cert.pem", "--tls-key", "key.pem", "--port", "0")
    with serve(tmp_path, *COMMAND[1:], *tls, BROKER_API_KEY="s3cret") as served:
        secure = Served(served.url.replace("ws://", "wss://"), "s3cret", served.process)
        for command in (("pub", "news", "1"), ("topics",), ("bench", "--messages", "1")):
            assert secure.invoke(*command, "--ca", str(tmp_path / "ca.pem")).exit_code == 0
            by_variable = secure.invoke(*command, env={"BROKER_CA": str(tmp_path / "ca.pem")})
            assert by_variable.exit_code == 0
            refused = secure.invoke(*command, "--ca", str(tmp_path / "other.pem"))
            assert refused.exit_code == 2
            assert refused.stderr.count("\n") == 1
            assert "certificate verify failed" in refused.stderr.lower()
            assert "name the authority that has signed its certificate by --ca" in refused.stderr
        # The same port without TLS: the client says so, and a browser shows the broker's own words.
        plain = Served(served.url.replace("wss://", "ws://"), "s3cret", served.process)
        told = plain.invoke("pub", "news", "1")
        assert told.exit_code == 2
        assert "if TLS is spoken there, an address begins with wss://" in told.stderr
        told = plain.invoke("stats", "--url", plain.url.replace("ws://", "http://"))
        assert told.exit_code == 2
        assert (
            "this port speaks TLS: an address begins with https:// or wss:// (400)" in told.stderr
        )


@pytest.mark.parametrize(
    ("options", "environ", "user"),
    [
        ((), {}, ""),
        ((), {"BROKER_TOKEN": "ann"}, "ann"),
        (("--token", "bob"), {"BROKER_TOKEN": "ann"}, "bob"),
    ],
)
def test_an_option_goes_before_its_variable(
    served: Served, options: tuple[str, ...], environ: dict[str, str], user: str
) -> None:
    topic = f"by.{user}.{len(options)}"
    assert served.invoke("pub", topic, "1", *options, env=environ).exit_code == 0
    (publication,) = served.api("history", channel=topic, limit=-1)["publications"]
    assert publication["info"]["user"] == user


def test_the_api_may_be_named_by_its_own_address(served: Served) -> None:
    url = served.url.replace("ws://", "http://")
    assert served.invoke("stats", "--url", url).exit_code == 0
    result = served.invoke("stats", "--url", f"{url}/elsewhere")
    assert result.exit_code == 2
    assert "/elsewhere" in result.stderr
    assert result.stderr.endswith(" The page is at /. (404)\n")


def test_where_nothing_speaks_tls_the_other_kind_of_address_is_named(served: Served) -> None:
    url = served.url.replace("ws://", "wss://")
    for command in ("pub", "news", "1"), ("stats",):
        result = served.invoke(*command, "--url", url)
        assert result.exit_code == 2
        assert result.stderr.endswith(
            "; without TLS there, an address begins with ws:// or http://\n"
        )


def test_who_has_no_token_is_told_how_to_give_one(tmp_path: Path) -> None:
    secret = {"BROKER_TOKENS_HMAC_SECRET": HMAC_SECRET}
    with serve(tmp_path, *COMMAND[1:], "--port", "0", BROKER_API_KEY="s3cret", **secret) as served:
        for command in ("pub", "news", "1"), ("sub", "news"):
            result = served.invoke(*command)
            assert result.exit_code == 1
            assert result.stderr == (
                "Error: 3500: invalid token; give a valid one by --token or BROKER_TOKEN: "
                "the broker's log says what was wrong\n"
            )


@pytest.mark.parametrize(
    "command",
    [
        *("pub", "sub", "history", "presence", "request", "connections", "connection", "topics"),
        *("disconnect", "trace", "top", "stats", "config", "config show", "version", "bench"),
    ],
)
def test_every_command_helps_by_h_alone(served: Served, command: str) -> None:
    text = served.ok(*command.split(), "-h")
    assert text.startswith("Usage: ")
    assert served.key not in text


def test_ctrl_c_is_not_lost_in_whatever_task_is_at_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def at_work() -> None:
        with suppress(KeyboardInterrupt):  # as in a callback, where Python drops it
            signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    async def run(_: None) -> None:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at_work)

    with pytest.raises(SystemExit) as ended:
        run_as_client(run, None)
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_json_is_one_object_a_line(served: Served) -> None:
    for command in (("stats",), ("version",), ("config", "show", "--all"), ("connections",)):
        for line in served.ok(*command, "--json").splitlines():
            assert isinstance(json.loads(line), dict)
