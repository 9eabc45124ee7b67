"""One version, wherever it is told."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from trio.testing import MockClock

import broker
from broker.testing import Network
from broker.version import VERSION


def test_the_version_is_one_that_packages_have() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", VERSION)  # PEP 440
    assert broker.__version__ == VERSION


def test_an_installed_package_has_the_same() -> None:
    try:
        installed = version("trio-broker")
    except PackageNotFoundError:
        pytest.skip("it is not installed")
    assert installed == VERSION


def test_the_build_reads_it_where_it_stands() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert 'path = "broker/version.py"' in project


async def test_a_client_is_told_the_version(autojump_clock: MockClock, net: Network) -> None:
    peer = await net.open_websocket()
    assert (await peer.request(connect={}))["connect"]["version"] == VERSION
