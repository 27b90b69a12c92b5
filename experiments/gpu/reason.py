"""Why something failed, in one line."""

import re
from pathlib import Path

_LONGEST = 300  # characters
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b|^(error|fatal)\b|^[FE]\d{4} ", re.I)


def of_error(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:_LONGEST]


def of_log(path: Path) -> str:
    """The last line of a process' output that tells of an error, else the last one."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if _ERROR.search(line)]
    return (told or lines or ["no output"])[-1][:_LONGEST]
