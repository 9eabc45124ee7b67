"""`python -m broker version`: all that a report of a fault should have."""

import platform
from importlib.metadata import version

import msgspec
import pytest
from click.testing import CliRunner

from broker.cli import version_command
from broker.cli.main import main
from broker.version import VERSION


def test_versions_are_those_of_what_is_installed() -> None:
    result = CliRunner().invoke(main, ["version", "--json"])
    assert result.exit_code == 0
    found = msgspec.json.decode(result.stdout)
    assert found["trio-broker"] == VERSION
    assert found["python"] == platform.python_version()
    assert found["trio"] == version("trio")
    assert found["msgspec"] == version("msgspec")


def test_as_text_it_is_a_line_each() -> None:
    lines = CliRunner().invoke(main, ["version"]).stdout.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert told["trio-broker"] == VERSION
    assert told["hypercorn"] == version("hypercorn")


def test_a_package_without_metadata_is_unknown_and_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(version_command, "_PACKAGES", ("trio", "no-such-package"))
    result = CliRunner().invoke(main, ["version", "--json"])
    assert msgspec.json.decode(result.stdout)["no-such-package"] == "unknown"
