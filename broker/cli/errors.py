"""Mistakes on the command line, each of one line, and their exit statuses."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from broker.logs import escape


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
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "python -m broker"
        text = error.format_message().removesuffix(".")  # click's own end with one
        raise click.UsageError(f"{text}. See {path} --help.") from error


def single_cause(error: BaseException) -> BaseException:
    """The exception inside nested groups of one; the error itself if there are more."""
    inner = error
    while isinstance(inner, BaseExceptionGroup):
        if len(inner.exceptions) != 1:
            return error
        inner = inner.exceptions[0]
    return inner
