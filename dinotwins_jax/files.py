"""Files that are never half-written, full disks, and JSON that may be damaged."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

SECTIONS = ("model", "views", "data", "loss", "evals", "checkpoint")  # of every config.json


_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class FullDisk(OSError):
    """No room for a file; the message is one line with the path, its file system and what is kept."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns a full disk, of any library's error, into FullDisk."""
    try:
        yield
    except FullDisk:
        raise
    except Exception as error:  # OSError, safetensors' own, RuntimeError of array_record
        if full_disk(error) is None:
            raise
        raise FullDisk(
            f"{path} could not be written ({no_room(path, error)}); what was complete before is kept: "
            "when there is room, the same command goes on"
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager that writes `path` as a whole: a crash leaves the old file or the new one.

    Yields the path of a temporary file beside it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as a whole."""
    with replacing(path) as temporary:
        # A file's name that is not UTF-8 is written with escapes rather than not at all.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def full_disk(error: Exception) -> str | None:
    """The system's words if the error is of a full disk or quota, or a file above the size limit."""
    return next((words for words in _FULL if words in str(error)), None)


def no_room(path: Path, error: Exception) -> str:
    """Those words, with the file system of `path` and its free space."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    while not there.is_mount():
        there = there.parent
    return f"{full_disk(error)}: file system {there}, {free / 1e6:,.1f} MB free"


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
