"""The C library's memory allocator: large arrays that come and go in every step are best kept."""
from __future__ import annotations

import ctypes


def tune_allocator() -> None:
    """Let glibc keep freed memory instead of asking the kernel for every tensor (1.0 to 1.6 times the speed on CPU)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
    except OSError:
        pass  # no glibc: nothing to tune
