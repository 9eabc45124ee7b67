"""The first steps of the process, before anything of others is imported.

Rule: nothing is imported here but the standard library, for what others have may be hidden by a
file of the user's.
"""

import os
import sys
from pathlib import Path
from types import ModuleType


def open_standard_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, as after `2>&-`.

    The next file or socket would else get that number, and a peer would read what was meant for
    stderr; and `print(…, file=sys.stderr)` would print to stdout.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            # Not closed at the end: the number stays taken.
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def hiding_file(error: Exception) -> Path | None:
    """The file in the working directory that hides the module which an import needed; or None.

    `python -m` looks in the working directory first, so a `token.py` there is what the standard
    library gets for its own. `error` is what our own imports raised.
    """
    here = Path.cwd()
    suspects: list[object] = []
    if isinstance(error, ImportError):
        suspects += [error.path, sys.modules.get((error.name or "").partition(".")[0])]
    elif isinstance(error, AttributeError):
        suspects.append(error.obj)
    step = error.__traceback__
    while step is not None:
        suspects.append(step.tb_frame.f_code.co_filename)
        step = step.tb_next
    suspects += [
        module for name, module in list(sys.modules.items()) if name in sys.stdlib_module_names
    ]
    for suspect in suspects:
        path = getattr(suspect, "__file__", None) if isinstance(suspect, ModuleType) else suspect
        if isinstance(path, str) and path.endswith(".py") and _is_of(Path(path).absolute(), here):
            return Path(path)
    return None


def _is_of(path: Path, here: Path) -> bool:
    """Whether a file is a module or package of this directory, and not one of ours."""
    ours = Path(__file__).parents[1]
    module = path.parent if path.name == "__init__.py" else path
    return module.parent == here and module != ours


def hidden_by(path: Path) -> str:
    """The line to say about it."""
    name = path.parent.name if path.name == "__init__.py" else path.stem
    shown = f"{name}/" if path.name == "__init__.py" else path.name
    return (
        f"Error: {shown} in this directory hides the module {name!r} that is needed here; rename "
        "it, or start from another directory"
    )
