"""Early ends of a run: signals and non-finite values."""

import signal
import threading


class Halt(RuntimeError):
    """A run that ended early and can be resumed; `code` is the exit code of the commands."""

    code: int


class NonFiniteError(Halt):
    """A loss or gradient that is NaN or infinite; the message names the step and the module."""

    code = 3


class Stopped(Halt):
    """A signal stopped the run; its state is saved. 75 is the system's "try again later"."""

    code = 75


class EvaluationFailed(Halt):
    """Some tasks or pictures of an evaluation failed; all others are written."""

    code = 4


class StopSignals:
    """Context manager that turns SIGTERM (preemption) and SIGINT (Ctrl-C) into a stop after this step.

    A second signal has its default effect. With several processes, JAX's preemption service makes all
    of them stop after the same step, whichever got the signal; SIGINT keeps its default effect.
    """

    def __init__(self, processes: int = 1):
        self._processes = processes
        self._kept, self._name = {}, None

    def __enter__(self):
        if self._processes == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._kept[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._kept.items():
            signal.signal(number, handler)
        self._kept = {}

    def requested(self, step: int) -> str | None:
        """The signal's name if all processes should stop after this step; call it after every step."""
        if self._processes > 1:
            from jax.experimental import multihost_utils

            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def _note(self, number, frame):
        del frame
        self._name = signal.Signals(number).name
        self.__exit__()
