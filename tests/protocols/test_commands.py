"""Commands that are refused alone, and those that end a connection."""

import pytest

from broker.protocols.commands import METHODS, WITHOUT_ID, BadCommand, Command, faulty


@pytest.mark.parametrize("method", METHODS)
def test_a_faulty_command_is_of_its_method_and_says_why(method: str) -> None:
    command = faulty(7, [method], f"{method}.channel: no text")
    assert isinstance(command, Command)
    assert (command.id, command.fault) == (7, f"{method}.channel: no text")
    assert [each for each in METHODS if getattr(command, each) is not None] == [method]
    assert getattr(command, method) == type(getattr(command, method))()


def test_it_may_have_several_methods_or_none() -> None:
    for methods in ([], ["publish", "rpc"]):
        command = faulty(1, methods, "x")
        assert [each for each in METHODS if getattr(command, each) is not None] == methods


@pytest.mark.parametrize("method", METHODS)
def test_without_an_id_only_what_wants_no_reply_is_let_pass(method: str) -> None:
    if method in WITHOUT_ID:
        assert faulty(0, [method], "x").id == 0
    else:
        with pytest.raises(BadCommand, match="x"):
            faulty(0, [method], "x")
    for methods in ([], ["publish", method] if method != "publish" else ["publish", "send"]):
        with pytest.raises(BadCommand, match="x"):
            faulty(0, methods, "x")


def test_it_is_never_the_answer_to_a_ping() -> None:
    assert faulty(0, ["send"], "x") != Command()
