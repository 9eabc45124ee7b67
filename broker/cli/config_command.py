"""The command `config`: checks a file, shows what is in force, writes a file to begin with."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from broker import logs
from broker.cli.errors import Mistake, Refusal
from broker.cli.output import echo_json, echo_table
from broker.cli.running import Target, as_backend, ask, json_option, with_api
from broker.config.effective import effective
from broker.config.loading import Loaded, load_with_sources
from broker.errors import ConfigError

if TYPE_CHECKING:
    from broker.client.http_api import ApiClient

_PATH: Final = click.Path(path_type=Path)
_WIDTH: Final = 99

_file = click.option("--config", "option", type=_PATH, help="The same as FILE, as `serve` has it.")
_argument = click.argument("file", metavar="[FILE]", type=_PATH, required=False)


@click.group(short_help="Check, show or begin a config.")
def config() -> None:
    """Check the settings, show those that are in force, or write a file to begin with."""


@config.command(short_help="Say whether the settings are right.")
@_argument
@_file
@json_option
def check(file: Path | None, option: Path | None, as_json: bool) -> None:
    """Read FILE and the BROKER_* variables as `serve` does, and say what is wrong.

    Exit status 2 and one line that names the place, the key and what would be right; or 1 for a
    variable that begins with BROKER_ and is no setting. A setting that is right and may not do what was
    meant, such as a key that can be guessed, is a line on stderr, and no more. A file that is named in a
    setting, such as a certificate, is not looked at.
    """
    loaded = _load(_one_of(file, option))
    places = sorted(set(loaded.sources.values()))
    if as_json:
        unknown = [attrs.asdict(each) for each in loaded.unknown]
        doubts = list(loaded.doubts)
        echo_json({"given": dict(loaded.sources), "unknown": unknown, "doubts": doubts})
    else:
        for doubt in loaded.doubts:
            click.echo(logs.escape(f"note: {doubt}"), err=True)
    if loaded.unknown:
        raise Refusal("; ".join(map(str, loaded.unknown)))
    if not as_json:
        count = len(loaded.sources)
        where = f" in {', '.join(places)}" if places else ""
        click.echo(f"right: {count} {'setting' if count == 1 else 'settings'}{where}")


def _one_of(file: Path | None, option: Path | None) -> Path | None:
    if None not in (file, option):
        raise click.UsageError(f"{file} and --config {option}: give one of them")
    return file or option


def _load(file: Path | None) -> Loaded:
    try:
        return load_with_sources(file, {})
    except ConfigError as error:
        raise Mistake(str(error)) from error


@config.command(short_help="Show the settings in force, and where each was given.")
@as_backend
@_argument
@_file
@click.option("--running", is_flag=True, help="Those of the broker at --url; needs --api-key.")
@click.option("--all", "everything", is_flag=True, help="Those that are as by default, too.")
@json_option
def show(
    target: Target,
    file: Path | None,
    option: Path | None,
    running: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Show the settings, and where each was given: a file, a variable, the command line or the
    program.

    Those of FILE and the BROKER_* variables of here; with --running those of a broker that
    serves. Secrets are not shown.
    """
    file = _one_of(file, option)
    if running and file is not None:
        raise click.UsageError(f"--running asks the broker: leave out {file}")
    if not running:
        loaded = _load(file)
        rows = [attrs.asdict(each) for each in effective(loaded.config, loaded.sources)]
        _echo(rows, everything, as_json)
        return

    async def work(api: "ApiClient") -> None:
        _echo((await ask(api, "config"))["settings"], everything, as_json)

    with_api(target, work)


def _echo(rows: Iterable[Mapping[str, Any]], everything: bool, as_json: bool) -> None:
    shown = [row for row in rows if everything or row["source"] != "default"]
    if as_json:
        for row in shown:
            echo_json(row)
        return
    if not shown:
        click.echo("all is as by default; --all shows it")
        return
    echo_table(
        ("SETTING", "VALUE", "GIVEN BY"),
        [(row["name"], _in_words(row["value"]), row["source"]) for row in shown],
    )


def _in_words(value: object) -> str:
    from broker.config.described import in_toml

    if value is None:
        return "unset"
    return value if value in ("inf", "(secret)") and isinstance(value, str) else in_toml(value)


@config.command(short_help="Write a file with all settings to begin with.")
@click.argument("file", metavar="[FILE]", type=_PATH, required=False)
def init(file: Path | None) -> None:
    """Write FILE, or to stdout, with every setting: what it is for, and its default as a comment.

    Take the # away where you want another value. A file that is there is left alone, exit
    status 1.
    """
    text = "\n".join(_lines())
    if file is None:
        click.echo(text, nl=False)
        return
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise Refusal(f"{file} is there already: name another, or move it away") from None
    except OSError as error:
        raise Mistake(f"{file}: cannot write it: {error.strerror}") from None
    click.echo(f"{file}: written; the broker reads it by --config {file}")


def _lines() -> Iterator[str]:
    from broker.config.described import TABLES, described, in_toml

    yield "# Settings of trio-broker. What is commented out is as by default."
    for table in TABLES:
        if table:
            yield from ("", "", f"[{table}]")
        for each in described(table):
            if each.field is None:
                yield from ("", "", f"# --- {each.words} ---")
                continue
            yield ""
            yield from textwrap.wrap(
                each.words, _WIDTH, initial_indent="# ", subsequent_indent="# "
            )
            yield _default_line(each.field.name, each.default, in_toml)
    yield ""


def _default_line(name: str, default: object, in_toml: Callable[[object], str]) -> str:
    if default is None or default == "":
        return f"#{name} ="
    return f"#{name} = {in_toml(default)}"
