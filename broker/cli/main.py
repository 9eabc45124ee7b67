"""The command line: arguments, exit statuses, signals.

Rule: a mistake of the user's is one line on stderr that names the input and the way out, and
exit status 2. A request that the broker refuses is one line and status 1. A traceback means a bug.

`serve` is the default command: arguments that do not begin with a command's name are its own,
so `python -m broker --port 9000 app:broker` and `python -m broker serve --port 9000 app:broker`
are the same. A command's name can never be mistaken for an app, which holds a colon.
"""

import sys
from typing import Any

import click

from broker.cli import signals
from broker.cli.client_commands import bench, pub, push, sub
from broker.cli.engine import engine
from broker.cli.errors import INTERRUPTED, Mistake, ending_cause, nearest_command, one_line
from broker.cli.nodes import nodes
from broker.cli.serve import serve
from broker.cli.token import token
from broker.version import VERSION

_OF_THE_GROUP = frozenset({"-h", "--help", "--version"})


class _ServeByDefault(click.Group):
    """A group whose arguments are those of `serve`, unless they begin with a command's name."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with one_line():
                return super().invoke(ctx)
        except (KeyboardInterrupt, BaseExceptionGroup) as error:
            if isinstance(ending_cause(error), KeyboardInterrupt):
                sys.exit(INTERRUPTED)
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *_OF_THE_GROUP}:
            if args and not args[0].startswith("-") and ":" not in args[0]:
                raise Mistake(nearest_command(args[0], ctx))
            args = ["serve", *args]
        if args[0] in signals.CLIENTS:
            signals.process.begin_client()
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[serve] [OPTIONS] [MODULE:ATTR]")
        formatter.write_usage(ctx.command_path, "pub|sub|push|bench [OPTIONS] ARGUMENTS", "       ")
        formatter.write_usage(ctx.command_path, "nodes [OPTIONS]", "       ")
        formatter.write_usage(ctx.command_path, "token create|check [OPTIONS]", "       ")
        formatter.write_usage(ctx.command_path, "engine check|compact PATH", "       ")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of this file, the default first

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        serve = self.commands["serve"]
        rows = [param.get_help_record(ctx) for param in serve.get_params(ctx)]
        with formatter.section("Options of serve"):
            formatter.write_dl(
                [row for row in rows if row and row[0].startswith("--") and row[0] != "--help"]
            )
        super().format_options(ctx, formatter)


@click.group(cls=_ServeByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="trio-broker")
def main() -> None:
    """A pub/sub broker over WebSocket, on Trio.

    Without a command it serves: on ws://localhost:9501, or as the options say. MODULE:ATTR is
    where your own Broker is, such as chat.server:broker; without it the built-in app answers.
    """


for _command in (serve, pub, push, sub, nodes, token, engine, bench):
    main.add_command(_command)
