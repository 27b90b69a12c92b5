"""Correctness of docs/: links, names, keys, quoted program output."""

import ast
import json
import re
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from small_steps import step_on_crops
from test_imports import FOLDERS

from dinotwins_jax.configs import base
from dinotwins_jax.data import make_source
from dinotwins_jax.losses import make_loss
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.settings.keys import flatten
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state
from experiments.docs.configs import document

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def text_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def heading_anchors(path: Path) -> set[str]:
    """Heading anchors, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize(
    "page", [*PAGES, *NOTEBOOKS], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_links_lead_to_files_and_names(page):
    for text, target in LINK.findall(text_of(page)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in heading_anchors(path), f"{page.name}: {target}"
        if text.startswith("`") and path.suffix == ".py":  # the name of something in that file
            name = text.strip("`")
            defined = rf"^(def|class) {name}\b|^{name} = "
            assert re.search(defined, path.read_text(), re.M), f"{name} is not in {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_commands_name_modules_that_exist(page):
    for name in set(
        re.findall(r"python -m ((?:dinotwins_jax|experiments)\.[\w.]*\w)", page.read_text())
    ):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"{page.name}: {name}"


def test_every_page_and_picture_is_linked():
    text = "".join(page.read_text() for page in PAGES)
    for path in [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.md")]:
        assert f"{path.name})" in text or f"{path.name}#" in text, f"no page links {path.name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_one_address_of_the_repository():
    """pyproject.toml has it; a fork changes it there and where this test says."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    clone, page = urls["Repository"], urls["Homepage"]
    assert clone == f"{page}.git"
    slug = page.removeprefix("https://github.com/")
    badge = "https://colab.research.google.com/github/{}/blob/main/experiments/notebooks/{}"
    assert f"git+{clone}" in (ROOT / "README.md").read_text()
    assert badge.format(slug, "colab_tpu.ipynb") in (ROOT / "README.md").read_text()
    assert f"git clone {clone}" in (ROOT / "CONTRIBUTING.md").read_text()
    assert f"repository-code: {page}\n" in (ROOT / "CITATION.cff").read_text()
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        assert badge.format(slug, notebook.name) in "".join(cells[0]["source"]), notebook.name
        first = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
        assert f'\nREPOSITORY = "{clone}"\n' in first, notebook.name
        assert text_of(notebook).count("https://github.com/") == 1, notebook.name


def test_the_diagram_of_imports_is_what_is_tested():
    diagram = code_blocks(ROOT / "docs" / "architecture.md", "mermaid")[0]
    drawn = {name: set() for name in FOLDERS}
    for line in re.sub(r'\["[^"]*"\]', "", diagram).splitlines():
        start, arrow, ends = line.strip().partition(" --> ")
        if arrow and start in FOLDERS:
            drawn[start] |= set(ends.split(" & "))
    assert drawn == {
        name: {of for of in imports if of in FOLDERS} for name, imports in FOLDERS.items()
    }


def test_the_loss_of_the_contract_page_fits_the_step(tmp_path, monkeypatch):
    code = code_blocks(ROOT / "docs" / "losses.md", "python")
    (tmp_path / "centered.py").write_text(code[0])
    monkeypatch.syspath_prepend(tmp_path)
    loss, tx = make_loss({"mine": {"fn": "centered:centered", "dim": 8}}), make_optimizer()
    vit = VisionTransformer(embed_dim=24, depth=1, num_heads=2, patch_size=4, image_size=8)
    crops = {"global_crops": np.zeros((4, 2, 8, 8, 3)), "local_crops": np.zeros((4, 1, 4, 4, 3))}
    values = {"lr": 1e-3, "weight_decay": 0.0, "teacher_momentum": 0.9, "teacher_temp": 0.1}
    state = jax.eval_shape(lambda: create_state(vit, loss, tx, jax.random.key(0)))
    after, metrics = jax.eval_shape(step_on_crops(vit, loss, tx, values), state, crops)
    assert after.loss_state["mine"]["mean"].shape == (*metrics["mine/distance"].shape, 8)
    _, mine = loss.terms["mine"]
    z = {"mine": np.float32([[[1.0] * 8, [3.0] * 8]])}  # [B, V, D]
    value, kept, _ = mine.apply(mine.init(), z, z, {"axis_name": None, "step": 0})
    assert float(value) == 4.0 and np.allclose(kept["mean"], 0.3)


def test_the_hessian_vector_product_of_the_contract_page_is_one():
    (code,) = [b for b in code_blocks(ROOT / "docs" / "losses.md", "python") if "jvp" in b]
    names = {}
    exec(code, names)
    largest = [float(abs(leaf).max()) for leaf in jax.tree.leaves(names["product"])]
    assert np.isfinite(largest).all() and max(largest) > 1e-3


def test_the_page_of_all_keys_is_not_stale():
    page = (ROOT / "docs" / "configs.md").read_text()
    assert page == document(), "run: python -m experiments.docs.configs > docs/configs.md"


def test_the_page_of_all_keys_has_all_of_them():
    page = document()
    keys = flatten(base.get_config().to_dict()).keys() - {"loss"}
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    assert "| `optim.lr` | `5e-4` | ≥ 0 | for the batch of lr_scaling |" in page


def printed_texts() -> list[str]:
    """All strings of the package and the configs, with "…" for formatted values."""
    texts = []
    for path in [*(ROOT / "dinotwins_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "…") for part in node.values]
                texts.append("".join(x if isinstance(x, str) else "…" for x in parts))
    return texts


def quoted_lines() -> list[str]:
    """Lines quoted in the tables of troubleshooting.md: code of more than one word."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    return [quote for quote in re.findall(r"`([^`\n]+)`", tables) if " " in quote]


def test_quoted_lines_are_printed():
    texts, said = printed_texts(), quoted_lines()
    assert len(said) > 30
    for quote in said:
        pattern = ".*?".join(re.escape(part) for part in quote.split("…"))
        assert any(re.search(pattern, text, re.S) for text in texts), f"nothing prints: {quote}"


def test_the_source_of_ones_own_is_one(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "my_data.py" in b]
    (tmp_path / "my_data.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    train, test = (make_source("my_data:Halves", split) for split in ("train", "test"))
    assert train[0].shape == (64, 48, 3) and train[0].dtype == np.uint8
    assert train[0][:32].mean() > train[0][32:].mean() + 90 and (train[0] != test[0]).any()
    assert train.name(0) != test.name(0) and train.class_names == ("above", "below")
