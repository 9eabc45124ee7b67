"""What more than one test file needs; anything for one file lives in that file."""

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Begin with structlog as it is when nobody has configured it; leave all logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    config = structlog.get_config() if structlog.is_configured() else None
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    if config is not None:
        structlog.configure(**config)
    root.handlers[:] = handlers
    root.setLevel(level)
