"""The native operator: built once by `tools/build_native.py`, loaded by whoever runs a native program.

A library is for one set of sources and one Paddle; it holds the kernels of every instruction set and picks at run time. So it
may be built on one machine and copied to another: $ERNIE_KQAT_HOME/native/KEY/.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import files
from ..errors import UserError
from ..home import home
from ..machine import installed

LIBRARY = "libernie_kqat.so"
OPERATOR = "ernie_kqat_classifier"
FAST = ("amx", "avx512")  # the instruction sets with which the operator is faster than the plain program
SOURCES = Path(__file__).parent
BUILD = "python tools/build_native.py"

COMMON = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
AVX512 = (*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")), "-mfma", "-mprefer-vector-width=512")
# Object file: source and flags. The kernels are compiled once for each instruction set.
CORE = {
    "assemble": ("assemble.cc", ()),
    "encoder": ("encoder.cc", ()),
    "dispatch": ("dispatch.cc", ()),
    "portable": ("kernels.cc", ("-DKERNELS=portable",)),
    "avx512": ("kernels.cc", ("-DKERNELS=avx512", *AVX512)),
    "amx": ("kernels.cc", ("-DKERNELS=amx", *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
}

_lock = threading.Lock()
_loaded = False


def library() -> Path:
    """Where the library for these sources and this Paddle is, or would be."""
    return home() / "native" / _key() / LIBRARY


def why_not() -> str:
    """Why the operator cannot be used in this process; "" if it can. Nothing is built for it."""
    path = library()
    if not path.is_file():
        return f"the native operator is not built ({BUILD})"
    try:
        isa = _isa(path)
    except OSError as error:
        return f"{path}: cannot be loaded: {error} ({BUILD} --again)"
    return "" if isa in FAST else "this CPU has no AVX-512 with VNNI, which the native operator is made for"


def load() -> None:
    """Make the operator known to Paddle, once in a process. Raises UserError where `why_not` has a reason."""
    with _lock:
        if _loaded:
            return
        reason = why_not()
        if reason:
            raise UserError(reason)
        _register()


def known() -> bool:
    """Whether the library is there, for any CPU; then its operators of training are made known to Paddle."""
    with _lock:
        try:
            if not _loaded and library().is_file():
                _isa(library())
                _register()
        except OSError:  # of another system; `why_not` says more
            return False
        return _loaded


def _register() -> None:
    global _loaded
    from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

    load_op_meta_info_and_register_op(str(library()))
    _loaded = True


def build(again: bool = False) -> Path:
    """Compile the library if it is not there yet (or `again`); some 20 seconds. Raises UserError where that is impossible."""
    path = library()
    if path.is_file() and not again:
        return path
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"{compiler}: no such compiler; the native operator needs g++ 11 or newer (CXX names another)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build.") as folder:
        paddle_flags = _paddle_flags()
        objects = {
            **CORE,
            "paddle_op": ("paddle_op.cc", paddle_flags),
            "training": ("training.cc", ("-ffp-contract=off", *paddle_flags)),
        }
        made = compile_objects(compiler, objects, Path(folder), COMMON)
        run([compiler, "-shared", *map(str, made), *_link_flags(), "-o", str(Path(folder, LIBRARY))])
        os.replace(Path(folder, LIBRARY), path)
    return path


def compile_objects(compiler: str, objects: dict, folder: Path, flags: tuple[str, ...]) -> list[Path]:
    """Compile {name: (source, flags)}, sources of this folder or any, to objects in `folder`, side by side."""
    made = [folder / f"{name}.o" for name in objects]
    commands = [
        [compiler, *flags, *own, f"-I{SOURCES}", "-c", str(SOURCES / source), "-o", str(path)]
        for path, (source, own) in zip(made, objects.values())
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, commands))
    return made


def run(command: list[str]) -> None:
    """Run the compiler; UserError with its first error if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout.strip()[-300:])
        raise UserError(
            f"{command[0]}: the native operator does not compile ({first}); it needs g++ 11 or newer (CXX names another)"
        )


def _paddle() -> Path:
    import paddle

    return Path(paddle.__file__).parent


def _paddle_flags() -> tuple[str, ...]:
    include = _paddle() / "include"
    return ("-w", "-DPADDLE_NO_PYTHON", "-DPADDLE_WITH_CUSTOM_KERNEL", f"-I{include}", f"-I{include / 'third_party'}")


def _link_flags() -> Iterator[str]:
    paddle = _paddle()
    yield from (f"-L{paddle / 'base'}", f"-Wl,-rpath,{paddle / 'base'}", "-l:libpaddle.so")
    yield "-Wl,-z,defs"  # an OpenMP function that Paddle's does not have must not come from another library in the process
    # The OpenMP that Paddle uses: it is this one's number of threads that Paddle sets for a predictor.
    if (paddle / "libs/libiomp5.so").is_file():
        yield from (f"-L{paddle / 'libs'}", f"-Wl,-rpath,{paddle / 'libs'}", "-l:libiomp5.so")
    else:
        yield "-fopenmp"


def _key() -> str:
    digest = hashlib.sha256(f"{installed('paddlepaddle')}".encode())
    for path in sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h"), SOURCES / "__init__.py"]):
        digest.update(f"{path.name} {files.sha256(path)}".encode())
    return digest.hexdigest()[:12]


def _isa(path: Path) -> str:
    import paddle  # noqa: F401  the library needs its symbols

    isa = ctypes.CDLL(str(path)).ernie_kqat_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()
