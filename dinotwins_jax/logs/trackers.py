"""TensorBoard, W&B and MLflow behind one interface; each library is imported when its tracker opens.

A tracker is constructed from (workdir, project, config, run_id, from_step) and has

    run_id                           identifies the run on a resume; None: not needed
    forgets                          whether it can delete lines after from_step
    package, requirement             import name, pip requirement
    log(step, values)                scalars; names keep their groups, "dino/loss"
    results(step, scores, pictures)  scalars and PNG files of the trained weights
close(finished)                  finished: completed, not stopped or failed
"""

import os
import time
from pathlib import Path

from dinotwins_jax.settings.keys import flatten


class TensorBoard:
    """Event files in WORKDIR/tensorboard.

    Events are written and flushed by the caller: tensorboardX's SummaryWriter uses a thread, whose queue
    would block training forever once a full disk has killed the thread.
    """

    package, requirement = "tensorboardX", "tensorboardX"
    forgets = True
    run_id = None

    def __init__(
        self, workdir: Path, project: str, config: dict, run_id: str | None, from_step: int
    ):
        del project, run_id
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import hparams

        folder = workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # Default names hold only second and host: a quick restart would overwrite the earlier file.
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # TensorBoard drops the events from this step on.
        self._write(from_step + 1, session_log=SessionLog(status=SessionLog.START))
        values = {k: v if isinstance(v, _PLAIN) else str(v) for k, v in flatten(config).items()}
        _, start, self._end = hparams(values, {})
        self._write(from_step, summary=start)

    def log(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(step, summary=Summary(value=scalars))

    def results(self, step: int, scores: dict[str, float], pictures: dict[str, Path]) -> None:
        from PIL import Image
        from tensorboardX.proto.summary_pb2 import Summary

        self.log(step, scores)
        for name, path in pictures.items():
            with Image.open(path) as image:
                (width, height), channels = image.size, len(image.getbands())
            picture = Summary.Image(
                height=height,
                width=width,
                colorspace=channels,
                encoded_image_string=path.read_bytes(),
            )
            self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=picture)]))

    def close(self, finished: bool) -> None:
        if finished:
            self._write(0, summary=self._end)
        self._file.close()

    def _write(self, step: int, **what) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
        self._file.flush()


_PLAIN = (str, bool, int, float, type(None))  # what TensorBoard takes as a hyperparameter


class WandB:
    """A run of W&B, configured by W&B's environment variables (WANDB_MODE, WANDB_ENTITY, …)."""

    package, requirement = "wandb", "'wandb>=0.28'"
    forgets = False

    def __init__(
        self, workdir: Path, project: str, config: dict, run_id: str | None, from_step: int
    ):
        del from_step
        import wandb

        self._run = wandb.init(
            project=project,
            id=run_id,
            resume="allow" if run_id else None,
            name=workdir.name,
            dir=str(workdir),
            config=config,
            reinit="create_new",  # not the run that a notebook has open
            allow_val_change=True,  # devices and logging may differ after a resume
            settings=wandb.Settings(
                console="off",  # do not record the live view
                finish_timeout=120.0,  # seconds; the rest stays in WORKDIR/wandb
                max_end_of_run_history_metrics=0,
                max_end_of_run_summary_metrics=0,
            ),
        )
        self.run_id = self._run.id

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def results(self, step: int, scores: dict[str, float], pictures: dict[str, Path]) -> None:
        import wandb

        self._run.summary.update(scores)
        # Without a step: W&B would drop it for a run that was finished before.
        self._run.log({name: wandb.Image(str(path)) for name, path in pictures.items()})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI, or in ./mlflow.db."""

    package, requirement = "mlflow", "'mlflow-skinny>=3.1' sqlalchemy alembic"
    forgets = False

    def __init__(
        self, workdir: Path, project: str, config: dict, run_id: str | None, from_step: int
    ):
        del from_step
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run_id:  # raises if the run no longer exists
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(project)
        )
        self.run_id = self._client.create_run(experiment_id, run_name=workdir.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in flatten(config).items()]
        for i in range(0, len(params), 100):  # 6,000 letters and 100 at once: MLflow's limits
            self._client.log_batch(self.run_id, params=params[i : i + 100])

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def results(self, step: int, scores: dict[str, float], pictures: dict[str, Path]) -> None:
        self.log(step, scores)
        for path in pictures.values():
            self._client.log_artifact(self.run_id, os.fspath(path))

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
