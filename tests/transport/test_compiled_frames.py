"""The loops over bytes in C, built as a user builds them, against those of Python."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.testing import client_frame
from broker.transport import frames
from broker.transport.frames import BINARY, CONTINUATION, PING, TEXT, Buffer, Message
from broker.version import VERSION

ROOT = Path(__file__).parents[2]
NAME = "broker.transport.compiled_frames"
LIMIT = 70_000


def build_wheel(where: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Build as `pip install .` does, and put the wheel there."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", where],
        cwd=ROOT,
        env={**os.environ, "TRIO_BROKER_COMPILE": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(shlex.split(os.environ.get("CC", "cc"))[0]) is None:
        reason = "there is no C compiler (Debian: apt-get install gcc python3-dev)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    where = tmp_path_factory.mktemp("wheel")
    built = build_wheel(where, TRIO_BROKER_COMPILE="1")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    (path,) = where.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def tree(wheel: Path) -> Path:
    """The package as the wheel has it."""
    zipfile.ZipFile(wheel).extractall(wheel.parent)
    return wheel.parent


@pytest.fixture(scope="module")
def compiled(tree: Path) -> Any:
    return load(NAME, tree / "broker" / "transport" / "compiled_frames.abi3.so")


@pytest.fixture(scope="module")
def pure() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, NAME, None)
        module = load("pure_frames", Path(frames.__file__))
    assert module.BUILD == "pure"
    return module


# what a peer may send: whole messages, other frames, and lengths in every form, of which not all are legal
TEXTS = st.text(max_size=200).map(str.encode)
WHOLE = st.one_of(
    st.builds(client_frame, st.just(TEXT), st.one_of(TEXTS, st.binary(max_size=40))),
    st.builds(client_frame, st.just(BINARY), st.binary(max_size=300)),
    st.sampled_from([65_535, 65_536, LIMIT, LIMIT + 1]).map(
        lambda size: client_frame(BINARY, bytes(size))
    ),
)
OTHERS = st.one_of(
    st.sampled_from([PING, CONTINUATION, 3]).map(lambda opcode: client_frame(opcode, b"abc")),
    st.builds(
        lambda opcode, field: bytes((0x80 | opcode,)) + field + bytes(200),
        st.sampled_from([TEXT, BINARY]),
        st.sampled_from(
            [
                *(b"\x05", b"\xfe\0\x7d", b"\xfe\0\x7e", b"\xff" + bytes(7) + b"\x09"),
                *(b"\xff" + b"\xff" * 8, b"\xff\x80" + bytes(7), b"\xff\x7f" + b"\xff" * 7),
            ]
        ),
    ),
    st.binary(max_size=30),
)


@given(
    parts=st.lists(st.one_of(WHOLE, WHOLE, OTHERS), max_size=5),
    cut=st.integers(0, 12),
    most=st.integers(0, 4),
)
def test_the_same_messages_are_taken(
    pure: Any, compiled: Any, parts: list[bytes], cut: int, most: int
) -> None:
    wire = b"".join(parts)
    wire = wire[: max(0, len(wire) - cut)]
    for limit in (-1, 0, 100, LIMIT):
        for buffer in (wire, bytearray(wire)):
            theirs: tuple[list[Message], int] = pure.take_messages(buffer, limit, most)
            assert compiled.take_messages(buffer, limit, most=most) == theirs
            assert compiled.take_messages(buffer, limit) == pure.take_messages(buffer, limit)


def test_a_batch_ends_where_that_of_python_does(pure: Any, compiled: Any) -> None:
    wire = client_frame(TEXT, b"") * (frames.MAX_BATCH + 1)
    assert len(compiled.take_messages(wire, 1)[0]) == frames.MAX_BATCH
    assert compiled.take_messages(wire, 1) == pure.take_messages(wire, 1)


def test_a_buffer_can_grow_again_when_its_messages_are_taken(compiled: Any) -> None:
    buffer = bytearray(client_frame(TEXT, b"one"))
    compiled.take_messages(buffer, LIMIT)
    buffer += b"more"  # raises if somebody still looks at it


@given(payload=st.binary(max_size=300), mask=st.binary(min_size=4, max_size=4))
def test_a_mask_is_applied_alike(pure: Any, compiled: Any, payload: bytes, mask: bytes) -> None:
    kinds: list[type[Buffer]] = [bytes, bytearray]
    for kind in kinds:
        assert compiled.unmask(kind(payload), mask) == pure.unmask(payload, mask)


@given(
    before=st.binary(max_size=130),
    contents=st.lists(
        st.one_of(
            st.binary(max_size=130),
            st.sampled_from([65_400, 65_535, 65_536]).map(lambda size: b"x" * size),
        ),
        max_size=5,
    ),
    behind=st.binary(max_size=4),
    first=st.one_of(st.integers(0, 2**63 - 6), st.sampled_from([6, 97, 998])),
)
def test_frames_are_written_alike(
    pure: Any, compiled: Any, before: bytes, contents: list[bytes], behind: bytes, first: int
) -> None:
    alone = before, contents, behind
    assert compiled.text_frames(*alone) == pure.text_frames(*alone)
    numbered = before, contents, behind, first, b"}}}"
    assert compiled.text_frames(*numbered) == pure.text_frames(*numbered)


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.unmask(b"abc"),
        lambda it: it.unmask(b"abc", "mask"),
        lambda it: it.unmask(3, b"mask"),
        lambda it: it.take_messages("text", 3),
        lambda it: it.take_messages(b"", "3"),
        lambda it: it.text_frames(b"", [b""]),
        lambda it: it.text_frames(b"", (b"",), b""),
        lambda it: it.text_frames(b"", [b"", "text"], b""),
        lambda it: it.text_frames("", [b""], b""),
        lambda it: it.text_frames(b"", [b""], b"", "1", b""),
    ],
)
def test_what_is_no_argument_is_a_type_error(compiled: Any, call: Any) -> None:
    with pytest.raises(TypeError):
        call(compiled)


def test_a_mask_of_another_length_and_too_large_a_number_are_refused(compiled: Any) -> None:
    with pytest.raises(ValueError, match="four bytes"):
        compiled.unmask(b"abc", b"123")
    with pytest.raises(OverflowError):
        compiled.text_frames(b"", [b""], b"", 2**63, b"}")


# the build


def test_one_wheel_serves_all_versions_of_python_from_3_11_on(wheel: Path) -> None:
    name = wheel.name.removesuffix(".whl")
    assert name.startswith(f"trio_broker-{VERSION}-cp311-abi3-")
    assert not name.endswith("-any")


def test_nothing_is_left_in_the_source_tree(wheel: Path) -> None:
    assert not list((ROOT / "broker").rglob("*.o"))
    assert frames.BUILD == "compiled" or not list((ROOT / "broker").rglob("*.so"))


def test_the_broker_of_the_wheel_says_that_it_is_compiled_and_passes_the_tests_of_frames(
    tree: Path,
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    said = subprocess.run(
        [sys.executable, "-m", "broker", "--version"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"trio-broker, version {VERSION} (compiled)\n"
    tests = ("test_frames.py", "test_lane.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        + [str(ROOT / "tests" / "transport" / name) for name in tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_without_the_variable_a_wheel_is_for_every_machine(tmp_path: Path) -> None:
    built = build_wheel(tmp_path, CC="no-such-compiler")
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name == f"trio_broker-{VERSION}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def test_a_compiler_that_is_missing_or_fails_is_named_in_one_line(tmp_path: Path) -> None:
    missing = build_wheel(tmp_path, TRIO_BROKER_COMPILE="1", CC="no-such-compiler")
    assert missing.returncode == 1
    assert missing.stderr == (
        "TRIO_BROKER_COMPILE is set, and no-such-compiler is not installed: install a C compiler "
        "(Debian: apt-get install gcc python3-dev), or unset TRIO_BROKER_COMPILE to install without it\n"
    )
    failed = build_wheel(tmp_path, TRIO_BROKER_COMPILE="1", CC="false")
    assert failed.returncode == 1
    assert failed.stderr.startswith("TRIO_BROKER_COMPILE is set, and false failed with status 1")
    assert not list(tmp_path.iterdir())
