"""A command whose --config.key=value and --<method>.key=value are no flags."""

import sys
from collections.abc import Callable

from absl import app, flags

from dinotwins_jax.cli import fail
from experiments.comparison.plan import split_overrides


def run_with_overrides(main: Callable[[list[str], dict], int], methods=()) -> None:
    """absl's app.run of main(argv, overrides), with the overrides of `plan.split_overrides`; an argument
    that cannot be read is one line on stderr."""
    overrides: dict = {}

    def parse(argv):
        try:
            rest, found = split_overrides(argv, methods)
            overrides.update(found)
            return flags.FLAGS(rest)
        except (ValueError, flags.Error) as error:
            sys.exit(fail(str(error)))

    app.run(lambda argv: main(argv, overrides), flags_parser=parse)
