"""All targets: importing this fills `TARGETS`."""

from tests.fuzz import bodies, codecs, compressed, rules, stored, wire  # noqa: F401
from tests.fuzz.target import TARGETS, Target

__all__ = ["TARGETS", "Target"]
