"""Shared code of the commands: start-up, the flag --config and one-line errors."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dinotwins_jax.buckets import at_hand, is_remote
from dinotwins_jax.configuration import (
    UsageError,
    config_of,
    config_path,
    load_config,
    missing_key,
    shipped_names,
)
from dinotwins_jax.files import SECTIONS
from dinotwins_jax.quiet import quiet_libraries
from dinotwins_jax.stopping import Halt

COMPILED = ".compiled"  # directory beside the workdirs: the compiled programs of all their runs
# Exit codes; a Halt (3 not finite, 4 failed tasks, 75 stopped) has its own.
USAGE_ERROR, INTERRUPTED = 2, 130
OF_RUN = Path(__file__).parent / "run_config.py"  # --config=OF_RUN:WORKDIR is WORKDIR/config.json


def command(
    program: str,
    description: str,
    define: Callable[[flags.FlagValues], None],
    work: Callable[[flags.FlagValues], int],
    argv: Sequence[str] | None = None,
    *,
    takes_config: bool = True,
    config_required: bool = True,
    directories: Sequence[str] = ("workdir", "out"),
) -> int:
    """Runs a command: parses its flags, then calls work(flags).

    The flags are the command's own, so that two commands can run in one process.

    Args:
      program: how it is started, for --help, such as "python -m dinotwins_jax.main".
      description: what it does, for --help.
      define: adds the command's flags to those given; --config is among them already, if it takes one.
      argv: the arguments; None: those of this process.
      takes_config: whether there is a flag --config.
      config_required: whether it has to be given.
      directories: flags that name directories.
    Returns:
      the exit code; errors are one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    values = flags.FlagValues()
    try:
        wants_help = {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(arguments)
        arguments = [] if wants_help else arguments
        if takes_config:
            arguments = _define_config(values, program, arguments, config_required)
        define(values)
        if wants_help:
            print(_help(program, description, values))
            return 0
        _parse(values, [program, *arguments], takes_config and config_required)
        _check_directories(values, directories)
    except UsageError as error:
        return fail(str(error))
    quiet_libraries()
    with contextlib.suppress(AttributeError, ValueError):  # not a text file, as in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    return work(values)


def compiled_beside(workdir: str | os.PathLike) -> Path:
    """Where the compiled programs of a run are kept: beside its workdir; for one in a bucket, in the
    user's cache on this machine."""
    if is_remote(workdir):
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(caches) / "dinotwins_jax" / COMPILED
    return Path(workdir).expanduser().parent / COMPILED


def _define_config(
    values: flags.FlagValues, program: str, arguments: list[str], required: bool
) -> list[str]:
    """Adds the flag --config; returns the arguments with the path of the config in front."""
    arguments = _with_config_path(arguments)
    if not required:
        arguments = _with_config_of_run(arguments)
    # Of an earlier command, into which a file would be loaded.
    sys.modules.pop("config_config", None)
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a shipped config (hybrid, dino, …) or the path of one, with presets after a colon: "
        "hybrid:coco, configs/hybrid.py:coco+auto. --config.KEY=VALUE sets a key",
        flag_values=values,
        sys_argv=[program, *arguments],
    )
    return arguments


def fail(message: str, code: int = USAGE_ERROR) -> int:
    """One line on stderr, no traceback."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def exit_code(work: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Runs work(); bad input or data, Ctrl-C, and a run that halts, become one line on stderr; with
    DINOTWINS_DEBUG bad input is a traceback.

    Args:
      interrupted: the line after Ctrl-C.
    """
    try:
        work()
    except KeyboardInterrupt:
        return fail(interrupted, INTERRUPTED)
    except Halt as halt:
        return fail(str(halt), halt.code)
    except (ValueError, OSError) as error:
        if os.environ.get("DINOTWINS_DEBUG"):
            raise
        return fail(f"{error}  (DINOTWINS_DEBUG=1 shows where)")
    return 0


def _parse(values: flags.FlagValues, argv: list[str], config_required: bool) -> None:
    """Parses argv into `values`; every error is a UsageError of one line."""
    given = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), None)
    try:
        rest = values(argv)
    except flags.Error as error:
        message = str(error).strip()
        if "Traceback" in message:  # of the config file: its last line is "ValueError: …"
            message = f"{given or '--config'}: {message.splitlines()[-1].partition(': ')[2]}"
        raise UsageError(message) from None
    except (AttributeError, KeyError) as error:
        raise UsageError(_unknown_key(argv, given, error)) from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"--config: {error}") from None
    except Exception as error:  # a config file is code: a SyntaxError, an import that fails, …
        if os.environ.get("DINOTWINS_DEBUG"):
            raise
        raise UsageError(f"{given or '--config'}: {type(error).__name__}: {error}") from None
    config = values["config"].value if "config" in values else None
    _check_config(config, given)
    if rest[1:]:
        raise UsageError(f"unknown argument '{rest[1]}': options start with --")
    if config is None and config_required:
        raise UsageError(
            f"no config given: --config=hybrid:demo, or another of {', '.join(shipped_names())}"
        )


def _check_directories(values: flags.FlagValues, names: Sequence[str]) -> None:
    """Raises UsageError if a flag that names a directory is an address or a file."""
    for name in names:
        place = (values[name].value or "") if name in values else ""
        if "://" in place and not (name == "workdir" and is_remote(place)):
            other = ", or gs://BUCKET/RUN" if name == "workdir" else ""
            raise UsageError(
                f"--{name} is '{place}': it must be a directory of this machine{other}; for other storage "
                "mount it and give the folder"
            )
        if Path(place).is_file():
            raise UsageError(f"--{name} is '{place}', a file: give a directory")


def _check_config(config: object, file: str | None) -> None:
    """Raises UsageError for what is no config of a run."""
    if config is None:
        return
    if not isinstance(config, ConfigDict):
        try:
            getattr(config, "model", None)  # ml_collections' stand-in after an OSError raises it
        except OSError as error:
            raise UsageError(f"{file}: {error}") from None
        kind = type(config).__name__
        raise UsageError(f"{file}: get_config() gives a value of type {kind}, not a ConfigDict")
    missing = [name for name in SECTIONS if not isinstance(config.get(name), ConfigDict)]
    if missing:
        raise UsageError(
            f"{file}: its config has no section '{missing[0]}': start from dinotwins_jax.configs.base"
        )


def _with_config_path(arguments: list[str]) -> list[str]:
    """Moves --config=PATH, if given, in front of all other arguments."""
    found, rest, values = "", [], iter(arguments)
    for argument in values:
        name, equals, text = argument.partition("=")
        if name in ("--config", "-config"):
            found = text if equals else next(values, "")
        else:
            rest.append(argument)
    return [f"--config={config_path(found)}", *rest] if found else rest


def _with_config_of_run(arguments: list[str]) -> list[str]:
    """Adds the run's own config, WORKDIR/config.json, if only keys of a config are given."""
    names = [argument.partition("=")[0] for argument in arguments]
    keys = [name for name in names if name.startswith("--config.")]
    if not keys or "--config" in names:
        return arguments
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)  # --workdir=RUN or --workdir RUN
    found = [
        a.partition("=")[2] or after for a, after in pairs if a.partition("=")[0] == "--workdir"
    ]
    workdir = found[-1] if found else ""
    if not workdir:
        raise UsageError(f"{keys[0]} needs a run, --workdir=RUN, or a config, --config=…")
    try:
        with at_hand(workdir) as folder:
            config_of(folder, f", to change {keys[0]} of")
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    return [f"--config={OF_RUN}:{workdir}", *arguments]


def overrides_of_run(values: flags.FlagValues) -> dict[str, Any] | None:
    """The keys given without --config, which change the run's own config; None with a --config or none."""
    flag = values["config"]
    if flag.value is None or not flag.config_filename.startswith(f"{OF_RUN}:"):
        return None
    return dict(flag.override_values)


def _unknown_key(argv: list[str], config_file: str | None, error: Exception) -> str:
    """Names the --config.… key that does not exist, and its neighbours."""
    if "has no attribute 'get_config'" in str(error):
        return f"{config_file}: it has no function get_config()"
    given = [a.removeprefix("--config.").partition("=")[0] for a in argv if "--config." in a[:9]]
    if config_file is None or not given:
        return f"--config: {error}"
    config = load_config(config_file)
    for key in given:
        if missing := missing_key(config, key):
            return missing
    return f"--config: {error}"


def _help(program: str, description: str, values: flags.FlagValues) -> str:
    """The text of --help: what the command does, then its flags in the order of their definition."""
    lines = [f"usage: {program} [flags]", "", description.strip(), "", "flags:"]
    for flag in (flag for of in values.flags_by_module_dict().values() for flag in of):
        choices = "|".join(getattr(flag.parser, "enum_values", None) or [])
        value = "" if flag.boolean else f"={choices or flag.name.upper()}"
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        about = flag.help.removeprefix(f"<{choices}>: ")  # of absl, for an enum
        lines += [f"  --{flag.name}{value}", f"      {about}{default}"]
    if "config" in values:
        lines += ["", f"shipped configs: {', '.join(shipped_names())}"]
    return "\n".join(lines)
