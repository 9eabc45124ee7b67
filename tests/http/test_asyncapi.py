"""The description of the topics: AsyncAPI, against its specification."""

import json
from math import inf
from pathlib import Path

import jsonschema
import pytest

from broker import Config, TokenRules, TopicPattern, TopicRules
from broker.http.asyncapi import asyncapi
from tests.http.conftest import written

SCHEMA = json.loads((Path(__file__).parent / "vendor" / "asyncapi-3.0.0.json").read_text("utf-8"))

CONFIGS = [
    Config(),
    Config(host="::1", port=1, path_prefix="/x", websocket_paths=("/rooms/*", "/新/a b", "/")),
    Config(
        topics=TopicRules(may_publish="none"),
        namespaces={
            "chat": TopicRules(may_subscribe="users"),
            "新闻 x": TopicRules(history_ttl=inf),
            "a b": TopicRules(may_publish="subscribers"),
            "a_b": TopicRules(),
        },
        patterns=(
            TopicPattern("news.*.{x}.>", TopicRules(may_subscribe="none")),
            TopicPattern("one", TopicRules()),
        ),
        tokens=TokenRules(hmac_secret="s" * 32),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_description_of_topics_is_asyncapi(config: Config) -> None:
    document = written(asyncapi(config))
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert [error.message for error in validator.iter_errors(document)] == []
    assert "ssss" not in json.dumps(document)


def test_rights_and_rules_of_topics_are_described() -> None:
    document = written(asyncapi(CONFIGS[2]))
    channels = document["channels"]
    assert [channel["address"] for channel in channels.values()] == [
        *("news.{part1}.%7Bx%7D.{part2}", "one", "chat:{name}", "新闻 x:{name}"),
        *("a b:{name}", "a_b:{name}", "{topic}"),
    ]
    operations = document["operations"]
    assert "publish_topics" not in operations
    assert operations["subscribe_topics"]["action"] == "send"
    assert "subscribe_pattern1" not in operations
    assert "clients with a user may" in operations["subscribe_namespace1_chat"]["summary"]
    assert channels["topics"]["x-rules"]["may_publish"] == "none"
    assert document["servers"]["root"]["security"]


def test_the_schema_tells_right_from_wrong() -> None:
    document = written(asyncapi(Config()))
    document["operations"]["publish_topics"]["action"] = "publish"
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert list(validator.iter_errors(document))
