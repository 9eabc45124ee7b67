"""Kinds of names, each as a table of examples."""

import pytest

from broker.core.names import (
    RESERVED_NAMESPACES,
    admits_user,
    check_name,
    check_publishable,
    direct_fd,
    guards_itself,
    is_connection_name,
    is_private,
    may_cover_private,
    namespace_of,
    personal_topic,
    users_of,
)
from broker.errors import Refused


@pytest.mark.parametrize(
    "topic, fd",
    [
        ("news", None),
        ("fd", None),
        ("FD:1", None),
        ("fd:1", 1),
        ("fd:123456789012345678", 123456789012345678),
        ("fd:0", Refused),
        ("fd:01", Refused),
        ("fd:", Refused),
        ("fd:+1", Refused),
        ("fd:1_0", Refused),
        ("fd:²", Refused),
        ("fd:1234567890123456789", Refused),
    ],
)
def test_one_connection_has_one_name(topic: str, fd: object) -> None:
    if fd is Refused:
        with pytest.raises(Refused, match="102"):
            direct_fd(topic)
    else:
        assert direct_fd(topic) == fd


@pytest.mark.parametrize(
    "name, stands",
    [
        ("fd:1", True),
        ("fd:x", True),  # no good one, and no topic either
        ("user:ann", True),
        ("user:", True),
        ("fd", False),
        ("users:ann", False),
        ("$fd:1", False),
        ("FD:1", False),
    ],
)
def test_two_namespaces_stand_for_connections(name: str, stands: bool) -> None:
    assert is_connection_name(name) is stands
    if stands:
        assert namespace_of(name) in RESERVED_NAMESPACES


@pytest.mark.parametrize(
    "name, topic, listenable",
    [
        ("a", True, True),
        ("a.b", True, True),
        ("a.*", False, True),
        (">", False, True),
        ("a.>", False, True),
        ("a*", True, True),  # the star is no token of its own: a letter like others
        ("", False, False),
        ("a.>.b", False, False),
        ("a\n", False, False),
        ("x" * 20, True, True),
        ("x" * 21, False, False),
        ("é" * 11, False, False),  # bytes count, not letters
    ],
)
def test_a_name_is_a_topic_or_a_pattern_or_nothing(
    name: str, topic: bool, listenable: bool
) -> None:
    for check, passes in ((check_publishable, topic), (check_name, listenable)):
        if passes:
            check(name, 20)
        else:
            with pytest.raises(Refused, match="107"):
                check(name, 20)


@pytest.mark.parametrize(
    "name, private, may_cover",
    [
        ("a", False, False),
        ("$a", True, True),
        ("$", True, True),
        ("a$", False, False),
        ("a.$b", False, False),
        ("$a.*", True, True),
        ("*", False, True),
        (">", False, True),
        ("*.a", False, True),
        ("a.*", False, False),
        ("a.>", False, False),
        ("*a", False, False),  # a topic
    ],
)
def test_a_dollar_in_front_is_private_and_a_pattern_may_cover_that(
    name: str, private: bool, may_cover: bool
) -> None:
    assert is_private(name) is private
    assert may_cover_private(name) is may_cover


@pytest.mark.parametrize(
    "name, users",
    [
        ("a", None),
        ("a#ann", ["ann"]),
        ("a#ann,bob", ["ann", "bob"]),
        ("#ann", ["ann"]),
        ("a#", [""]),
        ("a#,ann", ["", "ann"]),
        ("a#bob#ann", ["ann"]),  # the last sign counts
        ("a#b:c", ["b:c"]),
        ("$a#ann", ["ann"]),
    ],
)
def test_a_name_may_limit_itself_to_users(name: str, users: list[str] | None) -> None:
    assert users_of(name) == users
    for user in ("ann", "bob", "b:c", "an"):
        assert admits_user(name, user) is (users is None or user in users)
    # Nobody in particular is not a user called "".
    assert admits_user(name, "") is (users is None)


@pytest.mark.parametrize(
    "name, guarded", [("a", False), ("$a", True), ("a#ann", True), ("a#", True), ("a$", False)]
)
def test_a_name_that_says_who_may_in_guards_itself(name: str, guarded: bool) -> None:
    assert guards_itself(name) is guarded


@pytest.mark.parametrize(
    "name, namespace",
    [
        ("a", None),
        ("chat:room", "chat"),
        ("$chat:room", "chat"),
        ("chat:a:b", "chat"),
        ("chat:", "chat"),
        (":room", ""),
        ("chat:room#a:b", "chat"),
        ("room#a:b", None),  # the colon is in a user's name
        ("#a:b", None),
        ("chat:*", "chat"),
        ("Chat:room", "Chat"),
    ],
)
def test_a_namespace_stands_before_the_first_colon(name: str, namespace: str | None) -> None:
    assert namespace_of(name) == namespace


@pytest.mark.parametrize(
    "user, topic",
    [
        ("ann", "#ann"),
        ("a:b", "#a:b"),
        ("", None),
        ("a,b", None),
        ("a#b", None),
        ("a\nb", None),
        ("x" * 49, "#" + "x" * 49),
        ("x" * 50, None),
        ("x" * 99, None),
    ],
)
def test_the_personal_topic_is_for_one_user_alone(user: str, topic: str | None) -> None:
    assert personal_topic(user, 50) == topic
