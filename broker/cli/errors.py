"""Mistakes on the command line, each of one line, and their exit statuses."""

import difflib
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from broker.logs import escape

_ELSEWHERE: Final = {"help": "--help", "start": "serve", "run": "serve"}
"""Commands of other brokers that are like no name of ours, or like a wrong one: `start` is near `stats`."""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


class _OneLine(click.ClickException):
    """An error whose text may come from a peer: it stays on its line and moves no cursor."""

    def format_message(self) -> str:
        return escape(super().format_message())


class Mistake(_OneLine):
    """An option, a file or an address is wrong. Click's own mistakes have the same status."""

    exit_code = 2


class Refusal(_OneLine):
    """The broker said no, or went away for good."""

    exit_code = 1


@contextmanager
def one_line() -> Iterator[None]:
    """Click puts the usage before a mistake if it knows the command; the mistake is enough."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise  # a group without a command: its help is the answer
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "python -m broker"
        text = error.format_message().removesuffix(".")  # click's own end with one
        # A hint of click's ends with a question mark, and one with several is in brackets.
        text = re.sub(r"\. \(Did you mean one of: (.*)\?\)\Z", r": did you mean one of \1?", text)
        text = re.sub(r"\. Did you mean (.*)\?\Z", r": did you mean \1?", text)
        end = "" if text.endswith("?") else "."
        raise click.UsageError(f"{text}{end} See {path} --help.") from error


def single_cause(error: BaseException) -> BaseException:
    """The exception inside nested groups of one; the error itself if there are more."""
    inner = error
    while isinstance(inner, BaseExceptionGroup):
        if len(inner.exceptions) != 1:
            return error
        inner = inner.exceptions[0]
    return inner


def ending_cause(error: BaseException) -> BaseException | None:
    """The `SystemExit`, `KeyboardInterrupt` or the like that ended the process; or None.

    Groups are looked into. None if an `Exception` is among what was raised: that is a bug, and
    wants its traceback.
    """
    ours = list(_leaves(error))
    if any(isinstance(leaf, Exception) for leaf in ours):
        return None
    return ours[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def exit_status(error: BaseException) -> int:
    """The exit status that Python gives a process which ends by this exception."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def origin_of(error: BaseException) -> str:
    """The line of code that raised it: `app.py:12 in answer`."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown"
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"


def nearest_command(name: str, ctx: click.Context) -> str:
    """The line to say where a command, or a MODULE:ATTR, was expected and `name` was given."""
    root = ctx.find_root().command
    commands = list(root.commands) if isinstance(root, click.Group) else []
    if name in commands:
        return f"{name!r} is a command: its name comes before all options"
    # `publish` means `pub`. Else 0.5, as for settings: `pbu` is near, `chat` and `server` are not.
    same = [command for command in commands if name.startswith(command)]
    if name in _ELSEWHERE:
        same = [_ELSEWHERE[name]]
    near = same or difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
    module = name.removesuffix(".py")
    if name != module or (not near and Path(f"{name}.py").is_file()):
        near = [f"{module}:broker"]
    hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(commands)}"
    return f"{name!r} is neither a command nor MODULE:ATTR, such as chat.server:broker; {hint}"
