"""Runs that wait in an outbox over its bounds, sorted for dropping.

The mail of an outbox is a list that only grows at its end; a dropped run leaves `GONE` in its
place. So a place is a number that stays, and each question has a mark that only moves on: nothing
before it has to be looked at again. Dropping costs a constant time per run, taken over all.

Rule: a run of which a byte is out or on its way (all before `begun`) is left as it is.
"""

import attrs

from broker.transport.runs import GONE, Rest, Run


@attrs.define(eq=False)
class Dropped:
    """How much was dropped: bytes, messages, places that are empty now, messages by topic."""

    size: int = 0
    messages: int = 0
    places: int = 0
    topics: dict[str, int] = attrs.field(factory=dict)

    def add(self, run: Run, messages: int, size: int) -> None:
        self.size += size
        self.messages += messages
        self.topics[run.topic] = self.topics.get(run.topic, 0) + messages


class Backlog:
    """The mail of one outbox, for as long as no place of it moves."""

    __slots__ = ("_mail", "_newest", "_places", "_sorted", "_swept", "_thinned")

    def __init__(self, mail: list[Run]) -> None:
        self._mail = mail
        self._swept = 0  # nothing before this is there to be dropped as the oldest
        self._thinned = 0  # before this, each topic whose rule is `latest` is there once
        self._newest: dict[str, int] = {}  # and that is where
        self._sorted = 0  # publications before this are in `_places`
        self._places: dict[str, list[int]] = {}

    def drop_oldest(self, begun: int, messages: int, size: int) -> Dropped:
        """Drop publications from the front until `messages` and `size` bytes are gone, or all are.

        No more than that needs, so a run may lose only its first frames.
        """
        mail = self._mail
        dropped = Dropped()
        place = max(self._swept, begun)
        while place < len(mail) and (dropped.messages < messages or dropped.size < size):
            run = mail[place]
            if not run.topic:
                place += 1
            elif self._is_all_needed(run, messages - dropped.messages, size - dropped.size):
                self._drop(place, dropped)
                place += 1
            else:
                self._shorten(place, messages, size, dropped)
        self._swept = place
        return dropped

    def _is_all_needed(self, run: Run, messages: int, size: int) -> bool:
        """Whether even without its last frame a run would not be enough."""
        return messages >= run.messages or size > run.size - run.last_size

    def _shorten(self, place: int, messages: int, size: int, dropped: Dropped) -> None:
        """Drop the front of a run, as far as needed."""
        run = self._mail[place]
        count = gone = 0
        while dropped.messages + count < messages or dropped.size + gone < size:
            gone += len(run.frames[run.first + count])
            count += 1
        dropped.add(run, count, gone)
        rest = run if isinstance(run, Rest) else Rest(run)
        rest.drop_front(count, gone)
        self._mail[place] = rest

    def thin(self, begun: int) -> Dropped:
        """Drop all but the newest publication of each topic whose rule is `latest`."""
        mail = self._mail
        dropped = Dropped()
        for place in range(max(self._thinned, begun), len(mail)):
            run = mail[place]
            if run.rule != "latest" or not run.topic:
                continue
            older = self._newest.get(run.topic, -1)
            if older >= begun and mail[older] is not GONE:
                self._drop(older, dropped)
            if run.messages > 1:
                count = len(run.frames)
                last = run.only(count - 1, count)
                dropped.add(run, run.messages - 1, run.size - last.size)
                mail[place] = last
            self._newest[run.topic] = place
        self._thinned = len(mail)
        return dropped

    def drop_topic(self, topic: str, begun: int) -> Dropped:
        """Drop all publications of one topic."""
        mail = self._mail
        for place in range(max(self._sorted, begun), len(mail)):
            name = mail[place].topic
            if name:
                self._places.setdefault(name, []).append(place)
        self._sorted = len(mail)
        dropped = Dropped()
        for place in self._places.pop(topic, ()):
            if place >= begun and mail[place].topic:
                self._drop(place, dropped)
        return dropped

    def _drop(self, place: int, dropped: Dropped) -> None:
        run = self._mail[place]
        dropped.add(run, run.messages, run.size)
        dropped.places += 1
        self._mail[place] = GONE
