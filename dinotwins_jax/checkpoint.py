"""Checkpoints of a run: saving, restoring and damage detection with Orbax."""

import contextlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dinotwins_jax import checkpoint_folder as folder
from dinotwins_jax.damage import (
    changed,
    check_index,
    check_shapes,
    damage,
    fingerprint,
    first_line,
    paths,
)
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.files import full_disk, no_room
from dinotwins_jax.training.state import TrainState


class CheckpointError(OSError):
    """Raised when a checkpoint cannot be written or read; the message names the intact ones."""


class _Alone(CheckpointError):
    """A CheckpointError raised in one process only; the others are unaware of it."""


class Checkpoints:
    """The checkpoints of one workdir: state and data position together, written atomically.

    A fingerprint of every array is saved with the state, so that any damage on disk is detected.
    As a context manager, it waits on exit until everything is on disk.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int = 1,
        best_metric: str = "",
        best_mode: str = "max",
        *,
        read_only: bool = False,
    ):
        """Opens the checkpoints of a workdir.

        Args:
          keep: number of latest checkpoints to keep, besides the best one by best_metric, if given.
          best_mode: whether "max" or "min" of best_metric is best.
          read_only: changes nothing on disk, as another process may be writing there.
        """
        self.path = folder.folder_of_checkpoints(workdir)
        self.damaged = self.path.parent / "damaged"
        self._best_metric, self._best_mode, self._read_only = best_metric, best_mode, read_only
        if not read_only:
            self._clean_up()
        options = {"preservation_policy": _last_and_best(keep, best_metric, best_mode)}
        options |= {"create": True, "cleanup_tmp_directories": True}
        if best_metric:
            # Makes Orbax store the metrics; the policy does the ranking.
            options["best_fn"] = lambda metrics: metrics
        options = ocp.CheckpointManagerOptions(**({"read_only": True} if read_only else options))
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def _clean_up(self) -> None:
        for part in folder.unfinished(self.path):  # Orbax removes them
            warn(f"checkpoint {part.name.split('.')[0]} in {self.path} was never finished: dropped")
        # A checkpoint is usable without its metric, but Orbax cannot start with a broken metric file.
        for file in sorted(self.path.glob("*/metrics/metrics")):
            try:
                json.loads(file.read_text())
            except (OSError, ValueError) as error:
                step = file.parts[-3]
                warn(f"the metric of checkpoint {step} in {self.path} is broken ({error}): dropped")
                if jax.process_index() == 0:
                    folder.remove_tree(file.parent)

    def save(self, state: TrainState, data_position: dict, metrics: dict | None = None) -> None:
        """Writes a checkpoint in the background; an existing one of this step is kept.

        Args:
          metrics: name -> value; only best_metric's is stored.
        Raises:
          CheckpointError: this checkpoint or the one before could not be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        value = (metrics or {}).get(self._best_metric)
        data = data_position | {"fingerprint": fingerprint(state)}
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        with self._written():
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics={} if value is None else {self._best_metric: float(value)},
            )

    def wait(self) -> None:
        """Waits until everything is on disk. Raises CheckpointError on a failed write."""
        with self._written():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the best metric; None if no checkpoint has one."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError, KeyError):
                text = (self.path / str(step) / "metrics" / "metrics").read_text()
                found[step] = json.loads(text)[self._best_metric]
        choose = max if self._best_mode == "max" else min
        return choose(found, key=found.get) if found else None

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """Restores a state with the shapes and shardings of `like`, and the data position.

        Args:
          like: arrays, or shapes with shardings.
          step: None: the latest intact one; damaged later ones are reported and moved to WORKDIR/damaged.
        Raises:
          ValueError: the state on disk has another model or optimiser.
          CheckpointError: the checkpoint is damaged, or no checkpoint is intact.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = list(reversed(self.steps())) if step is None else [step]
        for candidate in steps:
            try:
                return self._restore_one(candidate, abstract)
            except CheckpointError as error:
                if step is not None or isinstance(error, _Alone):
                    raise
                self._put_aside(candidate, str(error))
        raise CheckpointError(
            f"no intact checkpoint in {self.path}; damaged ones are in {self.damaged}; --resume=force "
            "starts from the beginning"
        )

    def restore_teacher(self, step: int | None = None) -> tuple[dict, int]:
        """Restores the teacher's backbone as numpy arrays, for any model and optimiser, and its step.

        Args:
          step: None: the latest intact one.
        Raises:
          CheckpointError: there is none, or the one of this step is damaged.
        """
        for candidate in reversed(self.steps()) if step is None else [step]:
            with damage() as found:
                metadata = self._manager.item_metadata(candidate)
                if metadata["state"] is None:
                    raise ValueError("its state is missing")
                there = metadata["state"]["teacher_params"]["backbone"]
                part = {"teacher_params": {"backbone": there}}
                how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    part = checkpointer.restore(
                        self.path / str(candidate) / "state",
                        args=ocp.args.PyTreeRestore(part, restore_args=how, partial_restore=True),
                    )
                data = json.loads((self.path / str(candidate) / "data" / "metadata").read_text())
                if differ := changed(part, data["fingerprint"]):
                    raise ValueError(f"{differ[0]} does not match its fingerprint")
                return part["teacher_params"]["backbone"], candidate
            reason = f"checkpoint {candidate} in {self.path} is damaged ({found[0]})"
            if step is not None:
                raise CheckpointError(reason)
            warn(reason)
        raise CheckpointError(f"no intact checkpoint in {self.path}")

    def _restore_one(self, step: int, abstract) -> tuple[TrainState, dict]:
        """Restores one step; damage found by any process raises CheckpointError in all of them."""
        shapes = {}
        with damage() as found:
            shapes = {
                p: tuple(x.shape) for p, x in paths(self._manager.item_metadata(step)["state"])
            }
            if not shapes:
                raise ValueError("the metadata of its arrays is missing")
            check_index(self.path / str(step) / "state")
            json.loads((self.path / str(step) / "data" / "metadata").read_text())
        if not _all_processes(not found):
            raise CheckpointError(found[0] if found else "another process cannot read it")
        check_shapes(step, shapes, {p: tuple(leaf.shape) for p, leaf in paths(abstract)})
        items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
        with damage() as found:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        if found:
            self._cannot_read(step, found[0])
        state, data = restored["state"], restored["data"]
        if differ := changed(state, data.pop("fingerprint")):
            raise CheckpointError(f"{differ[0]} does not match its fingerprint")
        return state, data

    def _cannot_read(self, step: int, reason: str):
        """Handles a read error; with several processes this one must not wait for the others."""
        if jax.process_count() == 1:
            raise CheckpointError(reason)
        self._put_aside(step, reason)
        raise _Alone(
            f"checkpoint {step} is damaged, moved to {self.damaged}: the same command goes on"
        )

    def _put_aside(self, step: int, reason: str) -> None:
        if self._read_only:
            warn(f"checkpoint {step} in {self.path} is damaged ({reason})")
            return
        warn(f"checkpoint {step} in {self.path} is damaged ({reason}): moved to {self.damaged}")
        self.damaged.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # another process may have removed it already
            folder.remove_tree(self.damaged / str(step))
            folder.move_tree(self.path / str(step), self.damaged / str(step))
        self._manager.reload()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except Exception as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> CheckpointError:
        reason = no_room(self.path, error) if full_disk(error) else first_line(error)
        if jax.process_index() == 0:
            for part in folder.unfinished(self.path):  # also frees space
                folder.remove_tree(part)
        whole = folder.finished_steps(self.path)
        left = f"the one of step {max(whole)} is intact" if whole else "there is none before it"
        return CheckpointError(
            f"a checkpoint could not be written to {self.path} ({reason}); {left}: when there is room, the "
            "same command goes on"
        )

    def close(self) -> None:
        """Waits until everything is on disk and closes. Raises CheckpointError on a failed write."""
        with self._written():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            warn(str(error))  # the error that stopped the run takes precedence


def chosen_step(checkpoints: Checkpoints, which: str) -> int | None:
    """Parses --checkpoint; None means the latest intact one."""
    if which == "latest":
        return None
    step = checkpoints.best() if which == "best" else int(which) if which.isdecimal() else None
    if step not in checkpoints.steps():
        raise ValueError(
            f"--checkpoint is '{which}': choose latest, best (of those with the metric "
            f"config.checkpoint.best_metric) or one of the steps {checkpoints.steps()}"
        )
    return step


def _last_and_best(keep: int, metric: str, mode: str):
    managers = ocp.checkpoint_managers
    policies = [managers.LatestN(keep)]
    if metric:
        worst = math.inf if mode == "min" else -math.inf
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics.get(metric, worst),
            reverse=mode == "min",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return managers.AnyPreservationPolicy(policies)


def _all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
