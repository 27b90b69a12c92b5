"""A bucket on loopback for tests: gcp-storage-emulator in a process of its own."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest


@contextlib.contextmanager
def running_bucket(folder: Path):
    """Context manager that gives the environment in which gs://bucket is there, and gs://forbidden may
    not be used. Skips the test where the packages are not installed."""
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package, reason="pip install -r requirements-remote.txt")
    port = folder / "port"
    command = [sys.executable, Path(__file__).with_name("bucket_server.py"), port]
    with open(folder / "server.log", "wb") as said:  # a traceback for each reader that hangs up
        server = subprocess.Popen(command, stderr=said)
    try:
        deadline = time.monotonic() + 60
        while not port.exists():
            assert server.poll() is None and time.monotonic() < deadline, (
                "the emulator did not start"
            )
            time.sleep(0.05)
        address = f"http://127.0.0.1:{port.read_text()}"
        names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        yield dict.fromkeys(names, address) | {"GOOGLE_CLOUD_PROJECT": "none"}
    finally:
        server.kill()
        server.wait()
