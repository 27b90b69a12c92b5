"""Labels of images in a table: CSV with a header, or JSON lines.

Every error is one line with the file, the line, the value, and what it must be.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BETWEEN = "|"  # between several labels in a cell; ";" may be the delimiter of the file
_DELIMITERS = ",;\t"
_COLUMNS = ("path", "label", "labels", "split")


class Row(NamedTuple):
    """A line of the table, with an image and its labels."""

    line: int  # from 1
    path: str  # as written
    labels: tuple[str, ...]  # () for none
    split: str  # in lower case; "" if the table has no splits


class Table(NamedTuple):
    """All rows of a file."""

    rows: list[Row]
    several: bool  # the column is "labels": an image may have several
    has_splits: bool
    notes: list[str]  # what was passed over, for the description of the data


def read_labels(path: Path) -> Table:
    """Reads a table of labels.

    CSV (.csv, .tsv, .txt): the first line names the columns, in any order and case of letters; the
    delimiter is a comma, semicolon or tab, the one that the first line has most of. JSON lines (.jsonl): an
    object a line. The columns or keys: "path"; "label", or "labels" with several, a list in JSON and
    separated by "|" in CSV; optionally "split". Others are passed over. Text is UTF-8, with or without
    its mark, or UTF-16 with it; if it is neither, it is read as Latin-1.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, no rows, or an invalid one.
    """
    kinds = {".csv": _csv_rows, ".tsv": _csv_rows, ".txt": _csv_rows, ".jsonl": _json_rows}
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path}: labels are read from {', '.join(kinds)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file of labels {path} (data.folder.labels)") from None
    text, notes = _decoded(data)
    rows, columns, others = [], [], {}
    for line, cells in read(path, text):
        found = [name for name in _COLUMNS if name in cells]
        columns = columns or found
        if found != columns:
            raise ValueError(
                f"{path}, line {line}: it has {_listed(found)}, the first line {_listed(columns)}: all "
                "lines need the same"
            )
        rows.append(_row(f"{path}, line {line}", line, cells))
        others |= dict.fromkeys(name for name in cells if name not in _COLUMNS)
    if not rows:
        raise ValueError(f"{path}: no rows")
    if others:
        notes.append(f"columns passed over: {_listed(others)}")
    return Table(rows, "labels" in columns, "split" in columns, notes)


def _decoded(data: bytes) -> tuple[str, list[str]]:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace"), []
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return data.decode("latin-1"), ["the file of labels is not UTF-8: read as Latin-1"]


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, cells by column) of a CSV file; empty lines are left out."""
    first = text.lstrip().partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    names, before = None, 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num  # a cell in quotes may hold line breaks
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if names is None:
                names = [cell.lower() for cell in cells]
                _check_columns(f"{path}, line {line}", names)
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{path}, line {line}: {len(cells)} cells, the first line has {len(names)}"
                )
            found = dict(zip(names, cells, strict=True))
            if "labels" in found:
                found["labels"] = [part.strip() for part in found["labels"].split(BETWEEN)]
            yield line, found
    except csv.Error as error:
        raise ValueError(f"{path}, line {before + 1}: not CSV: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, values by key) of a file of JSON lines; empty lines are left out."""
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}, line {line}: it must be an object {{…}}")
        _check_columns(f"{path}, line {line}", list(found))
        yield line, found


def _check_columns(where: str, names: list[str]) -> None:
    twice = next((name for name in _COLUMNS if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{where}: two columns {twice!r}")
    if "path" not in names:
        raise ValueError(f"{where}: no 'path', only {_listed(names)}")
    if ("label" in names) == ("labels" in names):
        both = "both 'label' and 'labels'" if "label" in names else "no 'label' and no 'labels'"
        raise ValueError(f"{where}: {both}: it must have one of them, it has {_listed(names)}")


def _row(where: str, line: int, cells: dict[str, Any]) -> Row:
    path, split = cells["path"], cells.get("split", "")
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where}: path {_shown(path)}: it must be the name of a file")
    if not isinstance(split, str):
        raise ValueError(f"{where}: split {_shown(split)}: it must be a string")
    given = cells.get("labels", [cells.get("label")])
    if given is None:
        given = []
    if not isinstance(given, list):
        raise ValueError(f"{where}: labels {_shown(given)}: it must be a list")
    for label in given:
        if isinstance(label, bool) or not isinstance(label, str | int | None):
            raise ValueError(f"{where}: label {_shown(label)}: it must be a string or an integer")
    labels = dict.fromkeys(str(label) for label in given if label not in (None, ""))
    return Row(line, path, tuple(labels), split.strip().lower())


def _listed(names) -> str:
    names = [repr(str(name)[:40]) for name in names]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
