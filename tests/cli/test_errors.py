"""`broker.cli.errors`: what an exception means for the process, and which command was meant."""

import click
import pytest

from broker.cli.errors import (
    ending_cause,
    exit_status,
    nearest_command,
    one_line,
    origin_of,
    single_cause,
)


def test_a_single_cause_is_found_in_groups_of_one() -> None:
    cause = ValueError()
    assert single_cause(cause) is cause
    assert single_cause(ExceptionGroup("", [ExceptionGroup("", [cause])])) is cause
    crowd = ExceptionGroup("", [cause, KeyError()])
    assert single_cause(crowd) is crowd


@pytest.mark.parametrize(
    "error, status",
    [
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (SystemExit(3), 3),
        (SystemExit(-1), 255),
        (SystemExit("no database"), 1),
        (KeyboardInterrupt(), 130),
        (GeneratorExit(), 1),
    ],
)
def test_the_exit_status_is_the_one_that_python_gives(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_an_end_is_found_in_groups_unless_a_bug_is_beside_it() -> None:
    end = SystemExit(3)
    assert ending_cause(end) is end
    group = BaseExceptionGroup("", [BaseExceptionGroup("", [end]), KeyboardInterrupt()])
    assert ending_cause(group) is end
    assert ending_cause(ValueError()) is None
    assert ending_cause(BaseExceptionGroup("", [end, ValueError()])) is None


def test_the_origin_of_an_error_is_the_line_that_raised_it() -> None:
    assert origin_of(ValueError()) == "unknown"
    with pytest.raises(ValueError) as caught:
        int("x")
    place, _, name = origin_of(caught.value).rpartition(" in ")
    assert "test_errors.py:" in place
    assert name == "test_the_origin_of_an_error_is_the_line_that_raised_it"


@click.group()
def group() -> None: ...


for name in ("serve", "pub", "push", "sub", "token", "bench"):
    group.add_command(click.Command(name))


@pytest.mark.parametrize(
    "given, hint",
    [
        ("pbu", "did you mean 'pub'?"),
        ("publish", "did you mean 'pub'?"),
        ("subscribe", "did you mean 'sub'?"),
        ("benhc", "did you mean 'bench'?"),
        ("psuh", "did you mean 'push'?"),
        ("help", "did you mean '--help'?"),
        ("start", "did you mean 'serve'?"),
        ("run", "did you mean 'serve'?"),
        ("chat", "commands are serve, pub, push, sub, token, bench"),
        ("", "commands are serve"),
        ("push", "is a command"),
    ],
)
def test_the_nearest_command_is_named(given: str, hint: str) -> None:
    assert hint in nearest_command(given, click.Context(group))


@pytest.mark.parametrize(
    ("clicks", "ours"),
    [
        ("no such thing.", "no such thing."),
        (
            "No such option '--prt'. Did you mean '--port'?",
            "No such option '--prt': did you mean '--port'?",
        ),
        (
            "No such option '--prot'. (Did you mean one of: '--host', '--port'?)",
            "No such option '--prot': did you mean one of '--host', '--port'?",
        ),
    ],
)
def test_a_usage_error_is_one_line_and_names_the_help(clicks: str, ours: str) -> None:
    ctx = click.Context(group, info_name="broker")
    with pytest.raises(click.UsageError) as caught, one_line():
        raise click.UsageError(clicks, ctx)
    assert caught.value.message == f"{ours} See broker --help."
    assert caught.value.ctx is None
