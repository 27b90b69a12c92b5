"""Shared code of the commands: start-up, the flag --config and one-line errors."""

import contextlib
import copy
import difflib
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from logging import WARNING
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from dinotwins_jax.files import read_config
from dinotwins_jax.stopping import Halt

COMPILED = ".compiled"  # directory beside the workdirs: the compiled programs of all their runs
# Exit codes; a Halt (3 not finite, 4 failed tasks, 75 stopped) has its own.
USAGE_ERROR, INTERRUPTED = 2, 130
SHIPPED = Path(__file__).parent / "configs"  # in a checkout a link to ../configs


def command(
    program: str,
    description: str,
    define: Callable[[flags.FlagValues], None],
    work: Callable[[flags.FlagValues], int],
    argv: Sequence[str] | None = None,
    *,
    config_required: bool = True,
) -> int:
    """Runs a command: parses its flags, then calls work(flags).

    The flags are the command's own, so that two commands can run in one process.

    Args:
      program: how it is started, for --help, such as "python -m dinotwins_jax.main".
      description: what it does, for --help.
      define: adds the command's flags to those given; --config is among them already.
      argv: the arguments; None: those of this process.
      config_required: whether --config has to be given.
    Returns:
      the exit code; errors are one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    values = flags.FlagValues()
    try:
        wants_help = {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(arguments)
        arguments = [] if wants_help else _with_config_path(arguments)
        config_flags.DEFINE_config_file(
            "config",
            None,
            "a shipped config (hybrid, dino, …) or the path of one, with presets after a colon: "
            "hybrid:coco, configs/hybrid.py:coco+auto. --config.KEY=VALUE sets a key",
            flag_values=values,
            sys_argv=[program, *arguments],
        )
        define(values)
        if wants_help:
            print(_help(program, description, values))
            return 0
        _parse(values, [program, *arguments], config_required)
    except UsageError as error:
        return fail(str(error))
    _quiet_libraries()
    with contextlib.suppress(AttributeError, ValueError):  # not a text file, as in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    return work(values)


def _quiet_libraries() -> None:
    """Shows the warnings of this package, and none of absl, Orbax and XLA."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()  # absl warns of its first line before that
    quiet_orbax()
    # XLA logs "Very slow compile?" as an error, level 2. What ends a program is fatal, level 3, or an
    # exception. Read when jax is imported, which is later.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_orbax() -> None:
    """Leaves out Orbax's warnings, such as of each option that read_only implies."""
    logging.get_absl_logger().addFilter(_is_no_orbax_warning)


def _is_no_orbax_warning(record) -> bool:
    return record.levelno > WARNING or "orbax" not in Path(record.pathname).parts


class UsageError(ValueError):
    """Arguments that a command does not understand; the message is one line."""


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
    if rest[1:]:
        raise UsageError(f"unknown argument '{rest[1]}': options start with --")
    if values["config"].value is None and config_required:
        raise UsageError(
            f"no config given: --config=hybrid:demo, or another of {', '.join(_shipped())}"
        )
    for name in ("workdir", "out"):
        if name in values and "://" in (values[name].value or ""):
            raise UsageError(
                f"--{name} is '{values[name].value}': it must be a directory of this machine, such as a "
                "mount of that storage"
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


def config_path(text: str) -> str:
    """The path of a config, with its presets: "hybrid:coco" -> "…/configs/hybrid.py:coco".

    Raises:
      UsageError: there is no such file and no shipped config of that name.
    """
    name, colon, presets = text.partition(":")
    if Path(name).is_file():
        return text
    shipped = _shipped()
    if name in shipped:
        return f"{SHIPPED / name}.py{colon}{presets}"
    near = difflib.get_close_matches(Path(name).stem, shipped, n=1)
    hint = f"did you mean --config={near[0]}{colon}{presets}?" if near else "give a path, or one of"
    names = "" if near else f" {', '.join(shipped)}"
    raise UsageError(f"no such config file: {name}; {hint}{names}")


def config_name(path: str) -> str:
    """The shortest text that names a config: "hybrid:coco" for a shipped one, else its path."""
    file, colon, presets = path.partition(":")
    return f"{Path(file).stem}{colon}{presets}" if Path(file).parent == SHIPPED else path


def _shipped() -> list[str]:
    """The names of the shipped configs."""
    helpers = {"__init__", "base", "presets"}
    return sorted({path.stem for path in SHIPPED.glob("*.py")} - helpers)


def _unknown_key(argv: list[str], config_file: str | None, error: Exception) -> str:
    """Names the --config.… key that does not exist, and its neighbours."""
    given = [a.removeprefix("--config.").partition("=")[0] for a in argv if "--config." in a[:9]]
    if config_file is None or not given:
        return f"--config: {error}"
    config = load_config(config_file)
    for key in given:
        if missing := _missing_key(config, key):
            return missing
    return f"--config: {error}"


def _missing_key(config: ConfigDict, key: str) -> str:
    """Says which part of a key "a.b" the config lacks, and the nearest that it has; "" if it has it."""
    node, parent = config, "config"
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            known = sorted(node.keys()) if hasattr(node, "keys") else []
            near = difflib.get_close_matches(part, known, n=1)
            hint = (
                f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'no parts'}"
            )
            return f"--config.{key}: {parent} has no key '{part}'; {hint}"
        node, parent = node[part], f"{parent}.{part}"
    return ""


def named_config(config: ConfigDict | str, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config, or of a shipped one or a file by its name, with the values of some keys.

    Raises:
      UsageError: no such config or key, or a value of another type.
    """
    if isinstance(config, str | os.PathLike):
        config = load_config(config_path(os.fspath(config)))
    config = copy.deepcopy(config)
    for key, value in overrides.items():
        if missing := _missing_key(config, key):
            raise UsageError(missing.removeprefix("--"))
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UsageError(f"config.{key} is {value!r}: {' '.join(str(error).split())}") from None
    return config


def _help(program: str, description: str, values: flags.FlagValues) -> str:
    """The text of --help: what the command does, then its flags in the order of their definition."""
    lines = [f"usage: {program} [flags]", "", description.strip(), "", "flags:"]
    for flag in (flag for of in values.flags_by_module_dict().values() for flag in of):
        choices = "|".join(getattr(flag.parser, "enum_values", None) or [])
        value = "" if flag.boolean else f"={choices or flag.name.upper()}"
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        about = flag.help.removeprefix(f"<{choices}>: ")  # of absl, for an enum
        lines += [f"  --{flag.name}{value}", f"      {about}{default}"]
    return "\n".join([*lines, "", f"shipped configs: {', '.join(_shipped())}"])


def config_of(workdir: Path, without: str = "", *, opens_data: bool = False) -> ConfigDict:
    """The config of a run, WORKDIR/config.json, which may come from somebody else.

    Args:
      without: end of the error message where there is none.
      opens_data: whether the caller opens the data: a source that is code, "module:factory", is refused.
    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or its data source is code.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run in {workdir}: it has no config.json{without}")
    config = read_config(path)
    source = config["data"].get("source")
    if opens_data and (not isinstance(source, str) or ":" in source):
        raise ValueError(
            f"{path} names code as its data source, '{source}', which is run only if the command line "
            f"names it: give the run's --config=… with --config.data.source={source}"
        )
    return ConfigDict(config)


def load_config(config_file: str) -> ConfigDict:
    """The config of "path.py" or "path.py:preset", as the flag reads it."""
    path, colon, preset = config_file.partition(":")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(preset) if colon else get_config()
