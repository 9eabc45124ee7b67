"""The broker under attack: `python -m broker` as a process on a core of its own, and what the
system tells of it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import attrs
import trio
import trustme

from broker.cli.private_redis import find_program
from tests.hostile.wire import Address, Tcp, Unix
from tests.ports import free_port

ROOT: Final = Path(__file__).parents[2]
CORES: Final = sorted(os.sched_getaffinity(0))
BROKER_CORE: Final = CORES[0]
LOAD_CORE: Final = CORES[-1]
"""The same core where there is only one; figures are worth little then."""

API_KEY: Final = "hostile-key"
SECRET: Final = "a secret of more than thirty-two bytes, for tests"
WORKERS: Final = 2
START_SECONDS: Final = float(os.environ.get("HOSTILE_START_SECONDS", "60"))
"""Until a broker that does not serve counts as dead; an import takes half a second, and twenty where
others have the machine."""


CGROUPS: Final = Path("/sys/fs/cgroup")
V1_LIMIT: Final = "memory.limit_in_bytes"


LAUNCH: Final = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9)
core, files, stderr, cgroup = sys.argv[1:5]
os.sched_setaffinity(0, {int(core)})
if cgroup:
    with open(os.path.join(cgroup, "cgroup.procs"), "w") as procs:
        procs.write("0")
if int(files):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
if stderr == "closed":
    os.close(2)
os.execv(sys.argv[5], sys.argv[5:])
"""
"""Done in the new process, which then becomes another: between fork and exec of a process with threads
nothing of Python's is safe. The first line (prctl(2), PR_SET_PDEATHSIG, SIGKILL) has it end with us,
however we end."""


Ground: TypeAlias = Literal["memory", "sqlite", "redis", "nodes", "workers"]
"""Where a broker stands: on an engine; `nodes` is two of them on one Redis, of which the bystanders are on the one
that nobody attacks; `workers` is two on one port."""

_STARTER: Final = ThreadPoolExecutor(1)


def step_back(nice: int) -> None:
    """Go to the core of the load, so far behind all that `start_process` starts from now on."""
    _STARTER.submit(int).result()  # so that its thread is there, with the priority of now
    os.sched_setaffinity(0, {LOAD_CORE})
    os.nice(nice)


def start_process(*args: Any, **options: Any) -> "subprocess.Popen[bytes]":
    """`subprocess.Popen` with the priority that was there before `step_back`: a process has that of the thread that
    starts it."""

    def start() -> Any:
        return subprocess.Popen(*args, **options)

    started: subprocess.Popen[bytes] = _STARTER.submit(start).result()
    return started


class NotStarted(RuntimeError):
    """The broker did not come up; the message ends with what it said last."""


@attrs.frozen
class Setup:
    """How a broker is started. `app` is MODULE:ATTR, `toml` a config file's text."""

    options: tuple[str, ...] = ()
    env: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    toml: str = ""
    app: str = ""
    tls: bool = False
    unix: bool = False
    files: int = 0
    """`ulimit -n`; 0 leaves it."""
    stderr: Literal["file", "pipe", "closed"] = "file"
    """`pipe`: one that nobody reads, and that is full after 64 KiB."""
    log_format: str = "json"
    backend: tuple[str, ...] = ()
    """Kinds of questions that are asked of a backend, such as `connect` and `rpc`."""
    connect: Mapping[str, object] = attrs.field(factory=dict, hash=False)
    """The fields of the bystanders' connect commands."""
    disk_bytes: int = 0
    """The size of a disk of its own (Linux, root: a tmpfs), with the log on it; 0: none. In options and
    variables `{disk}` is its directory."""
    cgroup_bytes: int = 0
    """The memory that the system grants it (Linux, root: a cgroup); 0: all."""
    ground: Ground = "memory"


@attrs.frozen
class Sample:
    """Memory, files, threads and time of a process at one moment. Sizes in bytes, CPU in seconds."""

    rss: int
    files: int
    threads: int
    cpu: float
    waited: float
    """Seconds that it was ready to run and others had its core; 0 where the system keeps none."""


class Target:
    """A broker that was started. `stop` or `kill` it in the end."""

    def __init__(self, setup: Setup, scratch: Path) -> None:
        self.setup = setup
        self.scratch = scratch
        self.config_file = scratch / "broker.toml"
        self.disk = scratch
        if setup.disk_bytes:
            self.disk = _mount_disk(scratch, setup.disk_bytes)
        self._cgroup = _make_cgroup(setup.cgroup_bytes) if setup.cgroup_bytes else None
        self.log_file = self.disk / "stderr"
        self.address: Address
        options = ["--log-format", setup.log_format]
        if setup.unix:
            self.address = Unix(str(scratch / "broker.sock"))
            options += ["--unix", self.address.path]
        else:
            self.address = Tcp(free_port(), _certificate(scratch) if setup.tls else "")
            options += ["--host", "127.0.0.1", "--port", str(self.address.port)]
            if setup.tls:
                options += ["--tls-cert", str(scratch / "cert"), "--tls-key", str(scratch / "key")]
        if setup.toml:
            self.config_file.write_text(setup.toml)
            options += ["--config", str(self.config_file)]
        options += setup.options  # the last of two counts
        self._read = 0
        self._backend, self._questions = _start_backend(setup.backend)
        self.store: subprocess.Popen[bytes] | None = None
        if setup.ground in ("redis", "nodes"):
            self.store = _start_redis(scratch)
        options += self._ground_options()
        self.process = self._start(options, BROKER_CORE, self.log_file)
        self.bystanders = self.address
        """Where these connect to."""
        self._neighbour: subprocess.Popen[bytes] | None = None
        if setup.ground == "nodes":
            assert isinstance(self.address, Tcp), "two nodes have two ports"
            self.bystanders = attrs.evolve(self.address, port=free_port())
            options += ["--port", str(self.bystanders.port)]
            log_file = self.log_file.with_name("stderr-2")
            self._neighbour = self._start(options, LOAD_CORE, log_file)

    def _ground_options(self) -> list[str]:
        if self.setup.ground == "sqlite":
            return ["--engine", f"sqlite:{self.scratch}/broker.db"]
        if self.setup.ground == "workers":
            return ["--workers", str(WORKERS)]
        return ["--engine", f"redis+unix://{self.scratch}/redis.sock"] if self.store else []

    def _start(
        self, options: Sequence[str], core: int, log_file: Path
    ) -> "subprocess.Popen[bytes]":
        setup = self.setup
        app = [setup.app] if setup.app else []
        return start_process(
            [
                *(sys.executable, "-c", LAUNCH, str(core), str(setup.files), setup.stderr),
                str(self._cgroup or ""),
                *(sys.executable, "-m", "broker", "serve", *app, *options),
            ],
            cwd=ROOT,
            env={**os.environ, "BROKER_API_KEY": API_KEY, **self._questions, **self._variables()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if setup.stderr == "pipe" else log_file.open("wb"),
        )

    def _variables(self) -> dict[str, str]:
        return {
            name: value.replace("{disk}", str(self.disk)) for name, value in self.setup.env.items()
        }

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    async def wait_served(self) -> None:
        """Wait until `/healthz` answers 200. Raises `NotStarted` if the process ends, or
        takes longer than `START_SECONDS`."""
        with trio.move_on_after(START_SECONDS):
            while self.is_running:
                if await trio.to_thread.run_sync(self._is_healthy):
                    return
                await trio.sleep(0.05)
        lines = self.log_lines() or [""]
        fault = "Traceback: " if any("Traceback" in line for line in lines) else ""
        raise NotStarted(f"the broker did not start: {fault}{lines[-1]}")

    async def wait_ended(self, seconds: float) -> str:
        """How the process ended: `exit 0`, `signal 9`; `runs on` if it did not."""
        with trio.move_on_after(seconds):
            while self.is_running:  # noqa: ASYNC110 - a process sets no event
                await trio.sleep(0.02)
        status = self.process.poll()
        if status is None:
            return "runs on"
        return f"exit {status}" if status >= 0 else f"signal {-status}"

    def signal_store(self, number: signal.Signals) -> None:
        """Stop or go on: the Redis of ground `redis` and `nodes`."""
        assert self.store is not None, "there is no Redis of its own"
        self.store.send_signal(number)

    def signal_backend(self, number: signal.Signals) -> None:
        if self._backend is not None:
            self._backend.send_signal(number)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        for process in (self.process, self._neighbour, self._backend, self.store):
            if process is not None:
                process.kill()
                process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        if self.disk != self.scratch:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=False)
        if self._cgroup is not None:
            with suppress(OSError):
                self._cgroup.rmdir()

    async def stop(self) -> None:
        """End it, politely at first."""
        if self.is_running:
            self.signal(signal.SIGTERM)
            await self.wait_ended(1.0)
        self.kill()

    def api(self, method: str, **params: object) -> dict[str, object]:
        """Call the HTTP API; blocks for 2 s at most. Raises `OSError`, `HTTPException`, or
        `ValueError` where what comes is no JSON."""
        connection = _Connection(self.address)
        try:
            body = json.dumps(params)
            connection.request("POST", f"/api/{method}", body, {"X-API-Key": API_KEY})
            answer: dict[str, object] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()

    def clients(self) -> int:
        """Connections that the broker has, all nodes together; -1 where it does not say."""
        try:
            answer = self.api("info")
            nodes = answer["result"]["nodes"]  # type: ignore[index]
            return sum(int(node["num_clients"]) for node in nodes)
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return -1

    def _pids(self) -> list[int]:
        """The processes that are the broker; the supervisor of workers is one of them."""
        pids = [self.pid, *([self._neighbour.pid] if self._neighbour else [])]
        if self.setup.ground == "workers":
            pids += _workers_of(self.pid)
        return pids

    def sample(self) -> Sample:
        """Measure the processes now, all together. Raises `ProcessLookupError` when one has ended."""
        each = [_sample_of(pid) for pid in self._pids()]
        # Workers share a core: it is not others who keep them waiting.
        waited = 0.0 if self.setup.ground == "workers" else waited_of(self.pid)
        return Sample(
            sum(one.rss for one in each),
            sum(one.files for one in each),
            sum(one.threads for one in each),
            sum(one.cpu for one in each),
            waited,
        )

    def reset_peak(self) -> None:
        """Begin to look for the peak of RSS anew (proc(5), clear_refs 5)."""
        with suppress(OSError):
            for pid in self._pids():
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most RSS since `reset_peak`, in bytes, of each process by itself; 0 when one has ended."""
        try:
            each = [dict(_status_lines(Path(f"/proc/{pid}"))) for pid in self._pids()]
        except OSError:
            return 0
        return sum(_bytes(status.get("VmHWM", "0 kB")) for status in each)

    def log_lines(self) -> list[str]:
        """The log since it was last asked."""
        if self.setup.stderr != "file":
            return []
        with self.log_file.open(encoding="utf-8", errors="backslashreplace") as file:
            file.seek(self._read)
            lines = file.read()
            self._read = file.tell()
        return lines.splitlines()

    def _is_healthy(self) -> bool:
        if self.setup.ground == "workers" and '"event": "ready"' not in self.log_file.read_text():
            return False  # one of them answers, and the others are being started
        return all(map(_is_healthy, {self.address, self.bystanders}))


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address) -> None:
        super().__init__("localhost", timeout=2.0)
        self._address = address

    def connect(self) -> None:
        self.sock = dial(self._address, 2.0)


def _is_healthy(address: Address) -> bool:
    connection = _Connection(address)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def dial(address: Address, seconds: float) -> socket.socket:
    """A blocking socket to the broker, for what speaks no Trio."""
    import ssl

    if isinstance(address, Unix):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(seconds)
        sock.connect(address.path)
        return sock
    sock = socket.create_connection((address.host, address.port), seconds)
    if not address.ca:
        return sock
    context = ssl.create_default_context(cafile=address.ca)
    return context.wrap_socket(sock, server_hostname="localhost")


def _workers_of(supervisor: int) -> list[int]:
    """Its children that run the same program; a Redis of theirs is none."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (proc / "stat").read_text().rpartition(")")[2].split()[1]
            program = (proc / "exe").readlink()
            if int(parent) == supervisor and program == Path(f"/proc/{supervisor}/exe").readlink():
                found.append(int(proc.name))
    return sorted(found)


def _sample_of(pid: int) -> Sample:
    proc = Path(f"/proc/{pid}")
    try:
        status = dict(_status_lines(proc))
        files = len(list((proc / "fd").iterdir()))
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if "VmRSS" not in status:  # a zombie
        raise ProcessLookupError(pid)
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Sample(_bytes(status["VmRSS"]), files, int(status["Threads"]), cpu, waited_of(pid))


def waited_of(pid: int) -> float:
    """Seconds that a process was ready to run and did not (Linux: /proc/PID/schedstat)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _status_lines(proc: Path) -> Iterator[tuple[str, str]]:
    for line in (proc / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        yield name, value.strip()


def _bytes(kib: str) -> int:
    return int(kib.split(maxsplit=1)[0]) * 1024


def _mount_disk(scratch: Path, size: int) -> Path:
    disk = scratch / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    subprocess.run(command, check=True)
    return disk


def _make_cgroup(size: int) -> Path:
    """A cgroup with so much memory. Raises `OSError` where there is none to be had."""
    unified = CGROUPS / "cgroup.controllers"
    root, name = (CGROUPS, "memory.max") if unified.exists() else (CGROUPS / "memory", V1_LIMIT)
    group = Path(tempfile.mkdtemp(prefix="hostile-", dir=root))
    (group / name).write_text(str(size))
    return group


def _start_redis(scratch: Path) -> "subprocess.Popen[bytes]":
    """A Redis for one broker, on the core of the load and before it in line."""
    program = find_program()
    assert program is not None, "no valkey-server or redis-server is here"
    options = ["--port", "0", "--unixsocket", f"{scratch}/redis.sock", "--save", ""]
    return start_process(
        [
            *(sys.executable, "-c", LAUNCH, str(LOAD_CORE), "0", "file", ""),
            *(program, *options, "--appendonly", "no", "--dir", str(scratch)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _start_backend(
    kinds: Sequence[str],
) -> "tuple[subprocess.Popen[bytes] | None, dict[str, str]]":
    """A backend in a process of its own, and the settings by which it is asked."""
    if not kinds:
        return None, {}
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.hostile.backend", str(port)], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    return process, {f"BROKER_WEBHOOKS_{kind.upper()}_URL": f"{url}/{kind}" for kind in kinds}


def _certificate(scratch: Path) -> str:
    authority = trustme.CA()
    ours = authority.issue_cert("localhost", "127.0.0.1")
    ours.private_key_pem.write_to_path(str(scratch / "key"))
    with (scratch / "cert").open("wb") as file:
        file.writelines(blob.bytes() for blob in ours.cert_chain_pems)
    authority.cert_pem.write_to_path(str(scratch / "ca"))
    return str(scratch / "ca")


def scratch_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="hostile-")
