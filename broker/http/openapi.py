"""The description of the HTTP API by OpenAPI 3.1, made from the types by which the API reads and answers.

Rule: it says what a program needs to call a method right. Words say the rest, for which JSON Schema has no
grammar, and so does docs/reference/http-api.md.
"""

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec

from broker.core.messages import ConnectionDetails
from broker.http import api_results as results
from broker.http.api import PARAMETERS, Batch
from broker.version import VERSION

PATH: Final = "/api/openapi.json"


class _Method(NamedTuple):
    summary: str
    result: type
    notes: str = ""


_METHODS: Final[Mapping[str, _Method]] = {
    "publish": _Method(
        "Publish to one topic",
        results.Published,
        "One of `data` and `b64data` is needed. `channel` is a topic, `fd:N` or `user:NAME`.",
    ),
    "broadcast": _Method(
        "Publish the same to many topics",
        results.Broadcasted,
        "One of `data` and `b64data` is needed.",
    ),
    "subscribe": _Method("Subscribe connections to a topic", results.Nothing),
    "unsubscribe": _Method("End the subscriptions of connections to a topic", results.Nothing),
    "disconnect": _Method("Close connections", results.Nothing),
    "refresh": _Method("Say when connections expire", results.Nothing),
    "presence": _Method("Who is subscribed to a topic", results.Presence),
    "presence_stats": _Method("How many are subscribed to a topic", results.PresenceStats),
    "history": _Method("What a topic keeps", results.HistoryPage),
    "history_remove": _Method("Remove what a topic keeps", results.Nothing),
    "channels": _Method("Topics with subscribers", results.ChannelList),
    "info": _Method("The nodes, and what they have counted", results.NodeList),
    "push": _Method(
        "Send to one connection", results.Pushed, "`data` is needed. Nothing of it is kept."
    ),
    "connections": _Method("The connections, page by page", results.ConnectionPage),
    "connection": _Method("All that is known of one connection", ConnectionDetails),
    "closed_connections": _Method("The connections that ended last", results.ClosedList),
    "trace": _Method(
        "Begin a trace", results.TraceBegun, "Exactly one of `fd`, `user` and `topic` is needed."
    ),
    "trace_read": _Method("What a trace has seen since", results.TraceRead),
    "trace_end": _Method("End a trace", results.Nothing),
    "stats": _Method("What is here, and what was counted since the start", results.Stats),
    "config": _Method("The settings in force", results.Settings),
}

_REF: Final = "#/components/schemas/{name}"
_OF_A_CONNECTION: Final = "`user` means all its connections; `client` and `session` are an fd in decimal. One of them is needed."
_STATUSES: Final = {
    HTTPStatus.BAD_REQUEST: "The body is not JSON.",
    HTTPStatus.UNAUTHORIZED: "The key is missing or wrong.",
    HTTPStatus.NOT_FOUND: "There is no such method, or the API is off.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body has more than 1 MiB.",
}


def openapi(prefix: str = "") -> dict[str, Any]:
    """The document, to be written as JSON. `prefix` is that of the paths, where a broker has one."""
    paths, schemas = _described()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trio-broker HTTP API",
            "version": VERSION,
            "summary": "For backends: publish, look inside, close connections.",
            "description": (
                "A command that is refused is answered with status 200 and an `error`. A parameter that "
                "is null is one that is left out."
            ),
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": prefix or "/"}],
        "security": [{"key": []}, {"authorization": []}],
        "paths": dict(paths),
        "components": {
            "schemas": dict(schemas),
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "authorization": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "As `apikey KEY`.",
                },
            },
        },
    }


@cache
def _described() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    kinds: list[Any] = [*PARAMETERS.values(), Batch, results.Replies, results.Error]
    kinds += [method.result for method in _METHODS.values()]
    found, components = msgspec.json.schema_components(
        list(dict.fromkeys(kinds)), schema_hook=_anything, ref_template=_REF
    )
    reference = dict(zip(dict.fromkeys(kinds), found, strict=True))
    _mend(components)
    paths = {
        f"/api/{name}": _path(
            name,
            method,
            reference[PARAMETERS[name]],
            _result(reference[method.result], reference[results.Error]),
        )
        for name, method in _METHODS.items()
    }
    batch = _Method(
        "Many commands in one request",
        results.Replies,
        "Each command is an object with one member: a method, with its parameters.",
    )
    replies = {"anyOf": [reference[results.Replies], _only("error", reference[results.Error])]}
    paths["/api/batch"] = _path("batch", batch, reference[Batch], replies)
    return paths, components


def _anything(kind: type) -> dict[str, Any]:
    """The schema of what msgspec has no word for."""
    if kind is object:
        return {"description": "Any JSON."}  # an empty one would be taken for none
    raise NotImplementedError


def _mend(components: dict[str, Any]) -> None:
    """Say what the types do not: JSON has no infinity, so a bound that is none is null."""
    bytes_held = components["ConnectionLimits"]["properties"]["bytes_held"]
    components["ConnectionLimits"]["properties"]["bytes_held"] = {
        "anyOf": [bytes_held, {"type": "null"}]
    }
    commands = components["Batch"]["properties"]["commands"]
    commands["items"] = {"type": "object", "minProperties": 1, "maxProperties": 1}
    for schema in components.values():
        for name, member in schema.get("properties", {}).items():
            if name.startswith("b64"):
                member["contentEncoding"] = "base64"
            if name in ("conn_info", "chan_info"):
                member.pop("default", None)


def _only(name: str, schema: object) -> dict[str, Any]:
    return {"type": "object", "properties": {name: schema}, "required": [name]}


def _result(result: object, error: object) -> dict[str, Any]:
    return {"anyOf": [_only("result", result), _only("error", error)]}


def _path(name: str, method: _Method, parameters: object, answer: object) -> dict[str, Any]:
    notes = [method.notes] if method.notes else []
    if name in ("subscribe", "unsubscribe", "disconnect", "refresh"):
        notes.append(_OF_A_CONNECTION)
    statuses = {
        str(int(status)): {
            "description": text,
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
        for status, text in _STATUSES.items()
    }
    return {
        "post": {
            "operationId": name,
            "summary": method.summary,
            **({"description": " ".join(notes)} if notes else {}),
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": parameters}},
            },
            "responses": {
                "200": {
                    "description": "It was carried out, or refused with an error.",
                    "content": {"application/json": {"schema": answer}},
                },
                **statuses,
            },
        }
    }
