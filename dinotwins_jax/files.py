"""Files that are never half-written."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as a whole: a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    # A file's name that is not UTF-8 is written with escapes rather than not at all.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)
