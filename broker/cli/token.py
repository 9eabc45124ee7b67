"""`python -m broker token`: mints tokens for a try, and says what is wrong with one.

Rule: no secret on the command line, where every user of the machine can read it.
"""

import re
import time
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from broker import logs
from broker.access.keys import ALGORITHMS, load_secret
from broker.access.minting import algorithm_of, mint
from broker.access.tokens import WrongKind
from broker.cli.errors import Mistake, Refusal
from broker.config.loading import load
from broker.config.settings import Config
from broker.errors import BrokerError, ConfigError, TokenRefused

_PATH: Final = click.Path(path_type=Path)
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


@click.group(short_help="Mint and check JSON Web Tokens.")
def token() -> None:
    """Mint and check the tokens that clients connect and subscribe with.

    Keys come from [tokens] in the settings: --config, or BROKER_TOKENS_HMAC_SECRET.
    """


_config = click.option("--config", "file", type=_PATH, help="TOML file with settings.")


def _seconds(_: click.Context, __: click.Parameter, text: str) -> float | None:
    if text == "never":
        return None
    parsed = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text)
    if parsed is None:
        raise click.BadParameter(f"{text!r} is not like 90s, 15m, 1h, 7d or never")
    return float(parsed[1]) * _UNITS[parsed[2]]


def _json(_: click.Context, option: click.Parameter, text: str | None) -> object:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from error


@token.command(short_help="Print a new token.")
@_config
@click.option("--user", default="", help="Who the bearer is; nobody in particular if left out.")
@click.option(
    "--topic",
    help="Make a subscription token for this topic; without it a connection token is made.",
)
@click.option(
    "--expires", default="1h", show_default=True, callback=_seconds,
    help="How long it is good for: 90s, 15m, 1h, 7d or never.",
)  # fmt: skip
@click.option("--info", callback=_json, help="JSON that other clients see with this one.")
@click.option("--meta", callback=_json, help="JSON that only the app sees.")
@click.option(
    "--subscribe", "channels", multiple=True,
    help="Topic that the server subscribes the client to. May be repeated.",
)  # fmt: skip
@click.option("--key", type=_PATH, help="PEM file with a private key, in place of the secret.")
@click.option("--kid", default="", help="Name of the key, for brokers that fetch a key set.")
@click.option(
    "--algorithm", type=click.Choice(sorted(ALGORITHMS)),
    help="By default HS256, or what fits the private key.",
)  # fmt: skip
def create(
    file: Path | None,
    topic: str | None,
    user: str,
    expires: float | None,
    info: object,
    meta: object,
    channels: tuple[str, ...],
    key: Path | None,
    kid: str,
    algorithm: str | None,
) -> None:
    """Print a new token, signed with tokens.hmac_secret of the settings or with --key.

    Audience and issuer are those that the settings ask for.
    """
    if topic is not None and channels:
        raise Mistake("--subscribe is for connection tokens; leave out --topic, or it")
    try:
        rules = _load(file).tokens
        material = load_secret(rules) if key is None else key.read_bytes()
        if not material:
            raise Mistake(
                "no key to sign with: set BROKER_TOKENS_HMAC_SECRET, name a file with "
                "tokens.hmac_secret by --config, or a private key by --key"
            )
        now = int(time.time())
        claims = {
            "sub": user,
            "iat": now,
            "exp": None if expires is None else now + int(expires),
            "aud": rules.audience or None,
            "iss": rules.issuer or None,
            "channel": topic,
            "channels": channels or None,
            "info": info,
            "meta": meta,
        }
        payload = {name: claim for name, claim in claims.items() if claim is not None}
        if algorithm is None:
            algorithm = "HS256" if key is None else algorithm_of(material)
        elif key is None and not algorithm.startswith("HS"):
            raise Mistake(f"{algorithm} signs with a private key: name its file by --key")
        click.echo(mint(payload, material, algorithm, kid))
    except ConfigError as error:
        raise Mistake(str(error) if key is None else f"{key}: {error}") from error
    except OSError as error:
        raise Mistake(f"{key}: cannot read it: {error.strerror}") from error


@token.command(short_help="Verify a token and print what it says.")
@_config
@click.argument("text", metavar="TOKEN")
def check(file: Path | None, text: str) -> None:
    """Verify TOKEN as the broker would, and print its claims as JSON.

    Exit status 1 and the reason if the broker would refuse it.
    """
    logs.configure("console", "warning")
    try:
        config = _load(file)
        if not config.tokens.configured:
            raise Mistake(
                "no key to verify with: set BROKER_TOKENS_HMAC_SECRET, or name a file with "
                "[tokens] by --config"
            )
        claims = trio.run(_check, config, text)
    except TokenRefused as error:
        raise Refusal(f"the token is refused: {error}") from error
    except ConfigError as error:
        raise Mistake(str(error)) from error
    click.echo(msgspec.json.encode(claims))


async def _check(config: Config, text: str) -> object:
    from broker.access.jwks import open_tokens

    refusal: BrokerError
    async with open_tokens(config, time.time) as tokens:
        try:
            return (await tokens.connection(text)).claims
        except WrongKind:
            return (await tokens.subscription(text)).claims
        except TokenRefused as error:
            refusal = error
    raise refusal  # outside of the nursery, which would put it into a group


def _load(file: Path | None) -> Config:
    return load(file, {})
