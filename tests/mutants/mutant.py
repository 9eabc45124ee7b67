"""A fault that is put into the broker on purpose, in a copy of the tree, to see whether it is found."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).parents[2]

COPIED: Final = ("broker", "tests", "docs", "clients", "pyproject.toml", "noxfile.py")
"""What tests need of the tree."""


@attrs.frozen
class Mutant:
    """In the file at `path` the text `before`, which is there once, becomes `after`."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...] = ()
    """Those that should see it: `tests/core/test_hub.py::test_it`, without what is in brackets."""

    def count(self, root: Path = ROOT) -> int:
        """How often the text is there."""
        return (root / self.path).read_text("utf-8").count(self.before)

    @contextmanager
    def planted(self, root: Path) -> Iterator[None]:
        """The fault is there, in the tree below `root`, for as long as the block."""
        file = root / self.path
        whole = file.read_text("utf-8")
        assert whole.count(self.before) == 1, f"{self.name}: {self.path} has changed"
        stamp = file.stat().st_mtime
        file.write_text(whole.replace(self.before, self.after), "utf-8")
        # What is compiled is told apart by the second: never take the one for the other.
        os.utime(file, (stamp + 10, stamp + 10 + len(self.name)))
        try:
            yield
        finally:
            file.write_text(whole, "utf-8")
            os.utime(file, (stamp, stamp))


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of this tree, for as long as the block."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        root = Path(directory)
        # Of a compiled package the source alone: Python would take the compiled module, which has no mutant in it.
        compiled = ("*.pyc", "*.so", "*.pyd")
        leave_out = shutil.ignore_patterns("__pycache__", "node_modules", "_build", *compiled)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=leave_out)
            else:
                shutil.copy(ROOT / name, root / name)
        yield root


def environment(root: Path) -> dict[str, str]:
    """For processes that are to work with the copy."""
    return {**os.environ, "PYTHONPATH": str(root)}
