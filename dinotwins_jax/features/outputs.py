"""Files that the commands search, duplicates and clusters write: sheets .png, lists .csv or .json."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from dinotwins_jax.files import replace_text

KINDS = {
    ".png": "a sheet .png",
    ".csv": "a list .csv",
    ".json": "a list .json",
    ".html": "a map .html",
}
LISTS = (".csv", ".json")


def outputs(values: Sequence[str], kinds: Sequence[str]) -> dict[str, Path]:
    """Extension -> file of the values of a flag --out.

    Raises:
      ValueError, OSError: another kind of file, two of one kind, or no such directory.
    """
    found = {}
    for value in values:
        path = Path(value).expanduser()
        if path.suffix not in kinds:
            raise ValueError(f"out is {path}: {' or '.join(KINDS[kind] for kind in kinds)}")
        if path.suffix in found:
            raise ValueError(
                f"out is given twice as {path.suffix}: {found[path.suffix]} and {path}"
            )
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"out is {path}: no such directory: {path.absolute().parent}")
        if path.is_dir():
            raise IsADirectoryError(f"out is {path}: that is a directory")
        found[path.suffix] = path
    return found


def write_lists(files: dict[str, Path], columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Writes rows to those of the files that are lists: as CSV with a header, or as JSON objects."""
    for kind in LISTS:
        if kind in files:
            replace_text(files[kind], _WRITERS[kind](columns, rows))


def _csv(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _json(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


_WRITERS = {".csv": _csv, ".json": _json}
