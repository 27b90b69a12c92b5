"""Parts of an evaluation that fail without ending it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax

from dinotwins_jax.devices.agreement import FailedTogether, agree
from dinotwins_jax.stopping import EvaluationFailed


class Evaluated(NamedTuple):
    """scores: {row: {task: scores}}, rows "teacher", "random weights", "raw pixels", "centre box";
    failed: task or file -> why there is none; unbalanced: whether the test set is."""

    scores: dict[str, dict]
    failed: dict[str, str]
    unbalanced: bool = False

    def check(self) -> None:
        """Raises EvaluationFailed if a part failed; to be called when everything is written."""
        if self.failed:
            raise EvaluationFailed(
                f"{', '.join(self.failed)} failed, all else is written: scores.json has the reasons under "
                "'failed'"
            )


@contextlib.contextmanager
def failing_alone(what: str, name: str, failed: dict[str, str]) -> Iterator[None]:
    """Context manager that turns bad data and files into a line on stderr and failed[name].

    With several processes the part has failed in all of them if it failed in one, and process 0 says so.
    """
    try:
        error = None
        try:
            yield
        except FailedTogether:
            raise
        except (ValueError, OSError) as caught:
            error = caught
        agree(error)
    except (ValueError, OSError) as error:
        if os.environ.get("DINOTWINS_DEBUG"):
            raise
        failed[name] = " ".join(str(error).split()) or type(error).__name__
        if jax.process_index() == 0:
            print(f"{what} failed: {failed[name]}", file=sys.stderr, flush=True)
