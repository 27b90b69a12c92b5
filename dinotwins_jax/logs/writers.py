"""Log of a run: metrics.jsonl always, and the configured trackers."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from dinotwins_jax.devices.processes import warn
from dinotwins_jax.files import read_json_lines, replace_text, writing
from dinotwins_jax.logs.trackers import TRACKERS


def check_writers(names: tuple[str, ...]) -> None:
    """Raises ValueError for a tracker that is not installed, with the command that installs it."""
    for name in names:
        if name not in TRACKERS:
            continue  # jsonl; ranges.py has rejected unknown names
        package, requirement = TRACKERS[name].package, TRACKERS[name].requirement
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # no origin: a folder of that name, such as ./wandb
            raise ValueError(
                f"config.log.writers has '{name}', which is not installed: pip install {requirement}"
            )


class Log:
    """metrics.jsonl, and the same scalars in every tracker.

    After a resume a tracker continues its earlier run. One that fails is reported once and dropped;
    at the next start it gets what it lacks from metrics.jsonl.

    TensorBoard drops the lines after the checkpoint, as metrics.jsonl does. W&B and MLflow cannot drop
    lines: they keep theirs, and what a resumed run computes again (the same numbers) is not sent again.
    """

    def __init__(self, workdir: Path, names: tuple[str, ...], project: str, config: dict):
        """
        Args:
          names: of TRACKERS, and "jsonl", which is always on.
          project: of W&B, and the name of MLflow's experiment.
          config: of the run, nested.
        """
        self._workdir, self._project, self._config = Path(workdir), project, config
        self._names = [name for name in names if name in TRACKERS]
        self._trackers = {}
        self._runs = {}  # tracker -> [its run id, last step sent]
        self._runs_file = self._workdir / "trackers.json"

    def start(self, from_step: int) -> None:
        """Drops lines after `from_step`, opens the trackers and sends what they lack."""
        self._lines = JsonLines(self._workdir / "metrics.jsonl", from_step)
        if from_step and self._runs_file.exists():  # from step 0 it is a new run
            self._runs = _read_runs(self._runs_file)
        for name in self._names:
            run_id, sent = self._runs.get(name, (None, 0))
            with self._harmless(name):
                tracker = TRACKERS[name](
                    self._workdir, self._project, self._config, run_id, from_step
                )
                self._trackers[name] = tracker
                sent = min(sent, from_step) if tracker.forgets else sent
                self._runs[name] = [tracker.run_id, sent]
                for line in self._lines.read():
                    self._send(name, line.pop("step"), line)
        self._remember()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._lines.write(step, values)
        self._each(lambda name: self._send(name, step, values))
        self._remember()

    def results(self, step: int, scores: dict[str, float], pictures: dict[str, Path]) -> None:
        """Sends scores and pictures of the trained weights to the trackers."""
        self._each(lambda name: self._trackers[name].results(step, scores, pictures))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, *_) -> None:
        self._each(lambda name: self._trackers[name].close(finished=kind is None))

    def _send(self, name: str, step: int, values: dict[str, float]) -> None:
        if step > self._runs[name][1]:
            self._trackers[name].log(step, values)
            self._runs[name][1] = step

    def _each(self, call: Callable[[str], None]) -> None:
        for name in list(self._trackers):
            with self._harmless(name):
                call(name)

    @contextlib.contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any library or network error: the run goes on
            self._trackers.pop(name, None)
            said = str(error).strip().partition("\n")[0]
            warn(
                f"{name} failed ({type(error).__name__}: {said}): the run goes on without it, its next "
                "start sends what is missing"
            )

    def _remember(self) -> None:
        if self._runs:
            replace_text(self._runs_file, json.dumps(self._runs))


def _read_runs(path: Path) -> dict:
    """Content of a trackers.json; {}, with a warning, if it is damaged."""
    try:
        found = json.loads(path.read_text())
        if all(len(of) == 2 and isinstance(of[1], int) for of in found.values()):
            return found
    except (ValueError, AttributeError, TypeError):
        pass
    warn(f"{path} is damaged: the trackers start new runs")
    return {}


class JsonLines:
    """Appends one JSON object per line; a resumed run drops the lines after its checkpoint, damaged
    ones, and of a step that stands there twice all but the last."""

    def __init__(self, path: Path, from_step: int):
        self._path = Path(path)
        if self._path.exists():
            by_step = {row["step"]: row for row in self.read() if row["step"] <= from_step}
            kept = [json.dumps(by_step[step]) + "\n" for step in sorted(by_step)]
            replace_text(self._path, "".join(kept))

    def write(self, step: int, values: dict) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def read(self) -> list[dict]:
        """All whole lines, each with its "step"."""
        return read_json_lines(self._path, warn)
