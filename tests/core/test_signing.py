"""Signatures as Standard Webhooks has them: its own example, and its own library as the judge."""

import base64
from datetime import UTC, datetime

import pytest
from standardwebhooks.webhooks import Webhook

from broker.core.signing import MIN_BYTES, PREFIX, key_of, signature
from tests.conftest import WEBHOOK_SECRET


def test_the_example_of_the_specification_is_signed_as_it_says() -> None:
    headers = signature(
        WEBHOOK_SECRET,
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330.9,  # whole seconds count
        b'{"test": 2432232314}',
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize("body", [b"{}", '{"a":"客户端"}'.encode()])
def test_the_library_of_the_specification_verifies_it(body: bytes) -> None:
    now = datetime.now(UTC).timestamp()  # which the library compares with its own clock
    headers = signature(WEBHOOK_SECRET, "1.2", now, body)
    Webhook(WEBHOOK_SECRET).verify(body.decode(), headers)


def test_without_a_secret_nothing_is_signed() -> None:
    assert signature("", "1", 5.5, b"{}") == {"webhook-id": "1", "webhook-timestamp": "5"}


def encoded(size: int) -> str:
    return base64.b64encode(bytes(range(size))).decode()


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_secret_may_have_its_prefix(prefix: str) -> None:
    assert key_of(prefix + encoded(MIN_BYTES)) == bytes(range(MIN_BYTES))


@pytest.mark.parametrize(
    "secret", ["", PREFIX, encoded(MIN_BYTES - 1), "s3cret", encoded(MIN_BYTES) + "!", "é" * 40]
)
def test_a_secret_that_is_none_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ValueError, match=r"must be base64 of 24 random bytes or more") as refused:
        key_of(secret)
    assert not secret or secret == PREFIX or secret not in str(refused.value)
