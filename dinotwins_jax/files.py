"""Files that are never half-written, and JSON that may be damaged."""

import json
from collections.abc import Callable
from pathlib import Path

SECTIONS = ("model", "views", "data", "loss", "evals", "checkpoint")  # of every config.json


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as a whole: a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    # A file's name that is not UTF-8 is written with escapes rather than not at all.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def read_config(path: Path, sections: tuple[str, ...] = SECTIONS) -> dict:
    """The config of a run, a config.json, as nested dictionaries.

    Args:
      sections: those that the caller needs.
    Raises:
      ValueError: it is no JSON object with these sections; the message names the file.
    """
    try:
        config = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no text
        raise ValueError(f"{path} is damaged ({error}): restore it or remove it") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is damaged: it holds a {type(config).__name__}, not the object of a config"
        )
    for name in sections:
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{path} is not the config of a run: it has no section '{name}'")
    return config


def read_json_lines(path: Path, warn: Callable[[str], None]) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, each with its "step"; [] if there is no file.

    Lines that are not an object of numbers with a step are left out, with one warning.
    """
    path, found, bad = Path(path), [], []
    text = path.read_text(errors="replace") if path.exists() else ""
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and "step" in row and all(map(_is_number, row.values())):
            found.append(row)
        else:
            bad.append(number)
    if bad:
        more = f" and {len(bad) - 1} more lines" if len(bad) > 1 else ""
        warn(f"{path}: line {bad[0]}{more} cannot be read: left out")
    return found


def _is_number(value) -> bool:
    return isinstance(value, int | float)
