"""The price of everything that a party may cause, and the share of the loop that it may use. A party is
a session, or one connection of a backend.

Work is measured in microseconds of the machine that `docs/benchmarks.md` names. It is enough
that the prices are in proportion. It is charged by what is *done* (listeners visited, filters asked,
members listed, publications encoded, bytes), to the party that causes it.

Rules:

1. One meter for one broker: all work is added to it in the step in which it is done, so the
   difference between two readings is the cost of the step between them.
2. A party may do a little at once (`BURST`), and more at a rate that leaves room for all others
   (`SHARE`). Beyond that it takes its place in one queue, and gets `SLICE` each time that it is its
   turn: between two slices of that queue, everybody else runs.
3. Time is an argument.
"""

from typing import Final

import attrs

BURST: Final = 250.0
"""Work that a session may do at once without a place in the queue. Fifty sessions that do so in one
turn of the loop hold it for 12 ms; one read of a usual client costs 5 to 50."""

LITTLE: Final = 25.0
"""The same where others have filled a round by their bursts, in one turn of the loop: two or three commands, or
a publication to a few. A thousand that do so hold the loop for 25 ms."""

SHARE: Final = 0.05
"""Part of the time that a session may work without a place in the queue: one that needs more is one
of twenty at most."""

SLICE: Final = 1000.0
"""Work between two turns of the queue: a millisecond, of which the change of tasks takes 2 %."""

ROUND: Final = 5 * SLICE
"""Acts between two turns of the queue where those who wait in it say what they are about to do: five
publications to 1,500 listeners each. One write then takes to a listener what five have published; one
by one they would cost twice as much."""

SWEEP: Final = 20 * SLICE
"""Work behind which Python's collector looks at the objects that are new: 20,000 or so, in 4 ms. Left to itself it
counts those that come less those that go, whether these are new or old: while topics come and others go, the new
ones were 198,000 when it looked at last, in one step of 81 ms."""

DEBT: Final = 2.0 * SHARE * 1_000_000
"""The most that a session can owe: two seconds of its share."""

COMMAND: Final = 6.0
"""One command: decoding, checks, a reply. Measured 4 to 8."""

REFUSED: Final = 5.0
"""A command that is refused, besides: what is raised for it goes through all that has called. Measured 4 to 8."""

CALLED: Final = 5.0
"""A method of ours that is called, besides what it does: its parameters are read. Measured 5 to 8."""

CALL: Final = 40.0
"""A request of a backend that is no plain publish: read and answered by itself. Measured 35 to 60."""

REPORT: Final = 60.0
"""What is known of a node in one line of figures. Measured 50."""

FIGURES: Final = 250.0
"""All figures of a node. Measured 250."""

SETTING: Final = 4.0
"""A setting that is shown, with where it comes from. Measured 3 to 4."""

FRAME: Final = 0.3
"""A frame that comes, besides the command in it."""

PUBLICATION: Final = 0.7
"""One publication of a run: made, kept, encoded; and as much for each audience beside the first, because each
has it encoded under a name of its own. One alone costs `COMMAND` less a reply."""

ALONE: Final = 1.5
"""A publish that is decided and carried out by itself, where those around it are to other topics, or
it is the first."""

BATCHED: Final = 1.0
"""A publish in a batch of a backend, in a row of those to one topic: it is read, and answered. The row is a
`COMMAND` besides."""

FIELD: Final = 0.6
"""A field line of a request head that is read. Measured 0.4 to 0.6; a head may have 2,000."""

USUAL_FIELDS: Final = 64
"""Field lines that are read without a turn: browsers send about 15, and some proxies as many again."""

OPENING: Final = 150.0
"""A request head that is read and answered, for most a connection that is made. Measured 120 to 200."""

FIRST_MESSAGE: Final = 80.0
"""The first message of a connection, which says what it is. Measured 70 to 90."""

TLS_HANDSHAKE: Final = 1000.0
"""The answer to a peer that begins to speak TLS: a signature, and a key of the connection's own."""

TLS_RECORD: Final = 50.0
"""A record of a handshake besides. What a peer says last comes in two of them with TLS 1.3, in three with 1.2, and
takes 65 to 120 in all."""

TLS_OPENED: Final = 18.0
"""A record that comes later. Measured 9 to 18 where it asks for other keys; to read one of data takes as long."""

REQUEST: Final = 2000.0
"""A request for a page, from its head to its answer. Measured 1,900 to 4,400."""

REQUEST_FIELD: Final = 7.0
"""A field line of it, besides: two other parsers read it, and the app is handed it. Measured 6.5."""

DECODED_KILOBYTE: Final = 16.0
"""A kibibyte of commands that is decoded: 2 to 25 µs, besides those that have to be read part by part."""

PART: Final = 3.0
"""A part of what is read one by one: a member of JSON that the strict decoder refuses, a field of protobuf.
Measured 1 to 3.6, and a command may have 16,384."""

TAKEN_APART: Final = 0.3
"""A member of a text that is taken apart, so that its parts can be read. Measured 0.1 to 0.3."""

READ_KILOBYTE: Final = 6.0
"""A kibibyte of JSON that a backend has sent: checked, then read. Measured 2 to 5; 16 where it is all
empty objects."""

READ_OBJECT: Final = 4.0
"""An object in what a client without WebSocket begins with: a command that is told apart, or a topic of a
one-way client. Measured 1 to 4."""

KILOBYTE: Final = 2.0
"""A kibibyte that is encoded or copied on its way out, once for each audience."""

RUN: Final = 4.5
"""A run that begins: looking up its listeners, waking the postman."""

PARCEL: Final = 6.0
"""A publication by itself, with its report. Measured 5."""

FIRST: Final = 8.0
"""The first publication that a topic keeps. Measured 7."""

EVICTED: Final = 12.0
"""One that has to go for another, where all topics are full. Measured 10 to 20 if its topic goes with
it."""

FULL: Final = 12.0
"""An outbox that is full: its socket is asked once more, then its rule is applied."""

LISTENERS: Final = 0.5
"""A topic or pattern that is found to match, whoever listens to it."""

AUDIENCE: Final = 4.0
"""An audience that gets a run: one is made, with its name in each message, and put into each outbox.
Measured 3 to 6."""

PEER: Final = 0.5
"""A peer that gets a run: an append."""

WRITE: Final = 4.0
"""A peer for which nothing waited until then: a write to its socket, which brings all that gathers before it.
It is charged when a run is delivered: only then is it known how many these are. Measured 4 to 6."""

SUBSCRIPTION: Final = 16.0
"""A subscription that begins, and one day is ended."""

LEFT: Final = 5.0
"""A subscription that is left because its connection ends."""

PATTERN: Final = 20.0
"""The same of a pattern, besides: filed with up to 32 tokens, and taken out again."""

FILTER_PART: Final = 4.0
"""A node of a new filter: checked, compiled and filed. Measured 3.6."""

FILTER_VALUE: Final = 0.8
"""A value in a list of one: the same, and its place in an index."""

FILTER_NODE: Final = 0.15
"""A node of a tags filter that is evaluated."""

TAG_KILOBYTE: Final = 3.0
"""A kibibyte of a tag in which a node looks for a text, at worst."""

ASKED: Final = 1.0
"""A subscriber who is asked for itself: may it have this, is its turn now."""

LOOKED: Final = 1.5
"""A retained value, or a branch of them, that is looked at for a pattern. Measured 1.2 to 1.8."""

MEMBER: Final = 2.0
"""A client that is listed in a presence reply; measured 1.4 to 2.3."""

SPARED: Final = 0.1
"""A connection that a request names because nothing is to be done to it. Measured 0.05."""

LISTED: Final = 2.0
"""A publication in a history or recovery reply, besides its bytes."""

ASK: Final = 12.0
"""A request to another client: filed, and put into its outbox. Measured 10 to 16."""

ANSWERED: Final = 8.0
"""A request that ends: taken out, and its asker told, with a write to its socket. Measured 5 to 8."""

NAMED: Final = 0.5
"""A topic in a list of topics, for each pattern that it is compared with. Measured 0.3 to 0.5."""

ENDING: Final = 250.0
"""A connection that is closed, besides its subscriptions: 40 at once, the rest in its own tasks."""

TOKEN: Final = 40.0
"""A token that is read, besides its signature."""

SIGNATURE: Final = 120.0
"""A signature that is verified by RSA, EdDSA or the curve P-256, once for each key that fits. Measured 60 to
200; by HMAC 5."""

WIDE_SIGNATURE: Final = 600.0
"""The same by P-384 or P-521. Measured 500 to 900."""

INFLATED: Final = 70.0
"""A frame that comes compressed, besides its bytes: taken by itself, and handed on by itself. Measured 55 to 85."""

UNMASKED_KILOBYTE: Final = 4.0
"""A kibibyte of a large one that is unmasked, in one step."""

INFLATE_STEP: Final = 4.0
"""A step of it: a message may have a block that ends its stream in every two bytes."""

TAKEN_KILOBYTE: Final = 16.0
"""A kibibyte of one: what is usual takes 4 to 8, blocks of one byte each 80."""

OVERHEAD_KILOBYTE: Final = 120.0
"""A kibibyte of it that nothing has come out of: all tables and no data. Measured 133 in all; honest data
have none."""

INFLATED_KILOBYTE: Final = 2.5
"""A kibibyte that comes out. Measured 2.0 to 2.4, bombs among them."""

DEFLATED: Final = 6.0
"""A message that is compressed for those who want it so, besides its bytes; once for all of them."""

DEFLATED_KILOBYTE: Final = 10.0
"""A kibibyte of it. Measured 5 to 11."""

DEFLATE_SHARE: Final = 0.5
"""Part of the time that compressing may take. Where it would be more, messages go as they are: they
leave the sooner, and nobody waits."""

DEFLATE_BURST: Final = 3.0 * SLICE
"""The most of that at once: 300 KB. So a larger message is never compressed."""

SURVEYED: Final = 2.5
"""A connection that is looked at for the metrics; measured 1.1 to 3."""

SURVEYED_AT_ONCE: Final = 100
"""Connections between two turns of a walk over all of them: 0.3 ms."""

COLLECTED: Final = 6.0
"""All that is known of one connection, besides its topics, for whoever asks. Measured 5.8."""

SHOWN: Final = 6.0
"""The same, written in an answer. Measured 6.6."""

DETAILS: Final = COLLECTED + SHOWN
"""Both, where one step does both."""


@attrs.define(eq=False)
class Meter:
    """Work that one broker has done so far."""

    done: float = 0.0

    def add(self, work: float) -> None:
        self.done += work

    def charge(self, payer: "Allowance", before: float) -> None:
        """Charge `payer` for the work since a reading, instead of the party in whose step it was done."""
        payer.spend(self.done - before)
        self.done = before


@attrs.define(eq=False)
class Allowance:
    """The work that one party may still do before it goes behind all others: `slice` is left of its
    last turn in the queue, `left` needs no turn."""

    left: float = BURST
    at: float = 0.0
    slice: float = 0.0
    at_once: Meter = attrs.field(factory=Meter, kw_only=True)
    """What this party, and all others that have this meter, have done without a turn."""

    def is_low(self) -> bool:
        """Whether it is worth the time to refill it: so a party may do half as much again at once."""
        return self.slice <= 0 and self.left < BURST / 2

    def refill(self, now: float) -> None:
        """Count the time since it was last asked, in seconds."""
        self.left = min(BURST, self.left + (now - self.at) * SHARE * 1_000_000)
        self.at = now

    def admits(self, work: float) -> bool:
        """Whether so much may be done now. A party with nothing left may do nothing."""
        return 0 < self.slice >= work or 0 < self.left >= work

    def spend(self, work: float) -> None:
        """Count what was done. A debt is for two seconds at most: longer ago nobody remembers. Of a turn no more
        than a slice is left for other acts: one that took less than was announced is no way to more."""
        if self.slice <= 0:
            self.at_once.done += work
        self.slice -= work
        self.left -= work
        # Compared first, because `min` and `max` would take three times as long.
        if self.slice > SLICE or self.left < -DEBT:
            self.slice = min(self.slice, SLICE)
            self.left = max(self.left, -DEBT)
