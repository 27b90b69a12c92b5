"""Files that are never half-written."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as a whole: a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
