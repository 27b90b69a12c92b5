"""Builds a run from its config, restores, runs the loop, evaluates."""

import contextlib
import json
import os
import time
from collections import deque
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dinotwins_jax.build import Run, build
from dinotwins_jax.callable_module import call_as_function
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.cli import COMPILED
from dinotwins_jax.configuration import named_config
from dinotwins_jax.data import has_probe_data
from dinotwins_jax.data.describe import describe_run
from dinotwins_jax.data.pipeline import BadImageLog, train_batches
from dinotwins_jax.devices.compilation import remember_compilations
from dinotwins_jax.devices.processes import only_first_writes, warn
from dinotwins_jax.evals.monitor import make_monitor
from dinotwins_jax.evals.outputs import EVALUATION, TRAINING, listing, pictures
from dinotwins_jax.evals.table import figures, terminal_table
from dinotwins_jax.evaluation import eval_view, evaluate, what_is_served
from dinotwins_jax.failures import Evaluated
from dinotwins_jax.files import replace_text
from dinotwins_jax.lock import locked
from dinotwins_jax.logs.metrics import CollapseWatch, Interval
from dinotwins_jax.logs.progress import Progress
from dinotwins_jax.logs.timing import Phases
from dinotwins_jax.logs.writers import Log, check_writers
from dinotwins_jax.nonfinite import check_finite, check_row, debugging_nans
from dinotwins_jax.pretrained import start_from
from dinotwins_jax.quiet import quiet_orbax
from dinotwins_jax.stopping import Stopped, StopSignals
from dinotwins_jax.training.state import TrainState
from dinotwins_jax.weights import EvalWeights
from dinotwins_jax.workdir import claim_workdir, has_checkpoints, with_known_values


def api(
    config: ConfigDict | str, workdir: str | os.PathLike, *, resume: str = "auto", **overrides
) -> dict:
    """Trains and evaluates a run: `dinotwins_jax.train`.

    Args:
      config: "hybrid:demo", a shipped config with presets; the path of one; or a ConfigDict.
      workdir, resume: as of `train`.
      overrides: values of config keys, as **{"optim.lr": 1e-3}.
    Returns:
      the scores, as of `train`.
    Raises:
      ValueError, OSError: as `train`; no such config or key, or a value of another type.
    """
    quiet_orbax()
    workdir = Path(workdir).expanduser()
    remember_compilations(workdir.parent / COMPILED)
    return train(named_config(config, overrides), workdir, resume=resume)


def train(
    config: ConfigDict,
    workdir: str | Path,
    cache: Path | None = None,
    resume: str = "auto",
    phases: Phases | None = None,
) -> dict:
    """Pretrains, evaluates, and leaves everything in `workdir`.

    A second call with the same config goes on from the last checkpoint.

    Args:
      cache: of evaluation, see `evaluation.evaluate`.
      resume: "auto" refuses to go on with another config; "force" goes on all the same.
      phases: gets the seconds of each part of the run, also written to WORKDIR/timing.json.
    Returns:
      the scores, as in WORKDIR/scores.json ({} when the data has no labels).
    Raises:
      ValueError, OSError: bad config or data, a full disk; the message is one line.
      NonFiniteError: no finite loss and gradient any more; the last good checkpoint stays.
      Stopped: SIGTERM or SIGINT; the state is saved.
      EvaluationFailed: tasks or pictures failed; the training and all others are complete.
    """
    phases = phases or Phases()
    if resume not in ("auto", "force"):
        raise ValueError(f"--resume is '{resume}': choose auto or force")
    with phases("build"):
        run = build(with_known_values(config, Path(workdir)))
        config = run.config
        check_writers(config.log.writers)
        monitor = _monitor(run, config)
    workdir = Path(workdir)
    force = resume == "force"
    with phases("initial state"):
        fresh = run.trained_backbone is not None and not has_checkpoints(workdir)
        backbone = run.trained_backbone() if fresh else None
    with locked(workdir):
        claim_workdir(workdir, config.to_dict(), force)
        for line in run.advice:
            warn(line)
        found = _claimed(run, config, workdir, cache, force, phases, monitor, backbone)
    found.check()
    return found.scores


def _claimed(
    run: Run, config, workdir: Path, cache, force: bool, phases: Phases, monitor, backbone
) -> Evaluated:
    """Trains and evaluates in a workdir that is this run's alone."""
    trackers = config.log.writers if jax.process_index() == 0 else ()
    with (
        only_first_writes(workdir) as out,
        Log(out, trackers, config.log.project, config.to_dict()) as log,
    ):
        apart = has_probe_data(config.data)
        found = describe_run(run.source, run.probe_sources, apart, run.look)
        print("\n".join(found + what_is_served(run, config, config.evals.tasks).lines))
        if run.recipe:
            print("\n".join(run.recipe))
            replace_text(out / "recipe.txt", "\n".join(run.recipe) + "\n")
        state = fit(run, config, workdir, log, monitor, force, phases, backbone)
        with phases("evaluation"):
            teacher = run.placement.whole(state.teacher_params["backbone"])
            weights = EvalWeights(teacher, run.random_backbone(), int(state.step))
            found = evaluate(run, config, weights, out, config.evals.tasks, cache)
        log.results(int(state.step), figures(found.scores), pictures(out))
        if table := terminal_table(found.scores, balanced=found.unbalanced):
            print(table)
        replace_text(out / "timing.json", json.dumps(phases.seconds | {"total": phases.total()}))
        print(phases.text())
        print(listing(out, EVALUATION, TRAINING))
    return found


def fit(
    run: Run,
    config: ConfigDict,
    workdir: Path,
    log: Log,
    monitor=None,
    force: bool = False,
    phases: Phases | None = None,
    backbone=None,
) -> TrainState:
    """The training loop: restore, step, log, save.

    Args:
      workdir: where all processes keep their checkpoints.
      log: of this process; not started.
      monitor: see evals/monitor.py; None: no monitoring.
      force: start from the beginning where only damaged checkpoints are left.
      phases: gets the seconds of each part.
      backbone: parameters that a run without a checkpoint starts from, as run.trained_backbone() gives
        them; None: random ones.
    """
    phases = phases or Phases()
    batches = train_batches(
        run.source,
        batch_size=config.batch_size,
        canvas_size=run.canvas_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    keep = config.checkpoint
    with (
        contextlib.closing(batches),
        Checkpoints(workdir, keep.keep, keep.best_metric, keep.best_mode) as checkpoints,
    ):
        if checkpoints.latest() is not None:
            like = run.placement.abstract(jax.eval_shape(run.fresh_state))
            state, position = checkpoints.restore(like)
            batches.set_state(position)
        elif checkpoints.damaged.is_dir() and not force:
            raise ValueError(
                f"{workdir} has no checkpoint but damaged ones in {checkpoints.damaged}: --resume=force "
                "starts from the beginning, or choose another --workdir"
            )
        else:
            with phases("initial state"):
                state = run.placement.init(run.fresh_state)
                state = state if backbone is None else start_from(state, backbone)
                jax.block_until_ready(state)
        return _loop(run, config, workdir, log, state, batches, checkpoints, monitor, phases)


def _loop(
    run: Run, config, workdir, log, state, batches, checkpoints, monitor, phases: Phases
) -> TrainState:
    step = first = int(state.step)
    train_step = run.placement.compile(run.train_step, state, keep_state=config.debug_nans)
    log.start(from_step=first)
    bad_images, watch = BadImageLog(run.source), CollapseWatch(run.warmup_steps)
    progress, interval = Progress(run.total_steps, first), Interval()
    checked = False  # whether the log has the metric of the best checkpoint
    running = deque(maxlen=2)  # (step, its batch on the host, its metrics on the device)
    with StopSignals(jax.process_count()) as stop, progress, phases("steps"):
        while step < run.total_steps:
            waiting = time.perf_counter()
            try:
                batch = next(batches)
            except ChildProcessError:  # a signal to the process group also ends the decoders
                if signal := stop.requested(step):
                    _stop(run, workdir, state, batches, checkpoints, signal)
                raise
            bad_images.add(batch)
            batch = {name: batch[name] for name in ("image", "size", "place")}
            on_device = run.placement.put_batch(batch)
            waited = time.perf_counter() - waiting
            phases.move(waited, "steps", "data")
            with (
                debugging_nans(config.debug_nans),
                phases.within("steps", "first step", step == first),
            ):
                state, metrics = train_step(state, on_device)
                if step == first:
                    jax.block_until_ready(metrics)  # waits for compilation and the first run
            step += 1
            running.append((step, batch, metrics))
            # One step runs, one is queued: no more batches on the device.
            check_row(run, workdir, state, running[0], checkpoints)
            interval.add(metrics, config.batch_size, waited)
            progress.advance(step)
            last, signal = step == run.total_steps, stop.requested(step)
            saves = last or step % run.checkpoint_steps == 0
            monitors = monitor is not None and (saves or step % run.monitor_steps == 0)
            means = {}
            if saves or monitors or step % config.log.every_steps == 0:
                means = interval.fetch()
                if monitors:
                    with phases.within("steps", "monitor"):
                        teacher = run.placement.whole(state.teacher_params["backbone"])
                        means |= monitor(teacher)
                interval = Interval()
                log.write(step, means)
                progress.show(step, means)
                if config.log.collapse_warnings:
                    for warning in watch.check(step, means):
                        progress.print(f"WARNING {warning}")
            if saves or signal:
                check_row(run, workdir, state, running[-1], checkpoints)
            if saves:
                with phases.within("steps", "checkpoints"):
                    check_finite(state, step, workdir, checkpoints)
                    checkpoints.save(state, batches.get_state(), means)
                if not checked and _lacks_best_metric(config, means, monitor):
                    progress.print(
                        f"WARNING no best checkpoint is kept: checkpoint.best_metric "
                        f"'{config.checkpoint.best_metric}' is not among the metrics: {', '.join(means)}"
                    )
                checked = True
            if signal:
                _stop(run, workdir, state, batches, checkpoints, signal)
    return state


def _stop(run: Run, workdir: Path, state: TrainState, batches, checkpoints, signal: str):
    """Saves the state and raises Stopped."""
    step = int(state.step)
    check_finite(state, step, workdir, checkpoints)
    checkpoints.save(state, batches.get_state())
    checkpoints.wait()
    raise Stopped(
        f"{signal}: stopped after step {step} of {run.total_steps}, which is saved in {workdir}; the same "
        "command goes on"
    )


def _lacks_best_metric(config, means: dict, monitor) -> bool:
    """Whether best_metric is missing from the log (ignored if the data has no labels to monitor)."""
    name = config.checkpoint.best_metric
    return (
        bool(name) and name not in means and not (monitor is None and name.startswith("monitor/"))
    )


def _monitor(run: Run, config):
    """Builds the monitor, a function of the teacher's backbone; None without labels."""
    source = run.probe_sources[0]
    if not run.monitor_steps or source.labels is None:
        return None
    return make_monitor(
        run.backbone, source, eval_view(run, config), images=config.evals.monitor_images
    )


call_as_function(__name__)
