"""The lock of a workdir in a bucket: an object that its holder renews, and that runs out without it."""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from dinotwins_jax.buckets import LOCK, Mirror, NoBucket
from dinotwins_jax.devices.processes import warn

LEASE_S = 120.0  # seconds without renewal after which others may take the workdir
_RENEWED = 4  # times in a lease


@contextlib.contextmanager
def leased(mirror: Mirror) -> Iterator[None]:
    """Context manager that holds WORKDIR/lock in the bucket.

    It is written only if nobody else has written it since it was read (by its generation), so that of two
    starts one wins. The lease of a process that was killed runs out, at once on the machine on which it
    ran. The clocks of the machines have to agree to a fraction of the lease.

    Raises:
      ValueError: another process holds it; the message names its pid and host.
      NoBucket: the bucket cannot be reached.
    """
    holder = {
        **{"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()},
        **{"started": time.strftime("%Y-%m-%d %H:%M:%S"), "lease": uuid.uuid4().hex},
    }
    lease = _Lease(mirror, holder)
    lease.take()
    ended = threading.Event()
    renewal = threading.Thread(target=lease.keep, args=(ended,), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        lease.release()


class _Lease:
    def __init__(self, mirror: Mirror, holder: dict):
        self._mirror, self._holder = mirror, holder
        self._text = json.dumps(holder) + "\n"
        self._generation = 0  # of the object as this process has last written it

    def take(self) -> None:
        with self._mirror.speaking():
            there, generation, age = self._read()
            if there and not _is_over(there, age):
                raise self._in_use(there, age)
            try:
                self._write(generation)
            except _precondition_failed():
                there, _, age = self._read()
                if not self._is_ours(there):
                    raise self._in_use(there, age) from None

    def keep(self, ended: threading.Event) -> None:
        """Renews the lease until the end, or until another process has taken it."""
        while not ended.wait(LEASE_S / _RENEWED):
            try:
                with self._mirror.speaking():
                    try:
                        self._write(self._generation)
                    except _precondition_failed():
                        there, self._generation, _ = self._read()
                        if not self._is_ours(there):  # ours: the answer to the last write was lost
                            self._mirror.in_use_by = _name(there)
                            return
            except NoBucket as error:
                warn(f"{error}: the lock could not be renewed, it is tried again")

    def release(self) -> None:
        if self._mirror.in_use_by:
            return
        with contextlib.suppress(NoBucket, _precondition_failed()), self._mirror.speaking():
            self._mirror.remove(LOCK, if_generation_match=self._generation)

    def _read(self) -> tuple[dict, int, float]:
        """(holder, generation, seconds since it was written); ({}, 0, 0.) if there is none."""
        from google.api_core.exceptions import NotFound

        blob = self._mirror.object(LOCK)
        try:
            text = blob.download_as_bytes()
            blob.reload()
        except NotFound:
            return {}, 0, 0.0
        try:
            holder = json.loads(text)
        except ValueError:
            holder = {}
        holder = holder if isinstance(holder, dict) else {}
        age = datetime.datetime.now(datetime.UTC) - blob.updated
        return holder, blob.generation, age.total_seconds()

    def _write(self, generation: int) -> None:
        blob = self._mirror.object(LOCK)
        blob.upload_from_string(self._text, if_generation_match=generation)
        self._generation = blob.generation

    def _is_ours(self, there: dict) -> bool:
        return there.get("lease") == self._holder["lease"]

    def _in_use(self, there: dict, age: float) -> ValueError:
        return ValueError(
            f"{self._mirror.url} is in use by {_name(there)}: stop that one, or choose another --workdir; "
            f"if it was killed, its lock runs out in {max(1, round(LEASE_S - age))} s"
        )


def _is_over(holder: dict, age: float) -> bool:
    """Whether a lock may be taken: it was not renewed, or its process ran on this machine and has ended."""
    if age > LEASE_S:
        return True
    return holder.get("machine") == _machine() and not Path(f"/proc/{holder.get('pid')}").exists()


def _machine() -> str:
    """Names the processes among which a pid is unique: this start of the system, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # unknown: that of nobody


def _name(holder: dict) -> str:
    if {"pid", "host", "started"} <= holder.keys():
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    return "another process"


def _precondition_failed():
    from google.api_core.exceptions import PreconditionFailed

    return PreconditionFailed
