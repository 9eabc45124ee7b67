"""The build, where `TRIO_BROKER_COMPILE=1` asks for it: compiled_frames.c, into a wheel or in place.

Without the variable nothing is compiled and the wheel is one for every machine. With it, a C compiler
and Python's headers are needed; the wheel is for this platform, and for CPython 3.11 and all after it. An
editable installation has the compiled module beside its source, where `git clean` knows it as ignored.
"""

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "TRIO_BROKER_COMPILE"
SOURCE = "broker/transport/compiled_frames.c"
MODULE = "broker/transport/compiled_frames.abi3.so"
STABLE_ABI = "cp311-abi3"


class CustomBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get(VARIABLE, "0") in ("", "0"):
            return
        root = Path(self.root)
        if version == "editable":
            compile_module(root / SOURCE, root / MODULE)
            return
        self._scratch = tempfile.TemporaryDirectory()
        made = Path(self._scratch.name) / "compiled_frames.abi3.so"
        compile_module(root / SOURCE, made)
        build_data["pure_python"] = False
        build_data["tag"] = f"{STABLE_ABI}-{self._platform()}"
        build_data["force_include"][str(made)] = MODULE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()

    def _platform(self) -> str:
        """As wheels name this one: hatchling knows what macOS wants to be told."""
        tag: str = self.build_config.builder.get_best_matching_tag()
        return tag.rpartition("-")[2]


def compile_module(source: Path, module: Path) -> None:
    """Compile one file of C to a module for this Python. Ends the program, with a line that says what is
    missing, if it cannot be done."""
    known = sysconfig.get_config_vars()
    include = sysconfig.get_paths()["include"]
    linker, flags = shlex.split(known["LDSHARED"]), shlex.split(known.get("CCSHARED") or "")
    linker[:1] = shlex.split(os.environ.get("CC", "")) or linker[:1]
    argv = [
        *linker,
        *flags,
        "-O3",
        "-Wall",
        "-Wextra",
        f"-I{include}",
        str(source),
        "-o",
        str(module),
    ]
    try:
        subprocess.run(argv, check=True)  # noqa: S603 - the compiler that this Python was made with
    except FileNotFoundError:
        raise SystemExit(
            f"{VARIABLE} is set, and {argv[0]} is not installed: install a C compiler (Debian: "
            f"apt-get install gcc python3-dev), or unset {VARIABLE} to install without it"
        ) from None
    except subprocess.CalledProcessError as failure:
        raise SystemExit(
            f"{VARIABLE} is set, and {argv[0]} failed with status {failure.returncode}, see above; unset "
            f"{VARIABLE} to install without the compiled part"
        ) from None
