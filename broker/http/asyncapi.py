"""The description of what clients may say and hear, by AsyncAPI 3.0, made from the settings in force.

The application that is described is the broker. So it *receives* the publications of clients to a topic, and
*sends* them to subscribers. A channel is a set of topics that have the same rules.

Rule: it tells no secret, and no topic that is not named in the settings. It knows no hook's decisions.
"""

import re
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any, Final, NamedTuple

import attrs

from broker.config.settings import Config, TopicRules
from broker.version import VERSION

PATH: Final = "/api/asyncapi.json"

_PROTOCOL: Final = "https://github.com/centrifugal/protocol"


class _Topics(NamedTuple):
    """Topics with the same rules: the key of their channel, and their names with `{parameters}`."""

    key: str
    address: str
    parameters: Mapping[str, str]
    title: str
    rules: TopicRules


def asyncapi(config: Config) -> dict[str, Any]:
    """The document, to be written as JSON."""
    sets = list(_sets(config))
    operations: dict[str, Any] = {}
    for topics in sets:
        operations |= _operations(topics)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "trio-broker",
            "version": VERSION,
            "description": (
                "Topics over WebSocket, in the client protocol of Centrifugo: JSON here, the same in "
                "protobuf. Every topic is on the one connection of a client."
            ),
            "externalDocs": {"url": _PROTOCOL},
        },
        "defaultContentType": "application/json",
        "servers": _servers(config),
        "channels": {topics.key: _channel(topics) for topics in sets},
        "operations": operations,
        "components": {"messages": _MESSAGES, **_security(config)},
    }


def _servers(config: Config) -> dict[str, Any]:
    host = f"[{config.host}]" if ":" in config.host else config.host
    protocol = "wss" if config.tls_cert else "ws"
    security = {"security": [{"$ref": "#/components/securitySchemes/token"}]}
    paths = [path for path in config.websocket_paths if not path.endswith("*")]
    return {
        _key(path) or "root": {
            "host": f"{host}:{config.port}",
            "pathname": f"{config.path_prefix}{path}",
            "protocol": protocol,
            **(security if config.tokens.configured else {}),
        }
        for path in paths
    }


def _security(config: Config) -> dict[str, Any]:
    if not config.tokens.configured:
        return {}
    token = {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "In `token` of the connect command, not in a header.",
    }
    return {"securitySchemes": {"token": token}}


def _sets(config: Config) -> Iterator[_Topics]:
    """All sets of topics, those of patterns first: they come before namespaces."""
    for number, pattern in enumerate(config.patterns):
        names: dict[str, str] = {}
        tokens = []
        for token in pattern.match.split("."):
            if token in ("*", ">"):
                name = f"part{len(names) + 1}"
                names[name] = "one part" if token == "*" else "one part or more, with dots between"
                tokens.append(f"{{{name}}}")
            else:
                tokens.append(_escaped(token))
        title = f"Topics like {pattern.match}"
        yield _Topics(f"pattern{number + 1}", ".".join(tokens), names, title, pattern.rules)
    for number, (name, rules) in enumerate(config.namespaces.items(), 1):
        title = f"Topics of the namespace {name}"
        address = f"{_escaped(name)}:{{name}}"
        yield _Topics(
            f"namespace{number}_{_key(name)}", address, {"name": "any text"}, title, rules
        )
    title = "Topics without a namespace" if config.namespaces else "All other topics"
    yield _Topics("topics", "{topic}", {"topic": "any text"}, title, config.topics)


def _channel(topics: _Topics) -> dict[str, Any]:
    return {
        "address": topics.address,
        "title": topics.title,
        "parameters": {name: {"description": text} for name, text in topics.parameters.items()},
        "messages": {
            name: {"$ref": f"#/components/messages/{name}"} for name in ("publish", "publication")
        },
        "x-rules": {
            name: "inf" if value == inf else value
            for name, value in attrs.asdict(topics.rules).items()
        },
    }


def _operations(topics: _Topics) -> dict[str, Any]:
    rules = topics.rules
    channel = f"#/channels/{topics.key}"
    return {
        f"{name}_{topics.key}": {
            "action": action,
            "channel": {"$ref": channel},
            "summary": f"{summary}: {_WHO[may]}",
            "messages": [{"$ref": f"{channel}/messages/{message}"}],
        }
        for name, action, summary, message, may in (
            ("publish", "receive", "A client publishes", "publish", rules.may_publish),
            ("subscribe", "send", "A subscriber is told", "publication", rules.may_subscribe),
        )
        if may != "none"
    }


_WHO: Final[Mapping[str, str]] = {
    "all": "every client may",
    "users": "clients with a user may",
    "subscribers": "those who are subscribed may",
}

_INFO: Final = {
    "type": "object",
    "description": "Who has published; absent where that was the backend.",
    "properties": {
        "user": {"type": "string"},
        "client": {"type": "string", "description": "Its fd in decimal."},
        "conn_info": {},
        "chan_info": {},
    },
}

_MESSAGES: Final[Mapping[str, Any]] = {
    "publish": {
        "summary": "The command that publishes",
        "payload": {
            "type": "object",
            "required": ["publish"],
            "properties": {
                "id": {"type": "integer", "description": "Without one there is no reply."},
                "publish": {
                    "type": "object",
                    "required": ["channel", "data"],
                    "properties": {"channel": {"type": "string"}, "data": {}},
                },
            },
        },
    },
    "publication": {
        "summary": "The push that brings a publication",
        "payload": {
            "type": "object",
            "required": ["push"],
            "properties": {
                "push": {
                    "type": "object",
                    "required": ["channel", "pub"],
                    "properties": {
                        "channel": {
                            "type": "string",
                            "description": "As subscribed to: a topic, or a pattern.",
                        },
                        "pub": {
                            "type": "object",
                            "required": ["data"],
                            "properties": {
                                "data": {},
                                "info": _INFO,
                                "offset": {"type": "integer"},
                                "channel": {
                                    "type": "string",
                                    "description": "The topic, where that is another name.",
                                },
                                "tags": {
                                    "type": "object",
                                    "additionalProperties": {"type": "string"},
                                },
                                "time": {"type": "integer", "description": "Unix milliseconds."},
                            },
                        },
                    },
                }
            },
        },
    },
}


def _key(name: str) -> str:
    """A name as the key of an object may be: letters, digits, `_` and `-` (Components Object)."""
    key = "".join(each if each.isascii() else f"u{ord(each):x}" for each in name)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_")


def _escaped(text: str) -> str:
    """Text in an address; there braces begin a parameter."""
    return text.replace("{", "%7B").replace("}", "%7D")
