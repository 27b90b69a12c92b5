"""Correctness of docs/: links, names, keys, quoted program output."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

from configs import base
from dinotwins_jax.data import make_source
from dinotwins_jax.settings.keys import flatten
from experiments.docs.configs import document

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
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


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", *NOTEBOOKS], ids=lambda path: path.name
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


def test_the_page_of_all_keys_is_not_stale():
    page = (ROOT / "docs" / "configs.md").read_text()
    assert page == document(), "run: python -m experiments.docs.configs > docs/configs.md"


def test_the_page_of_all_keys_has_all_of_them():
    page = document()
    keys = flatten(base.get_config().to_dict()).keys() - {"loss"}
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    assert (
        "| `optim.lr` | `5e-4` | ≥ 0 | for a batch of 256; scaled linearly with batch_size |"
        in page
    )


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
