"""Which file of a folder holds the weights: exports, snapshots of the Hugging Face hub, single files."""

from pathlib import Path

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
# Of one model in several formats, the first of these is read; all hold the same tensors.
_NAMES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
_NAMES += ("model.bin", "model.npz", "model.pth", "model.pt")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
_NOT_WEIGHTS += ("nonfinite_step",)  # of a run


def weights_file(path: str | Path) -> Path:
    """The file of weights that `path` means.

    Args:
      path: a file, which is returned as it is; or a folder: what `export` wrote, a model of timm or of
        transformers, a snapshot of the hub or the cache folder that holds it, or any folder with one file
        of weights.
    Raises:
      FileNotFoundError: no such path, or a folder without weights; the message says what was looked for.
      ValueError: another kind of file, several files that are not one model, or one model in several parts.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"{path}: weights are one of {', '.join(SUFFIXES)}, not '{path.suffix}'"
            )
        if not path.is_file():
            raise FileNotFoundError(f"no file of weights: {path}")
        return path
    folder = _snapshot(path)
    there = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    found = [name for name in there if Path(name).suffix in SUFFIXES]
    found = [name for name in found if not name.startswith(_NOT_WEIGHTS)]
    for name in _NAMES:
        if name in found:
            return there[name]
    if parts := [name for name in there if name.endswith(".index.json")]:
        raise ValueError(
            f"{folder}: its weights are in several files ({parts[0]}): save them as one"
        )
    if len(found) > 1:
        raise ValueError(f"{folder} has several files of weights, {_some(found)}: give one of them")
    if not found:
        holds = _some([file.name for file in sorted(folder.iterdir())]) or "nothing"
        raise FileNotFoundError(
            f"no weights in {folder}: looked for {_NAMES[0]}, pytorch_model.bin or one file of "
            f"{', '.join(SUFFIXES)}; it holds {holds}"
        )
    return there[found[0]]


def _snapshot(folder: Path) -> Path:
    """The snapshot in a cache folder "models--owner--name" of the hub: that of "main", or the only one."""
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if not snapshots.is_dir():
        return folder
    if main.is_file() and (named := snapshots / main.read_text().strip()).is_dir():
        return named
    there = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(there) != 1:
        raise ValueError(f"{snapshots} has {len(there)} snapshots: give the folder of one")
    return there[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
