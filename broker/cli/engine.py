"""`python -m broker engine`: looks after the file of an engine while no broker uses it."""

from pathlib import Path
from typing import Final

import click
import trio

from broker import logs
from broker.cli.errors import Mistake, Refusal
from broker.errors import ConfigError

_PATH: Final = click.Path(path_type=Path)
_MEBIBYTE: Final = 2**20


@click.group(short_help="Check or compact the file of an engine.")
def engine() -> None:
    """Look after a file that `--engine sqlite:PATH` keeps, while no broker uses it."""


@engine.command(short_help="Say what a file holds, and whether it is whole.")
@click.argument("path", metavar="PATH", type=_PATH)
def check(path: Path) -> None:
    """Read all of PATH, change nothing, and print what is in it.

    Exit status 1 and what is wrong, if anything is; 2 if it cannot be read at all.
    """
    from broker.engines.sqlite_upkeep import inspect

    logs.configure("console", "warning")
    try:
        report = trio.run(inspect, path)
    except ConfigError as error:
        raise Mistake(str(error)) from error
    if report.problems:
        raise Refusal(f"{path} is damaged: {'; '.join(report.problems)}")
    click.echo(
        f"{path}: whole; {report.publications} publications in {report.topics} topics, "
        f"{report.values} retained values, {report.keys} keys; the next fd is {report.next_fd}; "
        f"{report.bytes / _MEBIBYTE:.1f} MiB in {report.commits} commits; "
        f"{'closed in good order' if report.is_clean else 'not closed: its broker was killed'}"
    )


@engine.command(short_help="Make a file as small as what it keeps.")
@click.argument("path", metavar="PATH", type=_PATH)
def compact(path: Path) -> None:
    """Write anew what PATH keeps, and give back the rest of its room to the file system.

    A broker does the first by itself. The second needs as much free room as the file takes.
    """
    from broker.engines.sqlite_file import NotWritten
    from broker.engines.sqlite_upkeep import compact as compact_file

    logs.configure("console", "warning")
    try:
        before, after = trio.run(compact_file, path)
    except ConfigError as error:
        raise Mistake(str(error)) from error
    except NotWritten as error:
        raise Refusal(f"{path} is as it was: {error}") from error
    click.echo(f"{path}: {before / _MEBIBYTE:.1f} MiB before, {after / _MEBIBYTE:.1f} MiB now")
