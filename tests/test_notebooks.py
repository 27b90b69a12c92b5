"""The notebooks run from top to bottom, each in its own kernel."""

import base64
import io
import json
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from experiments.notebooks.execute import small
from experiments.notebooks.tidy import tidy

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "notebooks"
SMALLER = {
    "batch_size": 8,
    "total_steps": 8,
    "mesh.data": 1,
    "model.embed_dim": 48,
    "views.num_local": 1,
    "data.scenes.num_train": 60,
    "data.scenes.num_test": 20,
    "data.scenes.size": 24,
    "log.every_steps": 2,
    "checkpoint.every_epochs": 7.0,  # half of the demo's epochs: after steps 4 and 8
    "evals.batch_size": 20,
    "evals.monitor_every_epochs": 14.0,
    "evals.monitor_images": 40,
    "evals.split_seeds": [0],
    "evals.label_fractions": [1.0],
    "evals.knn_k": [20],
    "evals.pictures": 2,
}


def execute(name, folder, monkeypatch, until=None, **switches):
    """Runs a notebook in `folder`, which looks like the repository; returns its text and pictures.

    Args:
      until: of the last cell to run, a part of its text; None: all cells run.
      switches: values for the first cell of code.
    """
    for part in ("configs", "dinotwins_jax", "experiments", "requirements.txt"):
        (folder / part).symlink_to(ROOT / part)
    monkeypatch.setenv("DINOTWINS_NOTEBOOK", json.dumps(SMALLER))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is what takes the time
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if until:
        (last,) = [k for k, cell in enumerate(notebook.cells) if until in cell.source]
        notebook.cells = notebook.cells[: last + 1]
    top = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for switch, value in switches.items():
        lines = top.source.splitlines()
        (row,) = [k for k, line in enumerate(lines) if line.startswith(f"{switch} = ")]
        lines[row] = f"{switch} = {value!r}"
        top.source = "\n".join(lines)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs]
    texts += [of.get(kind, "") for of in data for kind in ("text/markdown", "text/html")]
    return "".join(texts), [of["image/png"] for of in data if "image/png" in of]


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_in_one_form(path):
    assert path.read_text() == tidy(path.read_text()), "run: python -m experiments.notebooks.tidy"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_show_what_they_print_and_no_place_or_time(path):
    """A reader sees text and pictures without running anything; no path of the machine that made them."""
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    said = "".join("".join(output.get("text", "")) for output in outputs)
    shown = [output["data"] for output in outputs if "data" in output]
    assert "step " in said and any("text/markdown" in data for data in shown)
    assert any("image/png" in data for data in shown)
    said += "".join("".join(data.get("text/markdown", "")) for data in shown)
    assert not re.search(r"(?<![\w.:/])/(?!\w+ |\d)[a-z][\w.-]+/[\w.-]+", said)
    assert not re.search(r"\d\d\d\d-\d\d-\d\d|\d\d:\d\d:\d\d,", said)
    assert len(text) < 300_000


def test_outputs_are_made_small_and_lose_the_machine(tmp_path):
    picture = tmp_path / "big.png"
    Image.fromarray(np.zeros((2000, 1800, 3), np.uint8)).save(picture)
    encoded = base64.b64encode(picture.read_bytes()).decode()
    shown = {"output_type": "display_data", "metadata": {}, "data": {"image/png": encoded}}
    made = Image.open(io.BytesIO(base64.b64decode(small(shown, {})["data"]["image/png"])))
    assert made.size == (900, 1000)
    stream = {"output_type": "stream", "name": "stdout", "text": "in /x/y/z: \x1b[1mdone\x1b[0m"}
    assert small(stream, {"/x/y/z": "here"})["text"] == "in here: done"
    page = {"text/html": "<p>" * 10_000, "text/plain": "<HTML>"}
    assert small(shown | {"data": page}, {}) is None


@pytest.mark.slow
def test_a_run_is_killed_goes_on_and_is_looked_at(tmp_path, monkeypatch):
    text, pictures = execute("colab_tpu", tmp_path, monkeypatch)
    assert "went on after step 4; the log has steps 2, 4, 6, 8" in text
    assert "| teacher " in text and "| random weights " in text
    assert 'srcdoc="&lt;!doctype html' in text.lower() and len(pictures) == 1


@pytest.mark.slow
def test_a_folder_of_images_is_prepared(tmp_path, monkeypatch):
    images = tmp_path / "images" / "some"
    images.mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    here = tmp_path / "here"
    here.mkdir()
    text, _ = execute(
        "colab_tpu", here, monkeypatch, until="dinotwins_jax.prepare", IMAGES=str(images.parent)
    )
    assert "preset coco_cpu" in text
    assert (here / "runs" / "images-images" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_loss_is_swapped(tmp_path, monkeypatch):
    text, pictures = execute("swap_a_loss", tmp_path, monkeypatch)
    header = next(line for line in text.splitlines() if "mine" in line and line.startswith("|"))
    columns = [column.strip() for column in header.split("|")]
    assert columns[2:6] == ["DINO", "mine", "random weights", "raw pixels"]
    assert "| k-NN, k=20 " in text and len(pictures) == 2


@pytest.mark.slow
def test_a_trained_model_is_used(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    text, pictures = execute("use_a_model", tmp_path, monkeypatch)
    assert "cls (4, 48), patches (4, " in text and "names      <U" in text
    assert "| ridge | " in text and "normalised mutual information" in text
    assert len(pictures) == 2
    found = re.findall(r"largest difference (\S+)", text)
    assert len(found) == 2 and max(map(float, found)) < 1e-4
