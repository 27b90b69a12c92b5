"""Builds a run from its config, restores, runs the loop, evaluates."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dinotwins_jax.build import Run, build
from dinotwins_jax.checkpoint import Checkpoints, claim_workdir
from dinotwins_jax.data.pipeline import BadImageLog, train_batches
from dinotwins_jax.evals.monitor import make_monitor
from dinotwins_jax.evals.table import summary
from dinotwins_jax.metrics import CollapseWatch, Interval, JsonLines, NonFiniteError, Progress
from dinotwins_jax.scoring import evaluate
from dinotwins_jax.state import TrainState
from dinotwins_jax.subject import Subject, eval_view


def train(config: ConfigDict, workdir: str | Path, cache: Path | None = None) -> dict:
    """Pretrains, evaluates, and leaves everything in `workdir`.

    A second call with the same config goes on from the last checkpoint.

    Args:
      cache: of evaluation, see `scoring.evaluate`.
    Returns:
      the scores, as in WORKDIR/scores.json ({} when the data has no labels).
    Raises:
      ValueError, OSError: bad config or data; the message is one line.
      NonFiniteError: the loss or a gradient is NaN; the last good checkpoint stays.
    """
    start = time.perf_counter()
    run = build(config)
    workdir = Path(workdir)
    claim_workdir(workdir, config.to_dict())
    state = fit(run, config, workdir)
    trained = time.perf_counter() - start
    subject = Subject(state.teacher_params["backbone"], run.random_backbone(), int(state.step))
    scores = evaluate(run, config, subject, workdir, config.evals.tasks, cache)
    if scores:
        print(summary(scores))
    total = time.perf_counter() - start
    print(f"{total:.0f} s in all, {trained:.0f} s of them until the end of training. In {workdir}:")
    for name, what in _FILES.items():
        if (workdir / name).exists():
            print(f"  {name:<16} {what}")
    return scores


_FILES = {
    "report.html": "curves, scores and pictures in one page",
    "scores.json": "all scores",
    "attention.png": "attention of the last block on test images",
    "metrics.jsonl": "losses, schedules, collapse diagnostics and speed by step",
    "checkpoints": "state and data position; the same command goes on from here",
    "config.json": "the config of this run",
}


def fit(run: Run, config: ConfigDict, workdir: Path) -> TrainState:
    """The training loop: restore, step, log, save."""
    state = run.placement.put_state(run.fresh_state())
    batches = train_batches(
        run.source,
        batch_size=config.batch_size,
        canvas_size=run.canvas_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    try:
        if checkpoints.latest() is not None:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
        return _loop(run, config, workdir, state, batches, checkpoints)
    finally:
        checkpoints.close()
        batches.close()


def _loop(run: Run, config, workdir, state, batches, checkpoints) -> TrainState:
    step = first = int(state.step)
    train_step = run.placement.compile(run.train_step)
    log = JsonLines(workdir / "metrics.jsonl", from_step=first)
    bad_images, watch = BadImageLog(run.source), CollapseWatch(run.warmup_steps)
    progress, interval, before = Progress(run.total_steps, first), Interval(), None
    monitor = _monitor(run, config)
    try:
        while step < run.total_steps:
            waiting = time.perf_counter()
            batch = next(batches)
            bad_images.add(batch)
            batch = run.placement.put_batch(
                {name: batch[name] for name in ("image", "size", "place")}
            )
            waited = time.perf_counter() - waiting
            state, metrics = train_step(state, batch)
            jax.block_until_ready(before)  # one step runs, one waits: no more batches on the device
            before = metrics["loss"]
            step += 1
            interval.add(step, metrics, config.batch_size, waited)
            progress.advance(step)
            last = step == run.total_steps
            due = last or step % run.checkpoint_steps == 0
            looks = monitor is not None and step % run.monitor_steps == 0
            if due or looks or step % config.log.every_steps == 0:
                means = interval.fetch()
                if looks:
                    means |= monitor(state.teacher_params["backbone"])
                interval = Interval()
                log.write(step, means)
                progress.show(step, means)
                if config.log.collapse_warnings:
                    for warning in watch.check(step, means):
                        progress.say(f"WARNING {warning}")
            if due:  # after the fetch: what is saved is known to be finite
                _check_finite(state, step)
                checkpoints.save(state, batches.get_state())
    except NonFiniteError as error:
        kept = checkpoints.latest()
        where = (
            "no checkpoint was due yet"
            if kept is None
            else f"the checkpoint of step {kept} is kept"
        )
        advice = "to try, in another workdir: a lower optim.lr, a longer optim.warmup_epochs"
        raise NonFiniteError(f"stopped: {error}; {where} in {workdir}; {advice}") from None
    finally:
        progress.close()
    return state


def _monitor(run: Run, config):
    """A function of the teacher's backbone, None where there is nothing to look at."""
    source = run.probe_sources[0]
    if not run.monitor_steps or source.labels is None:
        return None
    return make_monitor(
        run.backbone, source, eval_view(run, config), images=config.evals.monitor_images
    )


def _check_finite(state: TrainState, step: int) -> None:
    """The update itself may overflow where loss and gradient did not."""
    if not jnp.isfinite(optax.global_norm(state.params)):
        raise NonFiniteError(f"a parameter is not finite after step {step}")
