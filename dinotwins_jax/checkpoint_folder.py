"""The folder of a run's checkpoints, a directory or a place in a bucket, and what Orbax leaves there."""

import contextlib
import shutil
from pathlib import Path

from etils import epath

from dinotwins_jax.buckets import mirror_of


def folder_of_checkpoints(workdir: Path) -> Path | epath.Path:
    """Where Orbax keeps the checkpoints of a workdir: an absolute path, or one in the bucket."""
    mirror = mirror_of(workdir)
    return (
        epath.Path(mirror.url) / "checkpoints"
        if mirror
        else Path(workdir).absolute() / "checkpoints"
    )


def finished_steps(checkpoints: Path | epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder: Orbax renames a directory when it is complete, and
    in a bucket adds an object."""
    pattern = "*" if isinstance(checkpoints, Path) else "*/commit_success.txt"
    found = (path if pattern == "*" else path.parent for path in checkpoints.glob(pattern))
    return sorted(int(path.name) for path in found if path.name.isdigit())


def unfinished(checkpoints: Path | epath.Path) -> list[Path | epath.Path]:
    """Checkpoints whose writing has not ended, or was killed."""
    if isinstance(checkpoints, Path):
        return sorted(checkpoints.glob("*.orbax-checkpoint-tmp*"))
    whole = {str(step) for step in finished_steps(checkpoints)}
    return sorted(path for path in checkpoints.glob("*") if path.name not in whole)


def remove_tree(folder: Path | epath.Path) -> None:
    """Removes a folder as far as that is possible."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        folder.rmtree(missing_ok=True)


def move_tree(folder: Path | epath.Path, to: Path | epath.Path) -> None:
    """Moves a folder; in a bucket object by object."""
    if isinstance(folder, Path):
        folder.rename(to)
        return
    import fsspec

    fsspec.filesystem("gs").mv(str(folder), str(to), recursive=True)
