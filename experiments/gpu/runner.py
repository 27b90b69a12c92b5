"""Parent side: a part in a process of its own, until its items are measured or its time is over."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.gpu.budget import needs
from experiments.gpu.plan import Item, Part
from experiments.gpu.reason import of_log
from experiments.gpu.report import FAILED, MEASURED, NOT_MEASURED, Report

ROOT = Path(__file__).parent.parent.parent


def run_part(
    part: Part,
    seconds: float,
    report: Report,
    *,
    toy: bool = False,
    data: str = "",
    environment: Mapping[str, str] | None = None,
) -> None:
    """Measures a part; every item of it is in the report afterwards.

    A process that dies costs the item that it worked on. Where it worked on several at once, another one
    measures them one by one.
    """
    start, out = time.monotonic(), report.path.parent.absolute()
    report.begin(part.name, part.title, seconds)
    work = _Work(part, report, start + seconds)
    log = out / "logs" / f"{part.name}.txt"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    alone, environment = False, os.environ | dict(environment or {})
    while work.waiting and work.left() > 0:
        job = {"items": list(work.waiting.values()), "end": work.end, "alone": alone}
        job |= {"toy": toy, "data": data, "out": str(out), "log": str(log), "found": report.data}
        with child(part.module, job, log, environment) as (process, lines):
            death = work.follow(process, lines)
        if death is None:
            break
        reason = f"its process ended with {death}: {of_log(log)}"
        if not work.running or (alone and len(work.running) > 1):
            work.fail(list(work.waiting), reason)
        elif len(work.running) == 1:
            work.fail(work.running, reason)
        else:
            alone = True
    work.leave()
    report.end(part.name, time.monotonic() - start)


class _Work:
    """Items of a part that wait, and those in progress."""

    def __init__(self, part: Part, report: Report, end: float):
        self.part, self.report, self.end = part, report, end
        self.waiting: dict[str, Item] = {item.name: item for item in part.items}
        self.running: list[str] = []  # names
        self._done, self._since = [], time.monotonic()

    def left(self) -> float:
        return self.end - time.monotonic()

    def follow(self, process, lines: queue.Queue) -> str | None:
        """Reads what a process reports until it has no more to do or the time is over; else returns how it
        died."""
        self.running = []
        while True:
            try:
                line = lines.get(timeout=max(self.left(), 0.0))
            except queue.Empty:
                return None
            if line is None:
                return _named(process.wait())
            told = _told(line)
            if "ended" in told:
                return None
            self._take(told)

    def _take(self, told: dict) -> None:
        if "working" in told:
            self.running, self._since = list(told["working"]), time.monotonic()
        elif told.get("item") in self.waiting:
            name, seconds = told["item"], told["seconds"]
            if "reason" in told:
                self.fail([name], told["reason"], seconds=seconds)
                return
            if self.waiting[name].paces:
                self._done.append((self.waiting[name].seconds, seconds))
            self._close(name, MEASURED, seconds=seconds, **told["figures"])

    def _close(self, name: str, status: str, **values) -> None:
        del self.waiting[name]
        self.running = [other for other in self.running if other != name]
        self.report.add(self.part.name, name, status, **values)

    def fail(self, names: list[str], reason: str, **values) -> None:
        for name in list(names):
            self._close(name, FAILED, reason=reason, **values)

    def leave(self) -> None:
        """Reports what the time did not suffice for."""
        for name, item in list(self.waiting.items()):
            needed = needs(item.seconds, self._done)
            reason = "no time left"
            if name in self.running:
                taken = time.monotonic() - self._since
                needed, reason = max(needed, taken), f"cut off after {taken:.0f} s"
            self._close(name, NOT_MEASURED, reason=reason, needs_s=round(needed, 1))


@contextlib.contextmanager
def child(module: str, job: dict, log: Path, environment: Mapping) -> Iterator[tuple]:
    """Starts a part's process and yields it with the queue of its lines, None at the end; ends it, and
    what it started, on leaving."""
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    lines: queue.Queue = queue.Queue()
    reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        yield process, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _pump(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _told(line: str) -> dict:
    """What a line says; {}: it is a library's, printed before its output was redirected."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
