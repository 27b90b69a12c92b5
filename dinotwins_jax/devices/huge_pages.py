"""Huge pages for CPU training; they can only be enabled when the process starts.

XLA's CPU backend allocates the temporaries of every step with malloc and frees them. With pages of 4 KiB
that costs 190,000 page faults per step of ViT-S/16 and more TLB misses in every matrix product; the
step takes 1.1 times as long.
"""

import contextlib
import os
import sys
from importlib import metadata, util
from pathlib import Path

_GLIBC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
}  # glibc 2.35 and newer; older versions ignore it
_STARTED = "DINOTWINS_HUGE_PAGES"  # marks the restart, so that there is only one
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """Environment variables that make malloc use huge pages; {} where they would have no effect: not
    Linux, an accelerator, a kernel that never or always uses them, or GLIBC_TUNABLES already set, to any
    value or to none (which turns the restart off).
    """
    if "GLIBC_TUNABLES" in os.environ or _has_accelerator() or not _KERNEL.exists():
        return {}
    return dict(_GLIBC) if "[madvise]" in _KERNEL.read_text() else {}


def restart_with_huge_pages() -> None:
    """Restarts this process with huge pages: same command, same process id, at most once, and never in
    a notebook. To be called before anything else."""
    if os.environ.pop(_STARTED, None) or "IPython" in sys.modules or not sys.executable:
        return
    if wanted := environment():
        command, wanted = [sys.executable, *sys.orig_argv[1:]], wanted | {_STARTED: "1"}
        with contextlib.suppress(OSError):  # goes on with small pages
            os.execve(sys.executable, command, os.environ | wanted)


def _has_accelerator() -> bool:
    """Whether a JAX plugin is installed, used or not; asking JAX would import it."""
    plugins = metadata.entry_points(group="jax_plugins")
    return bool(plugins) or util.find_spec("libtpu") is not None
