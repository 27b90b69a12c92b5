"""Where results of an evaluation go: the run's workdir, or WORKDIR/evals/NAME for other data or weights."""

import json
import re
from pathlib import Path

from dinotwins_jax.data import data_section, open_source, probe_section
from dinotwins_jax.evals.content import content_checksum


def results_folder(
    workdir: Path, own: dict | None, data: dict, sources: tuple, weights: str = "", name: str = ""
) -> Path:
    """The folder for scores, report and pictures.

    The run's own data are known by their content, not by their place: labels, names and sizes of the files,
    and a sample of the pictures. So data that have moved are the run's own, and other data never replace
    its scores.

    Args:
      own: the run's config, nested; None if the workdir holds no run.
      data: section of the probes' data in the config to evaluate with; sources: its (train, test).
      weights: a file or folder that is scored instead of the run's weights.
      name: chosen by the user.
    Raises:
      ValueError: the name is no name of a folder.
    """
    if name and not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"--name is '{name}': letters, digits, dots, - and + only")
    if own is None and not name:
        return workdir
    content = content_checksum(sources, data["source"])
    same = own is not None and _is_own(workdir, own, data, content)
    if same and not weights and not name:
        return workdir
    parts = [_plain(Path(weights).stem)] if weights else []
    parts += [] if same else [_data_name(data)]
    folder = workdir / "evals" / (name or "-".join(filter(None, parts)))
    taken = _recorded(folder)
    if name or taken in (None, content):
        return folder
    return folder.with_name(f"{folder.name}-{content[:8]}")


def _is_own(workdir: Path, own: dict, data: dict, content: str) -> bool:
    if _as_json(probe_section(own["data"])) == _as_json(data):
        return True
    recorded = _recorded(workdir)
    if recorded is not None:
        return recorded == content
    section = probe_section(data_section(own))
    source = section.get("source")
    if not isinstance(source, str) or (":" in source and source != data["source"]):
        return False  # code that the command line does not name
    try:
        theirs = [open_source(section, split) for split in ("train", "test")]
        return content_checksum(theirs, source) == content
    except (ValueError, OSError, KeyError, TypeError):  # moved, or of another version
        return False


def _as_json(data: dict) -> str:
    return json.dumps(data, sort_keys=True, default=str)  # where a tuple is a list, as on disk


def _recorded(folder: Path) -> str | None:
    """The checksum of the data that the scores in a folder are of; None if it is not known."""
    try:
        return json.loads((folder / "scores.json").read_text())["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _data_name(data: dict) -> str:
    """Such as "coco-wasps" for the source coco in /data/wasps."""
    place = Path(str(data["dir"] or "")).expanduser()
    return "-".join(
        filter(None, (_plain(data["source"]), _plain(place.resolve().name if data["dir"] else "")))
    )


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("._-")
