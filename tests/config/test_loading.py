"""Config: every value is checked where it is given, and every error names its source."""

from pathlib import Path

import attrs
import pytest

from broker.config.loading import load
from broker.config.settings import (
    Config,
    TokenRules,
    TopicPattern,
    TopicRules,
    WebhookRules,
)
from broker.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


def test_the_later_layer_wins(file: Path) -> None:
    file.write_text('host = "file"\nport = 1\nbacklog = 10\n[topics]\nhistory_size = 7\n')
    config = load(
        file,
        {"port": 3, "topics": {"history_ttl": 9.0}},
        base=Config(max_topics=5, backlog=11, topics=TopicRules(presence=False)),
        environ={"BROKER_HOST": "environ", "BROKER_PORT": "2"},
    )
    assert config == Config(
        host="environ",
        port=3,
        backlog=10,
        max_topics=5,
        topics=TopicRules(history_size=7, history_ttl=9.0, presence=False),
    )


def test_every_kind_of_value_is_read_from_a_file(file: Path) -> None:
    file.write_text(
        'unix = "/run/b.sock"\nallowed_origins = ["https://a.b"]\nmax_connections = 4\n'
        'drain_seconds = 3\nlog_level = "debug"\n[topics]\npresence = false\n'
    )
    assert load(file, {}, environ={}) == Config(
        unix=Path("/run/b.sock"),
        allowed_origins=("https://a.b",),
        max_connections=4,
        drain_seconds=3.0,
        log_level="debug",
        topics=TopicRules(presence=False),
    )


def test_every_kind_of_value_is_read_from_the_environment() -> None:
    environ = {
        "BROKER_UNIX": "/run/b.sock",
        "BROKER_ALLOWED_ORIGINS": "https://a.b, https://c.d",
        "BROKER_MAX_CONNECTIONS": "4",
        "BROKER_DRAIN_SECONDS": "0.5",
        "BROKER_TOPICS_PRESENCE": "false",
        "BROKER_TOPICS_SLOW_CONSUMER": "latest",
        "BROKER_PORT": "",  # empty is unset
        "BROKER_URL": "amqp://somebody-elses",
    }
    assert load(None, {}, environ=environ) == Config(
        unix=Path("/run/b.sock"),
        allowed_origins=("https://a.b", "https://c.d"),
        max_connections=4,
        drain_seconds=0.5,
        topics=TopicRules(presence=False, slow_consumer="latest"),
    )


def test_the_process_environment_is_read_unless_another_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BROKER_PORT", "4711")
    assert load(None, {}).port == 4711


@pytest.mark.parametrize(
    "text, message",
    [
        ("prt = 1", "unknown key 'prt': did you mean 'port'?"),
        ("history_size = 1", "unknown key 'history_size': did you mean 'topics.history_size'?"),
        ("[topic]\na = 1", "unknown key 'topic': did you mean 'topics'?"),
        ("qqqqqq = 1", "unknown key 'qqqqqq', nor is it near one of "),
        ("nonsense = 1", "unknown key 'nonsense', nor is it near one of "),
        ("tls_certificate = 1", "unknown key 'tls_certificate': did you mean 'tls_cert'?"),
        ("hmac_secret = 1", "unknown key 'hmac_secret': did you mean 'tokens.hmac_secret'?"),
        ("[webhooks]\nnonsense = 1", "unknown key 'webhooks.nonsense': known are webhooks.url"),
        ("[topics]\nhistory = 1", "unknown key 'topics.history': did you mean 'topics.history_"),
        ('port = "80"', "port is '80': expected a whole number"),
        ("port = 80.5", "port is 80.5: expected a whole number"),
        ("port = true", "port is True: expected a whole number"),
        ("port = 70000", "port is 70000: must be from 0 to 65535"),
        ("host = 1", "host is 1: expected a string"),
        ('unix = ["a"]', "unix is ['a']: expected a string with a path"),
        ('drain_seconds = "x"', "drain_seconds is 'x': expected a number"),
        ('max_connections = "x"', "max_connections is 'x': expected a whole number"),
        ('websocket_paths = "/"', "websocket_paths is '/': expected a list of strings"),
        ("allowed_origins = [1]", "allowed_origins is [1]: expected a list of strings"),
        ('log_level = "x"', 'log_level is \'x\': expected "debug" or "info" or "warning" or'),
        ("topics = 3", "topics is 3: expected a table, as in [topics]"),
        ("[topics]\npresence = 1", "topics.presence is 1: expected true or false"),
        ("[topics]\nhistory_size = -1", "topics.history_size is -1: must be at least 0"),
        ("port =\nhost = 1", "not TOML: Invalid value (at line 1, column 7)"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_file_key_and_value(
    file: Path, text: str, message: str
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(file, {}, environ={})
    assert str(raised.value).startswith(f"{file}: {message}")
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(file: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(file, {}, environ={})
    assert str(raised.value) == f"{file}: cannot read it: No such file or directory"
    file.write_bytes(b'host = "\xff"')
    with pytest.raises(ConfigError) as raised:
        load(file, {}, environ={})
    assert str(raised.value) == f"{file}: not TOML: not UTF-8 at byte 8"


def test_a_mistake_in_the_environment_is_named_by_variable() -> None:
    # Kubernetes sets this for a service that is called "broker".
    with pytest.raises(ConfigError) as raised:
        load(None, {}, environ={"BROKER_PORT": "tcp://10.0.0.1:9501"})
    assert str(raised.value) == (
        "BROKER_PORT: port is 'tcp://10.0.0.1:9501': expected a whole number. Kubernetes sets it for a"
        " service called broker: give that another name, or set enableServiceLinks: false"
    )


def test_a_mistake_over_several_layers_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="tls_key is not set"):
        load(None, {"tls_cert": Path("a.pem")}, environ={})


def test_token_rules_are_read_from_file_and_environment(file: Path) -> None:
    file.write_text('[tokens]\npublic_keys = ["a.pem"]\nallow_anonymous = true\naudience = "us"\n')
    environ = {
        "BROKER_TOKENS_HMAC_SECRET": "secret",
        "BROKER_TOKENS_ALLOW_ANONYMOUS": "false",
        "BROKER_TOKENS_LEEWAY_SECONDS": "0",
    }
    assert load(file, {}, environ=environ).tokens == TokenRules(
        hmac_secret="secret",
        public_keys=("a.pem",),
        audience="us",
        allow_anonymous=False,
        leeway_seconds=0.0,
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("hmac_secret = 1", "tokens.hmac_secret is int: expected a string"),
        ("secret = 1", "unknown key 'tokens.secret': did you mean 'tokens.hmac_secret'?"),
        ("allow_anonymous = 1", "tokens.allow_anonymous is 1: expected true or false"),
        ("leeway_seconds = 301", "tokens.leeway_seconds is 301.0: must be from 0 to 300"),
        ('jwks_url = "a.b"', "tokens.jwks_url is 'a.b': must be like \"https://"),
        ('jwks_url = "https://[a"', "tokens.jwks_url is 'https://[a': must be like"),
        ('jwks_url = "https://a:b/"', "tokens.jwks_url is 'https://a:b/': must be like"),
        ("jwks_retry_seconds = 0", "tokens.jwks_retry_seconds is 0.0: must be more than 0"),
    ],
)
def test_a_mistake_in_token_rules_is_named(file: Path, text: str, message: str) -> None:
    file.write_text(f"[tokens]\n{text}")
    with pytest.raises(ConfigError) as raised:
        load(file, {}, environ={})
    assert str(raised.value).startswith(f"{file}: {message}")


def test_rules_by_namespace_and_pattern_inherit_what_they_do_not_say(file: Path) -> None:
    file.write_text(
        """
        [topics]
        history_size = 7
        may_publish = "users"

        [topics.namespaces.chat]
        presence = false

        [topics.namespaces.rest]

        [[topics.patterns]]
        match = "news.>"
        history_ttl = 9
        may_publish = "none"

        [[topics.patterns]]
        match = "chat:lobby"
        """
    )
    # A default from a later layer is inherited as well.
    config = load(file, {"topics": {"history_size": 8}}, environ={"BROKER_TOPICS_PRESENCE": "1"})
    default = TopicRules(history_size=8, may_publish="users")
    assert config == Config(
        topics=default,
        namespaces={"chat": attrs.evolve(default, presence=False), "rest": default},
        patterns=(
            TopicPattern("news.>", attrs.evolve(default, history_ttl=9.0, may_publish="none")),
            TopicPattern("chat:lobby", default),
        ),
    )


def test_rules_of_the_program_stay_where_the_file_has_none(file: Path) -> None:
    base = Config(
        namespaces={"a": TopicRules(history_size=1), "b": TopicRules(history_size=2)},
        patterns=(TopicPattern("a.*", TopicRules(history_size=3)),),
    )
    file.write_text("[topics]\nhistory_size = 9\n")
    assert load(file, {}, base=base, environ={}) == attrs.evolve(
        base, topics=TopicRules(history_size=9)
    )
    file.write_text('[topics.namespaces.a]\npresence = false\n[[topics.patterns]]\nmatch = "x"\n')
    assert load(file, {}, base=base, environ={}) == Config(
        namespaces={"a": TopicRules(history_size=1, presence=False), "b": base.namespaces["b"]},
        patterns=(TopicPattern("x", TopicRules()),),
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("[topics]\nnamespaces = 3", "topics.namespaces is 3: expected tables, as in [topics.n"),
        ("[topics.namespaces]\na = 3", "topics.namespaces is {'a': 3}: expected tables, as in"),
        ("[topics.namespaces.fd]", "topics.namespaces holds 'fd': fd:… is what connections are"),
        ("[topics.namespaces.user]", "topics.namespaces holds 'user': user:… is what"),
        ('[topics.namespaces.""]', "topics.namespaces holds '': the name is empty"),
        ('[topics.namespaces."a:b"]', "topics.namespaces holds 'a:b': it is the part of a topic"),
        ('[topics.namespaces."$a"]', "topics.namespaces holds '$a': it is the part of a topic"),
        (
            "[topics.namespaces.chat]\nhistory_size = -1",
            "topics.namespaces.chat.history_size is -1: must be at least 0",
        ),
        (
            "[topics.namespaces.chat]\nhistory = 1",
            "unknown key 'topics.namespaces.chat.history': did you mean 'topics.namespaces.chat.h",
        ),
        (
            '[topics.namespaces.chat]\nmay_publish = "me"',
            'topics.namespaces.chat.may_publish is \'me\': expected "all" or "subscribers" or',
        ),
        (
            '[topics]\nmay_subscribe = "subscribers"',
            'topics.may_subscribe is \'subscribers\': expected "all" or "users" or "none"',
        ),
        ("[topics]\npatterns = 3", "topics.patterns is 3: expected tables, as in [[topics.pat"),
        (
            "[[topics.patterns]]\npresence = true",
            'topics.patterns[0].match is None: expected a string, as in "news.>"',
        ),
        (
            '[[topics.patterns]]\nmatch = "a.>.b"',
            "topics.patterns[0].match is 'a.>.b': '>' is the last token of a pattern or not in it",
        ),
        (
            '[[topics.patterns]]\nmatch = "admin*"\nmay_subscribe = "none"',
            "topics.patterns[0].match: 'admin*' is the name of one topic, no pattern: did you mean 'adm",
        ),
        (
            '[[topics.patterns]]\nmatch = "a"\n[[topics.patterns]]\nmatch = "b"\npresence = 1',
            "topics.patterns[1].presence is 1: expected true or false",
        ),
        ("[namespaces.chat]", "unknown key 'namespaces': did you mean 'topics.namespaces'?"),
    ],
)
def test_a_mistake_in_the_rules_is_named_by_its_place(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(file, {}, environ={})
    assert str(raised.value).startswith(f"{file}: {message}")
    assert "\n" not in str(raised.value)


def test_a_pattern_that_would_never_apply_is_refused(file: Path) -> None:
    file.write_text('[[topics.patterns]]\nmatch = "a"\n[[topics.patterns]]\nmatch = "a"\n')
    with pytest.raises(ConfigError, match="patterns holds 'a' twice: the second would never apply"):
        load(file, {}, environ={})


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text("[tokens]\nhmac_secret = 123456\n")
    with pytest.raises(ConfigError, match=r"tokens\.hmac_secret is int: expected") as caught:
        load(path, {})
    assert "123456" not in str(caught.value)


def test_webhooks_are_read_from_file_and_environment(file: Path) -> None:
    file.write_text('[webhooks]\nurl = "http://a/b"\nbatch_events = 5\n')
    environ = {"BROKER_WEBHOOKS_SECRET": "A" * 32, "BROKER_WEBHOOKS_EVENTS": "opened, bound"}
    rules = load(file, {}, environ=environ).webhooks
    assert rules == WebhookRules(
        url="http://a/b", batch_events=5, secret="A" * 32, events=("opened", "bound")
    )
    with pytest.raises(ConfigError) as raised:
        load(None, {}, environ={"BROKER_WEBHOOKS_SECRET": "hunter2"})
    assert str(raised.value).startswith("BROKER_WEBHOOKS_SECRET: webhooks.secret must be base64")
    with pytest.raises(ConfigError) as raised:
        load(None, {}, environ={"BROKER_WEBHOOKS_URL": "a/b"})
    assert "webhooks.url is 'a/b': must be like" in str(raised.value)


@pytest.mark.parametrize(
    ("file", "environ", "options", "unix"),
    [
        ("unix = '/a'", {}, {}, "/a"),
        ("unix = '/a'", {}, {"port": 1}, None),
        ("unix = '/a'", {}, {"host": "::1"}, None),
        ("unix = '/a'", {"BROKER_PORT": "1"}, {}, None),
        ("unix = '/a'\nport = 1", {}, {}, "/a"),
        ("port = 1", {"BROKER_UNIX": "/b"}, {}, "/b"),
        ("port = 1", {"BROKER_UNIX": "/b"}, {"port": 2}, None),
        ("unix = '/a'", {}, {"port": 1, "unix": "/c"}, "/c"),
    ],
)
def test_of_a_unix_socket_and_a_port_the_later_layer_decides(
    tmp_path: Path, file: str, environ: dict[str, str], options: dict[str, object], unix: str | None
) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(file)
    config = load(path, options, environ=environ)
    assert config.unix == (None if unix is None else Path(unix))


# values that do not go together


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("tls_cert = 'a.pem'", {}, "FILE: tls_cert is 'a.pem' but tls_key is not set: TLS needs"),
        ("", {"BROKER_TLS_KEY": "a.pem"}, "BROKER_TLS_KEY: tls_key is 'a.pem' but tls_cert is not"),
        (
            "[tokens]\nhmac_secret = 'a'\nhmac_secret_file = 'b'",
            {},
            "FILE: tokens.hmac_secret and hmac_secret_file are both set",
        ),
        (
            "[tokens]\nhmac_secret_file = 'b'",
            {"BROKER_TOKENS_HMAC_SECRET": "a"},
            "FILE and BROKER_TOKENS_HMAC_SECRET: tokens.hmac_secret and hmac_secret_file are both",
        ),
        (
            "[tokens]\nallow_anonymous = false",
            {},
            "FILE: tokens.allow_anonymous is false, but there is no key to verify a token with",
        ),
        (
            "connection_bytes = 1048576",
            {"BROKER_OUTBOX_BYTES": "2000000"},
            "FILE and BROKER_OUTBOX_BYTES: connection_bytes is 1048576: must be at least",
        ),
        (
            "[[topics.patterns]]\nmatch = 'a'\n[[topics.patterns]]\nmatch = 'a'",
            {},
            "FILE: topics.patterns holds 'a' twice",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named_by_their_places(
    file: Path, text: str, environ: dict[str, str], message: str
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(file, {}, environ=environ)
    assert str(raised.value).startswith(message.replace("FILE", str(file)))


def test_the_errors_that_the_how_to_shows_are_those_that_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "configure.md").read_text("utf-8")
    shown = [line for line in page.splitlines() if line.startswith("Error: ")]
    monkeypatch.chdir(tmp_path)
    raised = []
    given: list[tuple[str, dict[str, str], dict[str, object]]] = [
        ("prot = 1", {}, {}),
        ("port = '9501'", {}, {}),
        ("", {"BROKER_PORT": "tcp://10.0.0.1:9501"}, {}),
        ("[tokens]\nhmac_secret_file = 'a'", {"BROKER_TOKENS_HMAC_SECRET": "b"}, {}),
        ("", {}, {"allowed_origins": ["https://example.com/"]}),
        ("", {}, {"allowed_origins": ["https://bücher.example"]}),
    ]
    for text, environ, options in given:
        Path("broker.toml").write_text(text)
        with pytest.raises(ConfigError) as error:
            load(Path("broker.toml"), options, environ=environ)
        raised.append(f"Error: {error.value}")
    assert raised == shown
