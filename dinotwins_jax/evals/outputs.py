"""The files that a run leaves in its workdir, and what each of them holds."""

from pathlib import Path

PICTURES = {
    "attention": "attention of the class token in the last block",
    "segmentation": "objects found by a normalised cut of the patch features",
    "pca": "first three principal components of the patches, as colours",
    "neighbours": "nearest neighbours among the test images, by class token",
}
MAP = "map.html"
EVALUATION = {
    "report.html": "curves, scores and pictures in one page",
    "scores.json": "all scores",
    **{f"{name}.png": what for name, what in PICTURES.items()},
    MAP: "test images by features in two dimensions (t-SNE)",
}
TRAINING = {
    "metrics.jsonl": "losses, schedules, collapse diagnostics and speed by step",
    "tensorboard": "the same for tensorboard --logdir",
    "timing.json": "where the time went",
    "checkpoints": "state and data position; the same command goes on from here",
    "config.json": "the config of this run",
    "recipe.txt": "what it left open, with the reasons",
}


def pictures(workdir: Path) -> dict[str, Path]:
    """The pictures in a workdir, by name."""
    files = {name: workdir / f"{name}.png" for name in PICTURES}
    return {name: file for name, file in files.items() if file.exists()}


def listing(workdir: Path, *groups: dict[str, str]) -> str:
    """The files of EVALUATION or TRAINING that are in a workdir, a line each."""
    lines = [f"In {workdir}:"]
    for name, what in (item for group in groups for item in group.items()):
        if (workdir / name).exists():
            lines.append(f"  {name:<17} {what}")
    return "\n".join(lines)
