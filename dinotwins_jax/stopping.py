"""Early ends of a run: signals, a time limit, and non-finite values."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Halt(RuntimeError):
    """A run that ended early and can be resumed; `code` is the exit code of the commands."""

    code: int


class NonFiniteError(Halt):
    """A loss or gradient that is NaN or infinite; the message names the step and the module."""

    code = 3


class Stopped(Halt):
    """A signal or time limit stopped the run; its state is saved. 75 is the system's "try again later"."""

    code = 75


class EvaluationFailed(Halt):
    """Some tasks or pictures of an evaluation failed; all others are written."""

    code = 4


class _TimeOver(BaseException):
    """The end of a `time_limit`; no Exception, so that nothing takes it for a fault of its own."""


class StopSignals:
    """Context manager that turns SIGTERM (preemption), SIGINT (Ctrl-C) and the end of a `time_limit` into
    a stop after this step.

    A second signal has its default effect. With several processes, JAX's preemption service makes all
    of them stop after the same step, whichever got the signal; SIGINT keeps its default effect.
    """

    def __init__(self, processes: int = 1):
        self._processes = processes
        self._kept, self._name = {}, None

    def __enter__(self):
        if self._processes == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, *_limits()):
                self._kept[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, *_):
        if (
            kind is Stopped and _limits()
        ):  # the limit is honoured: it must not interrupt the clean-up
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        self._give_back(*self._kept)

    def requested(self, step: int) -> str | None:
        """The signal's name if all processes should stop after this step; call it after every step."""
        if self._processes > 1:
            from jax.experimental import multihost_utils

            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def _note(self, number, frame):
        del frame
        if number in _limits():  # the timer goes on
            self._name = self._name or "time limit"
            return
        self._name = signal.Signals(number).name
        self._give_back(signal.SIGTERM, signal.SIGINT)  # an alarm is noted until the state is saved

    def _give_back(self, *numbers) -> None:
        for number in numbers:
            if (handler := self._kept.pop(number, None)) is not None:
                signal.signal(number, handler)


@contextlib.contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Context manager that stops what runs in it after so many minutes; 0: never. For the main
    thread of a run with one process.

    A training saves its state after the step that runs, as after SIGTERM. Anything else, such as an
    evaluation, ends where it is.

    Raises:
      Stopped: from the block.
      ValueError: there are several processes, which would stop after different steps.
    """
    if not minutes:
        yield
        return
    import jax

    if jax.process_count() > 1:
        raise ValueError(
            f"a limit of {minutes:g} minutes is for one process, and there are {jax.process_count()}: "
            "let the scheduler send SIGTERM instead"
        )

    def over(number, frame):
        if not _on_its_way(sys.exception()):  # a second one would interrupt the clean-up
            raise _TimeOver

    kept = signal.signal(signal.SIGALRM, over)
    # Again every 10 s: Python drops what a handler raises while an object is being finalised.
    signal.setitimer(signal.ITIMER_REAL, 60.0 * minutes, 10.0)
    try:
        yield
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    except _TimeOver:
        raise Stopped(f"{minutes:g} minutes are over: the same command goes on") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, kept)


def _on_its_way(error: BaseException | None) -> bool:
    """Whether the end of the time is among the exceptions that are being handled."""
    while error is not None and not isinstance(error, _TimeOver):
        error = error.__context__
    return error is not None


def _limits() -> tuple[int, ...]:
    """(SIGALRM,) inside a `time_limit`; it is left alone elsewhere, and Windows has none."""
    alarm = getattr(signal, "SIGALRM", None)
    default = (signal.SIG_DFL, signal.SIG_IGN, None)
    return () if alarm is None or signal.getsignal(alarm) in default else (alarm,)
