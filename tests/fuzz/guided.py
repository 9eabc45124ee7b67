"""One target under atheris, guided by what each input reaches: `python -m tests.fuzz.guided TARGET …`.

A process of its own for each target, as libFuzzer ends the one that it runs in. What follows the target
are options of libFuzzer, and directories of inputs.
"""

import sys

import atheris

with atheris.instrument_imports(include=["broker"]):
    from tests.fuzz.table import TARGETS


def main() -> None:
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
