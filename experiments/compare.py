"""One table of several runs, from their scores.json: python -m experiments.compare runs/a runs/b …"""

import json
import sys
from pathlib import Path

from dinotwins_jax.evals.report import score_table


def compare(workdirs: list[Path]) -> str:
    """The teachers of all runs, and random weights and raw pixels of the first, as Markdown."""
    runs = {d.name: json.loads((d / "scores.json").read_text())["scores"] for d in workdirs}
    rows = {f"teacher of {name}": scores["teacher"] for name, scores in runs.items()}
    first = next(iter(runs.values()))
    return score_table(rows | {name: first[name] for name in ("random weights", "raw pixels")})


if __name__ == "__main__":
    missing = [d for d in sys.argv[1:] if not (Path(d) / "scores.json").is_file()]
    if missing or len(sys.argv) < 2:
        sys.exit(f"which runs? no scores.json in: {', '.join(missing) or '(none named)'}")
    print(compare([Path(d) for d in sys.argv[1:]]))
