"""Node, for the tests in this folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def node(missing: Callable[[str], NoReturn]) -> str:
    path = shutil.which("node")
    if path is None:
        missing("node is not installed (Debian: apt-get install nodejs npm)")
    if not (HERE / "node_modules" / "centrifuge").is_dir():
        missing(
            "the JavaScript SDK is not installed: run `npm ci` in tests/sdk, or `nox -s sdk_js`"
        )
    return path
