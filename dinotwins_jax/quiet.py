"""What libraries print in a command: warnings of this package, and none of absl, Orbax and XLA."""

import os
import sys
from functools import partial
from logging import CRITICAL, getLogger
from pathlib import Path

from absl import flags, logging


def quiet_libraries() -> None:
    """Shows the warnings of this package, and none of absl, Orbax and XLA."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()  # absl warns of its first line before that
    if not os.environ.get(
        "DINOTWINS_DEBUG"
    ):  # what fails there is raised too, and becomes one line
        logging.get_absl_logger().addFilter(_is_not_of_orbax)
        getLogger("asyncio").setLevel(CRITICAL)  # used by Orbax only
        sys.unraisablehook = partial(_unless_a_save_ended, sys.unraisablehook)
    # XLA logs "Very slow compile?" as an error, level 2. What ends a program is fatal, level 3, or an
    # exception. Read when jax is imported, which is later.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _is_not_of_orbax(record) -> bool:
    """Orbax warns through absl, such as of each option that read_only implies."""
    return "orbax" not in Path(record.pathname).parts


def _unless_a_save_ended(show, unraisable) -> None:
    """sys.unraisablehook without what the writing threads of a failed checkpoint report, one traceback
    an array, to an event loop that has ended."""
    if str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)
