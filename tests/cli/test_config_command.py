"""`config check`, `config show`, `config init`."""

import json
import tomllib
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from broker import Config
from broker.cli.main import main
from broker.config.described import TABLES, described
from broker.config.loading import load
from tests.cli.conftest import Served


def invoke(*args: str, **environ: str) -> Result:
    return CliRunner().invoke(main, ["config", *args], env=dict(environ))


def test_right_settings_are_counted_with_their_places(here: Path) -> None:
    Path("broker.toml").write_text("port = 9000\n[topics]\nretain = true\n")
    result = invoke("check", "--config", "broker.toml", BROKER_MAX_TOPICS="5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "right: 3 settings in BROKER_MAX_TOPICS, broker.toml\n"
    assert invoke("check").stdout == "right: 0 settings\n"


def test_what_may_not_do_what_was_meant_is_told_and_is_no_mistake(here: Path) -> None:
    Path("broker.toml").write_text('port = 9000\nunix = "b"\n')
    result = invoke("check", "broker.toml")
    assert result.exit_code == 0
    assert result.stderr == (
        "note: broker.toml: port counts for nothing beside unix: the broker listens on the socket alone\n"
    )
    assert result.stdout == "right: 2 settings in broker.toml\n"
    as_json = json.loads(invoke("check", "broker.toml", "--json").stdout)
    assert f"note: {as_json['doubts'][0]}\n" == result.stderr


def test_a_variable_that_is_no_setting_is_status_1(here: Path) -> None:
    result = invoke("check", BROKER_PROT="1", BROKER_PORT_9501_TCP="tcp://10.0.0.1:9501")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: BROKER_PROT: there is no such setting; did you mean BROKER_PORT?\n"
    )
    as_json = invoke("check", "--json", BROKER_PROT="1", BROKER_PORT="2")
    assert json.loads(as_json.stdout) == {
        "given": {"port": "BROKER_PORT"},
        "unknown": [{"name": "BROKER_PROT", "nearest": "BROKER_PORT"}],
        "doubts": [],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 'x'", "broker.toml: port is 'x': expected a whole number"),
        ("[tokens]\nallow_anonymous = false", "broker.toml: tokens.allow_anonymous is false, but"),
        ("tls_cert = 'a'", "broker.toml: tls_cert is 'a' but tls_key is not set"),
    ],
)
def test_wrong_settings_are_status_2_with_file_table_and_key(
    here: Path, text: str, message: str
) -> None:
    Path("broker.toml").write_text(text)
    for command in product(("check", "show"), ("--config=broker.toml", "broker.toml")):
        result = invoke(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {message}")
        assert result.stderr.count("\n") == 1


def test_a_file_is_named_by_itself_or_by_config_and_once(here: Path) -> None:
    Path("broker.toml").write_text("port = 9000\n")
    by_itself, by_option = (
        invoke("check", "broker.toml"),
        invoke("check", "--config", "broker.toml"),
    )
    assert by_itself.stdout == by_option.stdout == "right: 1 setting in broker.toml\n"
    assert invoke("show", "broker.toml").stdout == invoke("show", "--config", "broker.toml").stdout
    for command in ("check", "show"):
        missing = invoke(command, "no.toml")
        assert missing.exit_code == 2
        assert missing.stderr.startswith("Error: no.toml: ")
        twice = invoke(command, "broker.toml", "--config", "other.toml")
        assert twice.exit_code == 2
        assert "broker.toml and --config other.toml: give one of them" in twice.stderr


def test_settings_are_shown_with_where_they_were_given(here: Path) -> None:
    Path("broker.toml").write_text("port = 9000\nallowed_origins = ['*']\n")
    environ = {"BROKER_API_KEY": "s3cret", "BROKER_MESSAGE_RATE": "2.5"}
    result = invoke("show", "--config", "broker.toml", **environ)
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["SETTING", "VALUE", "GIVEN", "BY"],
        ["port", "9000", "broker.toml"],
        ["allowed_origins", '["*"]', "broker.toml"],
        ["api_key", "(secret)", "BROKER_API_KEY"],
        ["message_rate", "2.5", "BROKER_MESSAGE_RATE"],
    ]
    assert invoke("show").stdout == "all is as by default; --all shows it\n"
    everything = invoke("show", "--all").stdout
    assert "\ntopics.history_size " in everything
    rows = [json.loads(line) for line in invoke("show", "--all", "--json").stdout.splitlines()]
    assert len(rows) == len(everything.splitlines()) - 1
    assert {row["source"] for row in rows} == {"default"}


def test_those_of_a_running_broker_are_shown(served: Served) -> None:
    rows = {row["name"]: row for row in served.json("config", "show", "--running")}
    assert rows["max_topics"]["value"] == 500
    assert rows["max_topics"]["source"] == "program"
    assert rows["api_key"] == {
        "name": "api_key",
        "value": "(secret)",
        "source": "BROKER_API_KEY",
        "needs_restart": "",
    }


def test_a_file_to_begin_with_has_every_setting_as_by_default(here: Path) -> None:
    result = invoke("init", "new.toml")
    assert result.stdout == "new.toml: written; the broker reads it by --config new.toml\n"
    text = Path("new.toml").read_text("utf-8")
    assert invoke("init").stdout == text
    assert max(map(len, text.splitlines())) <= 99 + 30
    assert load(Path("new.toml"), {}, environ={}) == Config()
    # All that has a value, taken out of its comment, is right, and as by default.
    lines = text.splitlines()
    opened = [
        line[1:] if line[:1] == "#" and line[1:2].isalpha() and not line.endswith("=") else line
        for line in lines
    ]
    Path("opened.toml").write_text("\n".join(opened))
    assert load(Path("opened.toml"), {}, environ={}) == Config()
    given = tomllib.loads(Path("opened.toml").read_text("utf-8"))
    for table in TABLES:
        names = {each.field.name for each in described(table) if each.field is not None}
        unset = {line[1:-2] for line in lines if line.endswith(" =")}
        shown = given[table] if table else given
        assert names - unset <= {*shown}


def test_a_file_that_is_there_is_left_alone(here: Path) -> None:
    Path("mine.toml").write_text("port = 1")
    result = invoke("init", "mine.toml")
    assert result.exit_code == 1
    assert "mine.toml is there already" in result.stderr
    assert Path("mine.toml").read_text() == "port = 1"
    result = invoke("init", "no/such/dir.toml")
    assert (result.exit_code, "cannot write it" in result.stderr) == (2, True)
