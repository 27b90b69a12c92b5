"""Entry point: python -m dinotwins_jax.main --config=configs/hybrid.py --workdir=runs/hybrid"""

import difflib
import os
import runpy
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, and a preset after a colon: configs/hybrid.py:coco",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything goes; default runs/<config>-<preset>"
)

USAGE_ERROR, NON_FINITE = 2, 3  # exit codes


def main(argv) -> int:
    """Trains the run that the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    from dinotwins_jax.metrics import NonFiniteError
    from dinotwins_jax.train import train

    logging.set_verbosity(logging.WARNING)
    try:
        train(
            _CONFIG.value, _WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)
        )
    except NonFiniteError as error:
        return fail(str(error), NON_FINITE)
    except (ValueError, OSError) as error:
        if os.environ.get("DINOTWINS_DEBUG"):
            raise
        return fail(f"{error}  (DINOTWINS_DEBUG=1 shows where)")
    return 0


def default_workdir(config_file: str) -> Path:
    """runs/hybrid-demo for configs/hybrid.py or configs/hybrid.py:demo."""
    path, _, preset = config_file.partition(":")
    return Path("runs") / f"{Path(path).stem}-{preset or 'demo'}"


def fail(message: str, code: int = USAGE_ERROR) -> int:
    """One line on stderr, no traceback."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def parse_flags(argv):
    """absl's parser, with one clear line where ml_collections gives a traceback."""
    config_file = _given_config(argv)
    if config_file and not Path(config_file.partition(":")[0]).is_file():
        sys.exit(fail(f"no such config file: {config_file.partition(':')[0]}"))
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        message = str(error).strip()
        if "Traceback" in message:  # of the config file: its last line is "ValueError: …"
            message = f"{config_file or '--config'}: {message.splitlines()[-1].partition(': ')[2]}"
        sys.exit(fail(message))
    except (AttributeError, KeyError) as error:
        sys.exit(fail(_unknown_key(argv, error)))
    except (ValueError, TypeError) as error:
        sys.exit(fail(f"--config: {error}"))
    if _CONFIG.value is None:
        sys.exit(fail("which config? e.g. --config=configs/hybrid.py"))
    return rest


def _given_config(argv) -> str | None:
    return next((a.partition("=")[2] for a in argv if a.startswith("--config=")), None)


def _unknown_key(argv, error: Exception) -> str:
    """Names the --config.… key that does not exist, and its neighbours."""
    config_file = _given_config(argv)
    given = [
        a.removeprefix("--config.").partition("=")[0] for a in argv if a.startswith("--config.")
    ]
    if config_file is None or not given:
        return f"--config: {error}"
    config = load_config(config_file)
    for key in given:
        node, parent = config, "config"
        for part in key.split("."):
            if not hasattr(node, "keys") or part not in node:
                known = sorted(node.keys()) if hasattr(node, "keys") else []
                near = difflib.get_close_matches(part, known, n=1)
                hint = (
                    f"did you mean '{near[0]}'?"
                    if near
                    else f"it has {', '.join(known) or 'no parts'}"
                )
                return f"--config.{key}: {parent} has no key '{part}'; {hint}"
            node, parent = node[part], f"{parent}.{part}"
    return f"--config: {error}"


def load_config(config_file: str):
    """The config of "path.py" or "path.py:preset", as the flag reads it."""
    path, colon, preset = config_file.partition(":")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(preset) if colon else get_config()


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
