"""The command line: arguments, exit statuses, signals.

Rule: a mistake of the user's is one line on stderr that names the input and the way out, and
exit status 2. A request that the broker refuses is one line and status 1. A traceback means a bug.

`serve` is the default command: arguments that do not begin with a command's name are its own,
so `python -m broker --port 9000 app:broker` and `python -m broker serve --port 9000 app:broker`
are the same. A command's name can never be mistaken for an app, which holds a colon.
"""

import sys
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from broker.cli.admin_commands import connection, connections, disconnect, stats, topics
from broker.cli.bench_command import bench
from broker.cli.client_commands import history, presence, pub, push, request
from broker.cli.config_command import config
from broker.cli.describe_commands import asyncapi, openapi
from broker.cli.engine import engine
from broker.cli.errors import INTERRUPTED, Mistake, ending_cause, nearest_command, one_line
from broker.cli.nodes import nodes
from broker.cli.serve import serve
from broker.cli.sub_command import sub
from broker.cli.token import token
from broker.cli.top import top
from broker.cli.trace_command import trace
from broker.cli.version_command import version
from broker.process import signals
from broker.transport.frames import BUILD
from broker.version import VERSION

_OF_THE_GROUP = frozenset({"-h", "--help", "--version"})


class _ServeByDefault(click.Group):
    """A group whose arguments are those of `serve`, unless they begin with a command's name."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:
        with one_line():
            return super().make_context(info_name, args, parent, **extra)

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
            is_neither = not args[:1] or not (args[0].startswith("-") or ":" in args[0])
            if ctx.resilient_parsing and is_neither:  # for a completion
                return super().parse_args(ctx, args)
            if args and is_neither:
                raise Mistake(nearest_command(args[0], ctx))
            args = ["serve", *args]
        if args[0] in signals.CLIENTS:
            signals.process.begin_client()
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            found += self.commands["serve"].shell_complete(ctx, incomplete)
        return found

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[serve] [OPTIONS] [MODULE:ATTR]")
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ARGUMENTS", "       ")

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
@click.version_option(f"{VERSION} ({BUILD})", prog_name="trio-broker")
def main() -> None:
    """A pub/sub broker over WebSocket, on Trio.

    Without a command it serves: on ws://localhost:9501, or as the options say. MODULE:ATTR is
    where your own Broker is, such as chat.server:broker; without it the built-in app answers.
    """


AS_CLIENT: Final = (pub, sub, push, history, presence, request)
AS_BACKEND: Final = (connections, connection, topics, disconnect, trace, top, stats, nodes)
HERE: Final = (config, token, engine, bench, openapi, asyncapi, version)
"""The commands by what they need of a broker: to be let in as a client, its api_key, nothing."""

for _command in (serve, *AS_CLIENT, *AS_BACKEND, *HERE):
    main.add_command(_command)
