"""The command `version`."""

import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Final

import click

from broker.cli.output import echo_fields, echo_json
from broker.cli.running import json_option
from broker.transport.frames import BUILD
from broker.version import VERSION

_PACKAGES: Final = ("trio", "trio-websocket", "wsproto", "hypercorn", "msgspec")
"""Packages whose versions matter in a report of a fault."""


@click.command(short_help="Show the versions of this and of what it stands on.")
@json_option
def version(as_json: bool) -> None:
    """Show the versions of the broker, of Python and of the packages that matter to it: what a report
    of a fault should have."""
    found = {
        "trio-broker": VERSION,
        "build": BUILD,
        "python": platform.python_version(),
        "system": sys.platform,
    }
    for package in _PACKAGES:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:  # as in an archive that somebody has made of all
            found[package] = "unknown"
    if as_json:
        echo_json(found)
    else:
        echo_fields(found)
