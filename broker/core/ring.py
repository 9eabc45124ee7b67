"""The publications of one topic that are kept, oldest first, in three columns: data, time, and the rest.

Most publications in a row are of one publisher and one batch. These share one object for the rest, so each
takes little more than its data. A publication is made anew when it is read.

Rule: a publication gives back exactly the bytes that it was charged with.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from broker.core.messages import ClientInfo, Publication
from broker.core.shares import tags_bytes

KEPT_BYTES: Final = 120
"""Bytes of one kept publication besides its data and tags: 33 to hold the data, 24 for when that was, and
three places of 8 bytes, of which there may be twice as many and an eighth as those in use."""

SHAPE_BYTES: Final = 128
"""Bytes of the fields that publications in a row have in common, where something else is before them: one
object for the first, one for all behind it. An empty ring is charged for those at its front."""


class Shape(msgspec.Struct, frozen=True, gc=False):
    """The fields that publications in a row share, besides the topic; `extra` is charged for each."""

    info: ClientInfo | None
    tags: Mapping[str, str] | None
    opaque: bool
    time: int
    extra: int


_GONE: Final = Shape(None, None, False, 0, 0)


class Ring:
    """See the module. A place counts from the oldest one that is left."""

    __slots__ = ("_contents", "_first", "_shapes", "_whens", "count")

    def __init__(self) -> None:
        self._contents: list[bytes] = []
        self._whens: list[float] = []
        self._shapes: list[Shape] = []
        self._first = 0  # before it all places are empty
        self.count: int = 0
        """How many there are."""

    def append(self, publication: Publication, when: float) -> int:
        """Keep a publication; return the bytes that it takes."""
        p = publication
        shape = self._begin(p.info, p.tags, p.opaque, p.time)
        self._contents.append(p.data)
        self._whens.append(when)
        self._shapes.append(shape)
        self.count += 1
        return len(p.data) + KEPT_BYTES + shape.extra

    def extend(
        self, contents: Sequence[bytes], info: ClientInfo | None, opaque: bool, when: float
    ) -> int:
        """Keep what one publisher has said in a row; return the bytes that it takes. 20 ns for each."""
        count = len(contents)
        self.count += count
        if count == 1:  # half of the time that the lists below take for one
            data = contents[0]
            shapes = self._shapes
            shape = shapes[-1] if shapes else _GONE
            if (  # as `_begin` has it, where nothing changes
                shape.extra
                or shape.info is not info
                or shape is _GONE
                or shape.opaque is not opaque
                or shape.time
                or shape.tags is not None
            ):
                shape = self._begin(info, None, opaque, 0)
            self._contents.append(data)
            self._whens.append(when)
            shapes.append(shape)
            return len(data) + KEPT_BYTES + shape.extra
        shape = self._begin(info, None, opaque, 0)
        more = sum(map(len, contents)) + count * KEPT_BYTES + shape.extra
        self._contents += contents
        self._whens += [when] * count
        self._shapes.append(shape)
        following = Shape(info, None, opaque, 0, 0) if shape.extra else shape
        self._shapes += [following] * (count - 1)
        return more + (count - 1) * following.extra

    def _begin(
        self, info: ClientInfo | None, tags: Mapping[str, str] | None, opaque: bool, time: int
    ) -> Shape:
        """The shape of the next publication: that of the last one, if it is the same."""
        extra = tags_bytes(tags) if tags else 0
        if not self._shapes:
            return Shape(info, tags, opaque, time, extra)
        last = self._shapes[-1]
        is_same = last.info is info and last.tags is tags
        if not is_same or last.opaque is not opaque or last.time != time:
            return Shape(info, tags, opaque, time, SHAPE_BYTES + extra)
        return last if last.extra == extra else Shape(info, tags, opaque, time, extra)

    def drop(self, count: int) -> int:
        """Drop so many of the oldest; return the bytes that they took."""
        begin, end = self._first, self._first + count
        self.count -= count
        contents, shapes = self._contents, self._shapes
        if count == 1 and 2 * end < len(contents):  # as nearly always: a third of the work
            less = len(contents[begin]) + KEPT_BYTES + shapes[begin].extra
            contents[begin], shapes[begin] = b"", _GONE
            self._first = end
            return less
        less = sum(map(len, contents[begin:end])) + count * KEPT_BYTES
        less += sum([shape.extra for shape in shapes[begin:end]])
        if 2 * end >= len(contents):
            del contents[:end], shapes[:end], self._whens[:end]
            self._first = 0
        else:
            contents[begin:end] = [b""] * count
            shapes[begin:end] = [_GONE] * count
            self._first = end
        return less

    def weight(self, place: int) -> int:
        """The bytes that a publication takes."""
        place += self._first
        return len(self._contents[place]) + KEPT_BYTES + self._shapes[place].extra

    def info(self, place: int) -> ClientInfo | None:
        """The client that published it."""
        return self._shapes[self._first + place].info

    def when(self, place: int) -> float:
        """When that was."""
        return self._whens[self._first + place]

    def publication(self, place: int, topic: str, offset: int) -> Publication:
        """A publication of this topic, which has this offset there."""
        place += self._first
        shape = self._shapes[place]
        return Publication(
            topic, self._contents[place], shape.info, offset, shape.time, shape.tags, shape.opaque
        )
