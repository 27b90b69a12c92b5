"""Allowed imports: one row per folder, one per level of single files, checked against the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dinotwins_jax"
LOOK = ("search", "duplicates", "clusters")
ENTRY_POINTS = ("__main__", "main", "evaluate", "prepare", "export", "embed", "probe", *LOOK)

# Folder -> the folders and files that it may import beside itself.
FOLDERS = {
    "models": (),
    "losses": ("models",),
    "training": ("models", "losses", "streams"),
    "augment": ("streams",),
    "settings": (),
    "devices": (),
    "logs": ("devices", "files", "settings"),
    "data": ("files", "logs"),
    "evals": ("models", "augment", "data", "devices", "files"),
    "features": (
        *("augment", "backbone", "buckets", "configuration", "data", "devices", "evals", "files"),
        "models",
        *("preprocessing", "quiet", "run_config", "weights"),
    ),
    "exports": ("durations", "evals", "models", "preprocessing"),
}
# Files beside the folders, floor by floor: each may import the floors below it and the folders named.
FLOORS = (
    (
        (
            "schedules",
            "durations",
            "streams",
            "files",
            "stopping",
            "quiet",
            "callable_module",
            "buckets",
        ),
        (),
    ),
    (("configuration", "checkpoint_folder", "lease"), ("devices", "settings")),
    (("damage", "failures", "lock", "provenance", "workdir"), ("devices", "settings")),
    (("checkpoint", "cli"), ("devices", "settings", "training")),
    (("run_config",), ("settings",)),
    (
        ("pretrained", "crop_sheet", "inputs"),
        ("devices", "training", "models", "augment", "data"),
    ),
    (("preprocessing",), ("models",)),
    (("backbone",), ("devices", "models")),
    (("build",), tuple(name for name in FOLDERS if name not in ("features", "exports"))),
    (("memory", "nonfinite", "weights"), ("evals", "models", "training")),
    (("drawing",), ("evals", "models")),
    (("tuning",), ("evals",)),
    (("evaluation", "results"), ("data", "devices", "evals", "logs", "models", "training")),
    (("train",), ("data", "devices", "evals", "logs", "training")),
    (
        ENTRY_POINTS,
        (
            "augment",
            "data",
            "devices",
            "evals",
            "exports",
            "features",
            "logs",
            "models",
            "training",
        ),
    ),
)
ALIASES = {"augment_presets": ("augment",), "__init__": ()}  # augment_presets: for one release


def allowed() -> dict[str, set[str]]:
    """Folder or file -> those that it may import."""
    rows, below = {name: {name, *of} for name, of in (FOLDERS | ALIASES).items()}, set()
    for files, folders in FLOORS:
        rows |= {name: {*below, *folders} for name in files}
        below |= set(files)
    return rows


def files() -> list[Path]:
    """All files of the package but its configs, which import the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path for path in paths if "configs" not in path.relative_to(PACKAGE).parts]


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


def test_every_room_has_a_row():
    assert {room(path) for path in files()} == set(allowed())


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    ours = {n.split(".")[1] for n in imported(path) if n.startswith("dinotwins_jax.")}
    ours -= {"__version__"}
    assert ours <= allowed()[room(path)]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_imports_stay_in_their_room(path):
    top = {name.split(".")[0] for name in imported(path)}
    here = room(path)
    assert not top & {"tensorflow", "torch", "configs", "experiments"}
    if here not in {"build", "settings", "train", "evaluate", "configuration", "cli", "run_config"}:
        assert "ml_collections" not in top, "only build, train and the commands see the config"
    if "DEFINE_" in path.read_text():
        assert here in {*ENTRY_POINTS, "cli"}, "only entry points read flags"
    if here in {"models", "losses"}:
        assert top <= {"jax", "flax", "numpy", "dinotwins_jax", "collections", "typing", "re", "einops",
                       "contextlib", "contextvars", "difflib", "functools", "importlib", "io", "json",
                       "math", "onnx", "pathlib", "pickle", "safetensors", "zipfile"}  # fmt: skip


NO_JAX = ("configuration", "data", "data.workers", "settings.auto", "settings.advice", "settings.ranges",
          "logs.terminal", "augment.presets", "configs.hybrid", "cli", "prepare", *LOOK)  # fmt: skip


def loaded_by(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    return set(done.stdout.split())


def test_what_needs_no_jax_imports_none():
    """Decoding processes, configs and commands start without JAX."""
    assert "jax" not in loaded_by(*(f"dinotwins_jax.{name}" for name in NO_JAX))


def test_training_imports_nothing_that_it_may_not_use():
    """TFDS, matplotlib and other slow ones are imported where they are used."""
    slow = {"tensorflow", "tensorflow_datasets", "matplotlib", "torch", "sklearn", "pandas"}
    slow |= {"tensorboardX", "wandb", "mlflow"}
    assert not slow & loaded_by("dinotwins_jax.main", "dinotwins_jax.train")


def test_no_file_is_longer_than_300_lines():
    long = {str(path): len(path.read_text().splitlines()) for path in files()}
    assert max(long.values()) <= 300, {path: n for path, n in long.items() if n > 300}
