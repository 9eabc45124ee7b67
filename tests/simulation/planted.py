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
        """            self.meter.add(LEFT)
            self.unsubscribe(""",
        """            self.meter.add(LEFT)
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
)
