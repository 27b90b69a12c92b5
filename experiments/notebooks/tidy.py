"""Normalises notebooks for commits: one line per string, no counts and ids, so that diffs are readable.

python -m experiments.notebooks.tidy      # rewrites experiments/notebooks/*.ipynb
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tidy(text: str) -> str:
    """The JSON of a notebook without counts, cell ids and editor metadata; outputs stay."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).strip("\n")
        if not source:
            continue
        kept = {"cell_type": cell["cell_type"], "metadata": {}}
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": _outputs(cell["outputs"])}
        cells.append(kept | {"source": source.splitlines(keepends=True)})
    # 4.4 is the last format without cell ids, which editors generate at random.
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _outputs(outputs: list[dict]) -> list[dict]:
    """Outputs with texts by line; texts of one stream that follow one another are joined."""
    found = []
    for output in outputs:
        output = json.loads(json.dumps(output))
        if output["output_type"] == "stream":
            text = "".join(output["text"])
            if found and found[-1].get("name") == output["name"]:
                text = "".join(found.pop()["text"]) + text
            output["text"] = text.splitlines(keepends=True)
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                output["data"][kind] = "".join(content).splitlines(keepends=True)
        found.append(output | ({"execution_count": None} if "execution_count" in output else {}))
    return found


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        path.write_text(tidy(path.read_text()))
