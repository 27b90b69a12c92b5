"""Large pages for the memory of a training on a CPU; a process can have them from its start on alone.

XLA's CPU backend gets the temporaries of every step from malloc and gives them back. In pages of 4 KiB
that is 190,000 faults a step of ViT-S/16, and more misses of the address cache in every matrix product;
the step takes 1.1 times as long.
"""

import contextlib
import os
import sys
from importlib import metadata, util
from pathlib import Path

_GLIBC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # 2.35 and newer; older ones pass over it
_STARTED = "DINOTWINS_HUGE_PAGES"  # so that a loader that drops the first one is asked once
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """What to start a process with so that malloc asks for large pages; {} where that changes nothing:
    another system, an accelerator, a kernel that gives none or gives them unasked, tunables set already
    (GLIBC_TUNABLES= in the environment, empty or not: the way to do without).
    """
    if "GLIBC_TUNABLES" in os.environ or _has_accelerator() or not _KERNEL.exists():
        return {}
    return dict(_GLIBC) if "[madvise]" in _KERNEL.read_text() else {}


def restart_with_huge_pages() -> None:
    """This process anew, same command, same number, before it has done anything; at most once, and not
    where the process is a notebook's."""
    if os.environ.pop(_STARTED, None) or "IPython" in sys.modules or not sys.executable:
        return
    if wanted := environment():
        command, wanted = [sys.executable, *sys.orig_argv[1:]], wanted | {_STARTED: "1"}
        with contextlib.suppress(OSError):  # then with small pages
            os.execve(sys.executable, command, os.environ | wanted)


def _has_accelerator() -> bool:
    """A plugin of JAX is installed, used or not: to ask JAX would import it."""
    plugins = metadata.entry_points(group="jax_plugins")
    return bool(plugins) or util.find_spec("libtpu") is not None
