"""The lock of a workdir: one training at a time."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from dinotwins_jax.buckets import mirror_of
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.files import writing
from dinotwins_jax.lease import leased


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Context manager that holds WORKDIR/lock, in process 0 only.

    The lock is the kernel's, on the open file, so that it ends with its process however that ends, and a
    killed run blocks nothing; NFS passes it on to other hosts. The file's content only says who holds it,
    and the file stays: removing it would let two processes lock two files of that name. Child processes
    do not inherit the lock. Where the file system has no locks there is one warning and no protection. In
    a bucket it is an object that runs out, see lease.py.

    Raises:
      ValueError: another process holds it; the message names its pid and host.
    """
    if jax.process_index():
        yield
        return
    if mirror := mirror_of(workdir):
        with leased(mirror):
            yield
            mirror.upload()  # while it is this process' own
        return
    path = Path(workdir) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, by the system
            raise ValueError(
                f"{workdir} is in use by {_holder(file)}: stop that one, or choose another --workdir"
            ) from None
        except OSError as error:
            warn(f"{path} cannot be locked ({error}): do not start another run in {workdir}")
        else:
            os.ftruncate(file, 0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
            with writing(path):
                os.pwrite(file, (json.dumps(holder) + "\n").encode(), 0)
        yield
    finally:
        os.close(file)  # unlocks


def _holder(file: int) -> str:
    """Who holds the lock, by the content of its file."""
    try:
        said = json.loads(os.pread(file, 4096, 0))
        return f"process {said['pid']} on {said['host']} since {said['started']}"
    except (ValueError, TypeError, KeyError):  # it has only just opened the file
        return "another process"
