import pytest

from broker import Config
from broker.access.operators import (
    DOOR,
    GUESSES,
    MAX_PLACES,
    SECONDS_PER_GUESS,
    KeyRefused,
    Operators,
    Role,
)
from broker.config.reload import Settings
from tests.conftest import ADMIN_KEY, VIEW_KEY


def operators(**fields: str) -> tuple[Operators, Settings]:
    settings = Settings(Config(**fields))  # type: ignore[arg-type]
    return Operators(settings), settings


BOTH = {"admin_key": ADMIN_KEY, "admin_view_key": VIEW_KEY}


@pytest.mark.parametrize(
    ("fields", "enabled"), [({}, False), (BOTH, True), ({"admin_view_key": VIEW_KEY}, True)]
)
def test_the_door_is_there_with_any_key(fields: dict[str, str], enabled: bool) -> None:
    ours, _ = operators(**fields)
    assert ours.enabled is enabled
    assert ours.guards(DOOR) is enabled
    assert not ours.guards("/connection/websocket")


@pytest.mark.parametrize(("key", "role"), [(ADMIN_KEY, Role.FULL), (VIEW_KEY, Role.VIEW)])
def test_each_key_gives_its_role(key: str, role: Role) -> None:
    ours, _ = operators(**BOTH)
    operator = ours.admit(key, "here", 0.0)
    assert operator.role is role
    assert key not in repr(operator)
    assert ours.may(operator, Role.VIEW)
    assert ours.may(operator, Role.FULL) is (role is Role.FULL)


WRONG = ["", "x", ADMIN_KEY[:-1], ADMIN_KEY + "x", ADMIN_KEY.upper(), "schlüssel", "\ud800x"]


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_key_opens_nothing(key: str) -> None:
    ours, _ = operators(**BOTH)
    with pytest.raises(KeyRefused):
        ours.admit(key, "here", 0.0)


@pytest.mark.parametrize("key", ["", ADMIN_KEY, "None"])
def test_without_keys_no_key_opens(key: str) -> None:
    ours, _ = operators()
    with pytest.raises(KeyRefused):
        ours.admit(key, "here", 0.0)


@pytest.mark.parametrize(
    "change",
    [{}, {"admin_key": "another"}, {"admin_view_key": ADMIN_KEY}, {"admin_view_key": VIEW_KEY}],
)
def test_a_login_counts_as_long_as_its_own_key_is_set_for_its_role(change: dict[str, str]) -> None:
    ours, settings = operators(**BOTH)
    operator = ours.admit(ADMIN_KEY, "here", 0.0)
    settings.replace(Config(**change))  # type: ignore[arg-type]
    assert not ours.may(operator, Role.FULL)
    assert not ours.may(operator, Role.VIEW)


def test_a_reload_of_other_settings_ends_no_login() -> None:
    ours, settings = operators(**BOTH)
    operator = ours.admit(ADMIN_KEY, "here", 0.0)
    settings.replace(Config(**BOTH, ping_seconds=7))  # type: ignore[arg-type]
    assert ours.may(operator, Role.FULL)


def test_who_guesses_is_slowed_down_and_the_right_key_with_him_but_nobody_elsewhere() -> None:
    ours, _ = operators(**BOTH)
    for _ in range(GUESSES):
        with pytest.raises(KeyRefused, match="wrong key"):
            ours.admit("guess", "there", 0.0)
    for key in ("guess", ADMIN_KEY):
        with pytest.raises(KeyRefused, match="too many"):
            ours.admit(key, "there", 0.0)
    assert ours.admit(ADMIN_KEY, "here", 0.0).role is Role.FULL
    # One guess in so many seconds, however often he tries meanwhile.
    for _ in range(100):
        with pytest.raises(KeyRefused, match="too many"):
            ours.admit("guess", "there", SECONDS_PER_GUESS * 0.9)
    with pytest.raises(KeyRefused, match="wrong key"):
        ours.admit("guess", "there", SECONDS_PER_GUESS)
    with pytest.raises(KeyRefused, match="too many"):
        ours.admit("guess", "there", SECONDS_PER_GUESS)
    assert ours.admit(ADMIN_KEY, "there", 3 * SECONDS_PER_GUESS).role is Role.FULL


def test_places_that_guessed_are_bounded() -> None:
    ours, _ = operators(**BOTH)
    for number in range(3 * MAX_PLACES):
        with pytest.raises(KeyRefused):
            ours.admit("guess", f"place {number}", 0.0)
    assert len(ours._guesses) == MAX_PLACES


def test_a_right_key_costs_no_guess() -> None:
    ours, _ = operators(**BOTH)
    for _ in range(10 * GUESSES):
        ours.admit(VIEW_KEY, "here", 0.0)
    assert not ours._guesses


def test_one_key_for_both_roles_is_refused() -> None:
    with pytest.raises(ValueError, match="are the same") as caught:
        Config(admin_key=ADMIN_KEY, admin_view_key=ADMIN_KEY)
    assert ADMIN_KEY not in str(caught.value)
