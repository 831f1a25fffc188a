"""Settings of the process that Paddle reads when it is loaded, so they are made before the first `import paddle`."""

import ctypes
import os
import sys
import warnings
import zlib  # noqa: F401  before paddle 2.6.2, which exports zlib symbols of its own and breaks the standard library's
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
KEEP = 2**31 - 1


def prepare() -> None:
    """Load zlib first, pick MKL's fast path on AMD, and keep freed memory. Does nothing where it does not apply."""
    # Paddle's own imports cause it, and nobody can act on it.
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")
    if "paddle" not in sys.modules:
        _fast_mkl_on_amd()
        os.environ.setdefault("GLOG_minloglevel", "1")  # not what Paddle's C++ says of its own steps, warnings yes
    _keep_freed_memory()


def _fast_mkl_on_amd() -> None:
    # Paddle 2.6's MKL (2019) takes a path without AVX2 on any CPU that is not Intel's: matmuls 2.6 times slower.
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if "AuthenticAMD" in cpu and " avx2 " in cpu and " fma " in cpu:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


def _keep_freed_memory() -> None:
    # Paddle allocates each result anew; glibc would give large blocks back and fault their pages in again every time.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, KEEP)
