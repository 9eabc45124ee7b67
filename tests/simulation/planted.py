"""Faults that are planted in the broker to see whether the simulation finds them.

Each is one that somebody could make: a look that is left out, a number that is off, a thing that is done twice.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from tests.mutants.mutant import Mutant, copied_tree, environment

SEEDS: Final = 400
"""So many are played of each fault at most."""

PATIENCE: Final = 600.0
"""Seconds that they may take. A broker that hangs is no finding."""


@attrs.frozen
class Found:
    mutant: Mutant
    seed: int
    """The first that was seen to fail; -1 for none."""
    failure: str


def find_all(faults: "tuple[Mutant, ...]", processes: int) -> Iterator[Found]:
    """Plant each by itself in a copy of the tree, and play seeds until one fails."""
    with copied_tree() as root:
        for mutant in faults:
            with mutant.planted(root):
                yield _find(mutant, root, processes)


def _find(mutant: Mutant, root: Path, processes: int) -> Found:
    command = [sys.executable, "-m", "tests.simulation", "--until-failure", "--quick"]
    command += ["--seeds", str(SEEDS), "--jobs", str(processes)]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment(root),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Found(mutant, -1, "it hangs")
    found = re.search(r"^seed ([0-9]+): (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        return Found(mutant, -1, (done.stdout + done.stderr).strip().split("\n")[-1])
    return Found(mutant, int(found[1]), found[2])


PLANTED: Final = (
    Mutant(
        "a right is not asked again after an await",
        "broker/session/commands.py",
        """        grant = services.rights.grant(peer, name, token)
        if reply.info is not None:
""",
        """        from broker.core.session import Decider, Grant

        grant = Grant(name, Decider.HOOK, peer.user)
        if reply.info is not None:
""",
    ),
    Mutant(
        "a recovery answers the top offset",
        "broker/routing/subscriptions.py",
        "                position = Position(request.offset, position.epoch)\n",
        "                pass\n",
    ),
    Mutant(
        "a copy per wake-up",
        "broker/transport/outbox.py",
        """        self.mail.append(run)
        self.bytes += run.size
        self.messages += run.messages
""",
        """        for _ in range(2 if self._writing and run.messages else 1):
            self.mail.append(run)
            self.bytes += run.size
            self.messages += run.messages
""",
    ),
    Mutant(
        "a reply without a bound",
        "broker/routing/reading.py",
        "    return first_bytes(publications, config.history_reply_bytes), top\n",
        "    return publications, top\n",
    ),
    Mutant(
        "a recovery without a bound",
        "broker/routing/subscriptions.py",
        "            if size > (most if room is None else room) and (len(missed) > 1 or room is not None):\n",
        "            if size > 100 * (most if room is None else room):\n",
    ),
    Mutant(
        "a flush is forgotten",
        "broker/routing/router.py",
        "        self._run_topic = topic\n        self.office.wake()\n",
        "        self._run_topic = topic\n",
    ),
    Mutant(
        "an outbox is posted too late",
        "broker/transport/outbox.py",
        "        if not self.mail:\n            self._post([self])\n        self.mail.append(run)\n",
        "        self.mail.append(run)\n        if not self.mail:\n            self._post([self])\n",
    ),
    Mutant(
        "a close hook is called twice",
        "broker/session/ending.py",
        "            await hook(connection, close)\n",
        """            await hook(connection, close)
            if close.initiator is Initiator.NETWORK:
                await hook(connection, close)
""",
    ),
    Mutant(
        "a close hook is told another reason",
        "broker/session/ending.py",
        '    return Close(CloseCode.ABNORMAL, "connection lost", Initiator.NETWORK)\n',
        '    return Close(CloseCode.ABNORMAL, "connection lost", Initiator.HEARTBEAT)\n',
    ),
    Mutant(
        "two runs change places",
        "broker/transport/outbox.py",
        '        self._begun = self._first + len(parts)\n        return b"".join(parts)\n',
        """        self._begun = self._first + len(parts)
        if len(parts) > 2:
            parts[1], parts[2] = parts[2], parts[1]
        return b"".join(parts)
""",
    ),
    Mutant(
        "a key counts for all connections without a user",
        "broker/routing/publishing.py",
        "        owner = owner_of(None if by is None else by.info)\n",
        '        owner = owner_of(by.info) if by is not None and by.user else "nobody"\n',
    ),
    Mutant(
        "a subscription outlives its connection",
        "broker/routing/router.py",
        """        for name in list(peer.subscriptions):
            self.meter.add(LEFT)
            self.unsubscribe(""",
        """        for name in list(peer.subscriptions):
            self.meter.add(LEFT)
            if name == "tick":
                peer.subscriptions.pop(name)
                continue
            self.unsubscribe(""",
    ),
    Mutant(
        "memory that was charged is not given back",
        "broker/transport/outbox.py",
        """            if self._ledger is not None:
                self._ledger.bytes_held -= in_hand
""",
        """            if self._ledger is not None and sent_whole:
                self._ledger.bytes_held -= in_hand
""",
    ),
    Mutant(
        "a will is published twice",
        "broker/routing/wills.py",
        "            self.publisher.publish(will.topic, will.data, peer, options)\n",
        """            self.publisher.publish(will.topic, will.data, peer, options)
            if close.code == 1006:
                self.publisher.publish(will.topic, will.data, peer, options)
""",
    ),
    Mutant(
        "a will is forgotten",
        "broker/routing/wills.py",
        "        if will is None or (close.initiator is Initiator.CLIENT and close.code in GOODBYES):\n",
        "        if will is None or close.initiator is Initiator.CLIENT:\n",
    ),
    Mutant(
        "a recovery ignores the tags filter",
        "broker/routing/subscriptions.py",
        "                missed = [each for each in missed if wanted.matches(each.tags)]\n",
        "                pass\n",
    ),
    Mutant(
        "a gap is not told",
        "broker/transport/outbox.py",
        """        self._take_off(dropped)
        if dropped.messages:
            self._on_drop(dropped.topics)
""",
        "        self._take_off(dropped)\n",
    ),
    Mutant(
        "what was a user's goes on to whoever has become another",
        "broker/core/registry.py",
        """        fds.discard(session.fd)
        if not fds:
            del self._fds_of[session.user]
        return session.user
""",
        """        if len(fds) > 1:
            fds.discard(session.fd)
        return session.user
""",
    ),
    Mutant(
        "a bind ends no subscription",
        "broker/access/rights.py",
        "            return rules is not None and allows(rules.may_subscribe, session.user)\n        return True\n",
        "            return rules is not None\n        return True\n",
    ),
    Mutant(
        "a pattern brings what is not open to its subscriber",
        "broker/access/rights.py",
        "            return among and allows(rules.may_subscribe, user)\n",
        "            return among\n",
    ),
    Mutant(
        "a queue group gives to two",
        "broker/routing/queue_groups.py",
        "            shares.setdefault(member, []).append(publication)\n",
        """            shares.setdefault(member, []).append(publication)
            if len(self.group) > 1:
                others = [each for each in self.group.members.values() if each is not member]
                shares.setdefault(others[0], []).append(publication)
""",
    ),
    Mutant(
        "a retained value comes to who has recovered it",
        "broker/routing/retained.py",
        "        if not subscription.wants(value.tags) or (recovered and value.offset):\n",
        "        if not subscription.wants(value.tags):\n",
    ),
    Mutant(
        "the engine acknowledges before it has kept",
        "broker/engines/sqlite.py",
        "        batches = submission.parcel.batches\n        self._submitted",
        """        for done in submission.dones:
            done(None)
        submission.dones.clear()
        batches = submission.parcel.batches
        self._submitted""",
    ),
    Mutant(
        "what is kept while the disk fails is not refused",
        "broker/engines/sqlite.py",
        """            self._refuse([*self._under_way, *self._queue], sink, self._failing)
            self._under_way = deque()
""",
        """            self._refuse([*self._queue], sink, self._failing)
            self._under_way = deque()
""",
    ),
    Mutant(
        "a request of one who has gone is not forgotten",
        "broker/session/connection.py",
        "        services.requests.leave(peer.fd)\n",
        "",
    ),
    Mutant(
        "a stream is not closed",
        "broker/session/ending.py",
        """            with services.last_words(_TLS_GOODBYE):
                await stream.aclose()
""",
        """            with services.last_words(_TLS_GOODBYE):
                await trio.lowlevel.checkpoint()
""",
    ),
    Mutant(
        "a message that came by a request is cut at the first read",
        "broker/http/streams.py",
        "        data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]\n",
        '        data, self._unread = self._unread[:200], b""\n',
    ),
    Mutant(
        "a publication reaches another node out of its order",
        "broker/testing/bus.py",
        "        self._reads.append((due, read))\n",
        """        self._reads.append((due, read))
        if len(self._reads) > 1 and due == self._reads[-2][0]:
            self._reads[-1], self._reads[-2] = self._reads[-2], self._reads[-1]
""",
    ),
)
