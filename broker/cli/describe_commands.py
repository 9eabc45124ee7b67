"""The commands `openapi` and `asyncapi`: they describe the broker to programs that make clients and pages."""

from pathlib import Path

import click

from broker.cli.errors import Mistake
from broker.cli.output import echo_json
from broker.config.loading import load_with_sources
from broker.errors import ConfigError


@click.command(short_help="Print the HTTP API as OpenAPI 3.1.")
def openapi() -> None:
    """Print the description of the HTTP API, as OpenAPI 3.1 in JSON. A broker that has an API serves the
    same at /api/openapi.json, to whoever has its key."""
    from broker.http.openapi import openapi as described

    echo_json(described())


@click.command(short_help="Print what clients may say and hear as AsyncAPI 3.0.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file with settings.")
def asyncapi(file: Path | None) -> None:
    """Print what clients may publish and subscribe to by --config and the BROKER_* variables, as AsyncAPI
    3.0 in JSON. A broker that has an API serves its own at /api/asyncapi.json, to whoever has its key."""
    from broker.http.asyncapi import asyncapi as described

    try:
        loaded = load_with_sources(file, {})
    except ConfigError as error:
        raise Mistake(str(error)) from error
    echo_json(described(loaded.config))
