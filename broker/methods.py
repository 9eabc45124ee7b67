"""What the broker itself does for those who ask for more than a plain publish.

One place for three doors: rpc methods of clients, methods of `Broker`, and the HTTP API.
"""

from collections.abc import Collection

import attrs
import trio

from .core.messages import ClientInfo, Delivery, Fd
from .core.once import MAX_KEY_BYTES, Once
from .delivery import publish_apart
from .errors import ErrorCode, Refused
from .router import Router


@attrs.define(eq=False)
class Methods:
    """See the module."""

    router: Router
    _done: Once[Delivery] = attrs.field(init=False, factory=Once)

    def publish(
        self,
        topic: str,
        data: bytes,
        info: ClientInfo | None = None,
        *,
        tags: dict[str, str] | None = None,
        exclude: Collection[Fd] = (),
        skip_history: bool = False,
        key: str = "",
    ) -> Delivery:
        """Publish raw JSON, as `publish_apart` says.

        A second publish with the same `key`, by the same user to the same topic within five
        minutes, publishes nothing and gets the report of the first.
        """
        now = trio.current_time()
        if key:
            if len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
                limit = f"key: more than {MAX_KEY_BYTES} bytes"
                raise Refused(ErrorCode.BAD_REQUEST, limit)
            done = self._done.get((info and info.user, topic, key), now)
            if done is not None:
                return done
        delivery = publish_apart(
            self.router, topic, data, info, tags=tags, exclude=exclude, skip_history=skip_history
        )
        if key:
            self._done.keep((info and info.user, topic, key), delivery, now)
        return delivery
