"""Who may import whom: one direction only (the design's rooms), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dinotwins_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> what it must not import; rooms are the first part of a module's path in the package
FORBIDDEN = {
    "models": {"losses", "data", "evals", "step", "build", "train", "state", "optim", "augment"},
    "losses": {"data", "evals", "step", "build", "train", "state", "optim", "augment"},
    "data": {"models", "losses", "evals", "step", "build", "train", "state", "optim", "augment"},
    "evals": {"losses", "step", "build", "train", "state", "optim", "scoring", "subject"},
    "scoring": {"losses", "step", "train", "optim"},
    "subject": {"losses", "step", "train", "optim", "scoring"},
    "exporting": {"losses", "data", "step", "train", "optim", "scoring"},
    "balance": {"data", "evals", "build", "train", "step", "models"},
    "augment": {"models", "losses", "data", "evals", "step", "build", "train", "state"},
    "forward": {"losses", "data", "evals", "build", "train", "step", "objective", "checkpoint"},
    "objective": {"data", "evals", "build", "train", "step", "forward", "checkpoint"},
    "step": {"data", "evals", "build", "train", "checkpoint", "metrics"},
    "guard": {"data", "evals", "train", "step", "losses", "models", "optim"},
    "diagnosis": {"data", "evals", "build", "train", "checkpoint", "metrics", "optim"},
    "checkpoint": {"data", "evals", "build", "train", "step", "losses", "models"},
    "parallel": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "sharding": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "processes": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "stops": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "metrics": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "progress": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "terminal": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "trackers": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "writers": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "ranges": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "memory": {"data", "train", "step", "losses", "models", "checkpoint"},
    "compilation": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "timing": {"data", "evals", "build", "train", "step", "losses", "models", "state"},
    "start": {"data", "evals", "build", "train", "step", "losses", "optim", "augment"},
    "recipe": {"data", "evals", "build", "train", "step", "losses", "models", "state", "optim"},
    "advice": {"data", "evals", "build", "train", "step", "losses", "models", "state", "optim"},
    "state": {"data", "evals", "build", "train", "step", "augment"},
    "optim": {"data", "evals", "build", "train", "step", "losses", "models"},
    "schedules": {"data", "evals", "build", "train", "step", "losses", "models"},
}
ENTRY_POINTS = {"main", "prepare", "evaluate", "export"}


def imported(path: Path) -> set[str]:
    """Dotted names of everything that the file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    ours = {n.split(".")[1] for n in imported(path) if n.startswith("dinotwins_jax.")}
    here = room(path).split("_")[0]
    assert not ours & (FORBIDDEN.get(here, set()) - {here})
    assert not ours & ENTRY_POINTS, "nothing imports an entry point"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_imports_stay_in_their_room(path):
    top = {name.split(".")[0] for name in imported(path)}
    assert not top & {"tensorflow", "torch", "configs", "experiments"}
    if room(path) not in {"build", "ranges", "train", "evaluate", "cli"}:
        assert "ml_collections" not in top, "only build, train and the commands see the config"
    if room(path) in {"recipe", "advice"}:
        assert top <= {"collections", "typing", "math", "dinotwins_jax"}, "configs import them"
    if room(path) in {"models", "losses"}:
        assert top <= {"jax", "flax", "numpy", "dinotwins_jax", "collections", "typing", "re", "einops",
                       "importlib", "difflib", "functools", "io", "json", "math", "pathlib", "pickle",
                       "safetensors", "zipfile"}  # fmt: skip
    if room(path) == "data":
        assert "jax" not in top


def test_training_imports_nothing_that_it_may_not_use():
    """TFDS, matplotlib and other slow ones are imported where they are used."""
    code = "import sys, dinotwins_jax.main, dinotwins_jax.train; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    slow = {"tensorflow", "tensorflow_datasets", "matplotlib", "torch", "sklearn", "pandas"}
    slow |= {"tensorboardX", "wandb", "mlflow"}
    assert not slow & set(done.stdout.split())
