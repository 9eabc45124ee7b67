"""`python -m broker`: the command line, see `broker.cli.main`.

The order matters: signals are obeyed before anything is imported that takes time.
"""

import sys

from broker.cli import start
from broker.process.signals import process


def run() -> None:
    """Run the command line; never returns."""
    process.install()
    start.open_standard_streams()
    try:
        from broker.cli.main import main
    except Exception as error:
        path = start.hiding_file(error)
        if path is None:
            raise
        sys.stderr.write(f"{start.hidden_by(path)}\n")
        sys.exit(2)
    main()


if __name__ == "__main__":
    run()
