"""A command whose --config.key=value and --<method>.key=value are no flags."""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping

from absl import app, flags

from dinotwins_jax.cli import fail
from dinotwins_jax.devices.huge_pages import restart_with_huge_pages
from dinotwins_jax.devices.processes import started_together
from dinotwins_jax.stopping import time_limit
from experiments.comparison.plan import split_overrides


def run_with_overrides(main: Callable[[list[str], dict], int], methods=()) -> None:
    """absl's app.run of main(argv, overrides), with the overrides of `plan.split_overrides`; an argument
    that cannot be read is one line on stderr. On a CPU the process first starts anew with huge pages."""
    restart_with_huge_pages()
    overrides: dict = {}

    def parse(argv):
        try:
            rest, found = split_overrides(argv, methods)
            overrides.update(found)
            return flags.FLAGS(rest)
        except (ValueError, flags.Error) as error:
            sys.exit(fail(str(error)))

    app.run(lambda argv: main(argv, overrides), flags_parser=parse)


def limited(
    minutes: float, environment: Mapping[str, str] = os.environ
) -> contextlib.AbstractContextManager[None]:
    """`time_limit` of a command with the flag --minutes.

    Raises ValueError where a launcher started the command as one of several processes.
    """
    if minutes and started_together(environment):
        raise ValueError(
            f"--minutes={minutes:g} is for one process, and a launcher started several: start one, or "
            "leave the time to the launcher"
        )
    return time_limit(minutes)
