"""The signature of our requests to backends, as Standard Webhooks has it (standardwebhooks.com).

So a backend checks it with a library of its language, or in a few lines: HMAC-SHA256 over id, time
and body, joined by dots.
"""

import base64
import binascii
import hmac

PREFIX = "whsec_"

MIN_BYTES = 24
"""The least that Standard Webhooks allows."""


def signature(secret: str, request_id: str, now: float, body: bytes) -> dict[str, str]:
    """The headers that say who sent `body`, and when (`now`, in Unix seconds).

    Without the signature itself if `secret` is "".
    """
    stamp = str(int(now))
    headers = {"webhook-id": request_id, "webhook-timestamp": stamp}
    if secret:
        signed = f"{request_id}.{stamp}.".encode() + body
        digest = hmac.digest(key_of(secret), signed, "sha256")
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers


def key_of(secret: str) -> bytes:
    """The bytes that a secret stands for. Raises `ValueError`, which does not show it, for what is
    not base64 of `MIN_BYTES` or more."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < MIN_BYTES:
        raise ValueError(
            f"must be base64 of {MIN_BYTES} random bytes or more, as by: "
            f"echo {PREFIX}$(openssl rand -base64 32)"
        )
    return key
