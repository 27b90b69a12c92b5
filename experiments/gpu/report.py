"""The figures of a check as one JSON file, whole after every item."""

import json
import time
from pathlib import Path
from typing import Any

from dinotwins_jax.files import replace_text

FILE = "gpu_check.json"
MEASURED, FAILED, NOT_MEASURED = "measured", "failed", "not measured"


class Report:
    """DIR/gpu_check.json; an earlier one is kept under its time.

    {"started", "minutes", "size", "ended": seconds or None, "parts": {name: {"title", "budget_s",
    "seconds", "items": [{"name", "status", …}]}}}. An item that is MEASURED has its figures, one that
    FAILED a "reason" of one line, one that is NOT_MEASURED a reason and "needs_s".
    """

    def __init__(self, folder: Path, minutes: float):
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            written = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self.path.stat().st_mtime))
            self.path.replace(folder / f"gpu_check-{written}.json")
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.data = {"started": started, "minutes": minutes, "size": None, "ended": None}
        self.data["parts"] = {}
        self.write()

    def begin(self, name: str, title: str, budget: float) -> None:
        """Opens a part that may take `budget` seconds."""
        found = {"title": title, "budget_s": round(budget, 1), "seconds": None, "items": []}
        self.data["parts"][name] = found
        self.write()

    def add(self, part: str, name: str, status: str, **values: Any) -> None:
        """Adds an item to a part."""
        self.data["parts"][part]["items"].append({"name": name, "status": status} | values)
        self.write()

    def end(self, part: str, seconds: float) -> None:
        """Closes a part."""
        self.data["parts"][part]["seconds"] = round(seconds, 1)
        self.write()

    def set(self, **values: Any) -> None:
        """Sets values of the whole check."""
        self.data |= values
        self.write()

    def write(self) -> None:
        """Writes the file as a whole."""
        replace_text(self.path, json.dumps(self.data, indent=1) + "\n")


def measured(report: dict, part: str) -> dict[str, dict]:
    """{name: item} of the items of a part that were measured."""
    items = report["parts"].get(part, {}).get("items", [])
    return {item["name"]: item for item in items if item["status"] == MEASURED}
