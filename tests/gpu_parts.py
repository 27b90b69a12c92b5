"""A part of a check that does as its items say, for tests: python -m gpu_parts."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from experiments.gpu.child import serve


def prepare(item, job):
    if item.values["kind"] == "die_compiling":
        time.sleep(0.3)  # until its neighbours are in progress
        os._exit(9)
    if item.values["kind"] == "prepare_error":
        raise ValueError("this cannot be compiled\nwith a second line")


def measure(item, ready, job):
    kind = item.values["kind"]
    if kind == "error":
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    if kind == "die":
        print("Fatal: the driver is gone", file=sys.stderr, flush=True)
        os._exit(9)
    if kind == "linger":
        threading.Thread(target=time.sleep, args=(60,)).start()
    if kind == "sleep":
        print("output of a library")
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(job.out, "pids").write_text(f"{os.getpid()} {other.pid}")
        time.sleep(60)
    return {"alone": job.alone, "left": job.left(), "before": sorted(job.found["parts"])}


if __name__ == "__main__":
    serve(measure, prepare, cores=int(os.environ.get("CORES", "1")))
