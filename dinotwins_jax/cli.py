"""What the commands share: the flag --config, and errors as one line."""

import difflib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from dinotwins_jax.stops import Halt

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, and presets after a colon: configs/hybrid.py:coco, …:coco+dinov2_as_trained",
    lock_config=True,
)

COMPILED = ".compiled"  # beside the workdirs: programs of all their runs

USAGE_ERROR, INTERRUPTED = 2, 130  # exit codes; a Halt (3 not finite, 75 stopped) has its own


def fail(message: str, code: int = USAGE_ERROR) -> int:
    """One line on stderr, no traceback."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def exit_code(work: Callable[[], object]) -> int:
    """Runs work(); bad input or data, and a run that halts, become one line on stderr, with
    DINOTWINS_DEBUG a traceback."""
    try:
        work()
    except Halt as halt:
        return fail(str(halt), halt.code)
    except (ValueError, OSError) as error:
        if os.environ.get("DINOTWINS_DEBUG"):
            raise
        return fail(f"{error}  (DINOTWINS_DEBUG=1 shows where)")
    return 0


def parse_flags(argv, config_required: bool = True):
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
    if CONFIG.value is None and config_required:
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


def config_of(workdir: Path, without: str = "") -> ConfigDict:
    """The config of a run, WORKDIR/config.json; the end of the error says what to do without one."""
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run in {workdir}: it has no config.json{without}")
    return ConfigDict(json.loads(path.read_text()))


def load_config(config_file: str):
    """The config of "path.py" or "path.py:preset", as the flag reads it."""
    path, colon, preset = config_file.partition(":")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(preset) if colon else get_config()
