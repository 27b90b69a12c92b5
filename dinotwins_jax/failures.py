"""Parts of an evaluation that fail without ending it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax

from dinotwins_jax.stopping import EvaluationFailed


class Evaluated(NamedTuple):
    """scores: {row: {task: scores}}, rows "teacher", "random weights", "raw pixels", "centre box";
    failed: task or file -> why there is none."""

    scores: dict[str, dict]
    failed: dict[str, str]

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

    With several processes the error goes on: the others would wait for this one.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() > 1 or os.environ.get("DINOTWINS_DEBUG"):
            raise
        failed[name] = " ".join(str(error).split()) or type(error).__name__
        print(f"{what} failed: {failed[name]}", file=sys.stderr, flush=True)
