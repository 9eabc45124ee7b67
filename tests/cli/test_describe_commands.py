"""`openapi` and `asyncapi`: what a broker says of itself, without one."""

import json
from pathlib import Path

from click.testing import CliRunner

from broker import Config
from broker.cli.main import main
from broker.http.asyncapi import asyncapi
from broker.http.openapi import openapi


def test_the_api_is_printed_as_a_broker_serves_it() -> None:
    result = CliRunner().invoke(main, ["openapi"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["paths"].keys() == openapi()["paths"].keys()


def test_topics_are_printed_by_the_settings(here: Path) -> None:
    Path("broker.toml").write_text('[topics.namespaces.chat]\nmay_publish = "none"\n')
    result = CliRunner().invoke(
        main, ["asyncapi", "--config", "broker.toml"], env={"BROKER_PORT": "9000"}
    )
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert "publish_namespace1_chat" not in document["operations"]
    assert document["servers"]["root"]["host"] == "localhost:9000"
    plain = CliRunner().invoke(main, ["asyncapi"], env={"BROKER_PORT": None})
    assert json.loads(plain.stdout) == json.loads(json.dumps(asyncapi(Config())))


def test_a_mistake_in_the_settings_is_one_line(here: Path) -> None:
    Path("broker.toml").write_text("port = -1\n")
    result = CliRunner().invoke(main, ["asyncapi", "--config", "broker.toml"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: broker.toml: port is -1")
