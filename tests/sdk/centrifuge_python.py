"""Run centrifuge-python's own tests, unchanged, against our broker: `nox -s sdk_python`.

The argument is the unpacked sdist; `--engine` names the broker's engine; further ones are handed to
unittest in place of all tests. The exit status is that of the tests, or 1 if the broker did not start,
or did not stop when asked to. Its log is in the sdist's folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.engines.servers import ENGINES, engine_of

CONFIG = Path(__file__).with_suffix(".toml")


def run(sdist: Path, engine: str, options: list[str]) -> int:
    serve = [sys.executable, "-m", "broker", "--config", str(CONFIG), "--engine", engine]
    # Their own `centrifuge`, not the one that is installed, comes first: they run in its folder.
    suite = [sys.executable, "-m", "unittest", *(options or ("discover", "-s", "tests", "-t", "."))]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = sdist / "broker.log"
    with log.open("w") as output, subprocess.Popen(serve, stderr=output) as broker:
        # They wait for a server on port 8000 themselves, and say so when there is none.
        tests = subprocess.run(suite, cwd=sdist, env=environ, check=False)
        served = broker.poll() is None
        broker.terminate()
    if not served or broker.returncode:
        sys.stderr.write(f"the broker ended with {broker.returncode}:\n{log.read_text()[-2000:]}")
        return 1
    return tests.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--engine", default="memory", help=f"{', '.join(ENGINES)}, or a URL")
    known, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place, engine_of(known.engine, Path(place)) as engine:
        return run(known.sdist, engine, options)


if __name__ == "__main__":
    sys.exit(main())
