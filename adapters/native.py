"""C code for a CPU, compiled on the machine where it runs, the first time that it is needed."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

# No -ffast-math: loading a library linked with it rounds small numbers to zero in the whole
# process. Nothing reads errno or the flags of exceptions, which keep loops from being vectors.
FLAGS = (
    *("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC"),
)


def processor() -> str:
    """Return the processor's features that -march=native depends on. Machines with different
    processors may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.node()}"
    keys = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(keys)}))


def library(source: Path) -> ctypes.CDLL | None:
    """Return a C file, compiled for this machine, or None if no compiler here compiles it.

    Compiling takes a second; the library is cached. The compiler is $CC, cc, gcc or clang. The
    cache is $GRAFT_CACHE, else graft in the user's cache folder.
    """
    installed = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    compiler = shlex.split(os.environ.get("CC", "")) or [path for path in installed if path][:1]
    if not compiler:
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"
    folder = Path(os.environ.get("GRAFT_CACHE") or default) / "native"
    identity = repr((source.read_bytes(), compiler, FLAGS, processor())).encode()
    built = folder / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    try:
        if not built.exists():
            _compile(compiler, source, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("%s is not used: %s %s", source.name, error, getattr(error, "stderr", b""))
        return None


def _compile(compiler: list[str], source: Path, built: Path) -> None:
    """Compile in a temporary folder next to `built`, so that a killed process leaves no incomplete
    library. The compiler's temporary files go there too."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as temporary:
        command = [*compiler, *FLAGS, str(source), "-o", f"{temporary}/built.so", "-lm"]
        environment = os.environ | {"TMPDIR": temporary}
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)
        os.replace(f"{temporary}/built.so", built)
