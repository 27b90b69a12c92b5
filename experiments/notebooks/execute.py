"""Executes the notebooks and keeps their outputs, small and free of the machine's paths.

    python -m experiments.notebooks.execute [colab_tpu …]      # all by default; minutes each

Each runs in its own kernel from a copy of this checkout, with the sizes that it has for everybody.
"""

import base64
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from experiments.notebooks.tidy import FOLDER, tidy

ROOT = FOLDER.parent.parent
WIDTH, COLOURS = 900, 128  # of pictures, in pixels and in number
LONGEST = 20_000  # characters of an output; a longer page is left out


def execute(path: Path) -> str:
    """The JSON of a notebook with the outputs of all its cells.

    Raises nbclient's CellExecutionError if one fails.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve() / "dinotwins_jax"
        leave = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, home, ignore=leave, symlinks=True)
        options = {"timeout": None, "kernel_name": "python3"}
        where = {"metadata": {"path": str(home)}}
        nbclient.NotebookClient(notebook, resources=where, **options).execute()
        texts = {str(home): "dinotwins_jax", sys.executable: "python"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                outputs = [small(dict(output), texts) for output in cell.outputs]
                cell.outputs = [nbformat.from_dict(output) for output in outputs if output]
    return tidy(nbformat.writes(notebook))


def small(output: dict, texts: dict[str, str]) -> dict | None:
    """An output with other texts for those of this machine, and small pictures; None for a long page."""

    def plain(text) -> str:
        text = "".join(text)
        for old, new in texts.items():
            text = text.replace(old, new)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)

    if output["output_type"] == "stream":
        return output | {"text": plain(output["text"])}
    if output["output_type"] not in ("display_data", "execute_result"):
        return None
    data = {}
    for kind, content in output["data"].items():
        if kind == "image/png":
            data[kind] = _small_picture("".join(content))
        elif kind.startswith("text/") and len(text := plain(content)) <= LONGEST:
            data[kind] = text
    page = "text/html" in output["data"] and "text/html" not in data
    return None if page or not data else output | {"data": data, "metadata": {}}


def _small_picture(encoded: str) -> str:
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH))
    file = io.BytesIO()
    picture.quantize(COLOURS).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            text = execute(path)
            json.loads(text)
            path.write_text(text)
            print(f"{path}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
