"""Part: a training of ViT-T/4 for the time left, then its probe."""

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from dinotwins_jax.build import build
from dinotwins_jax.configuration import named_config
from dinotwins_jax.data.pipeline import train_batches
from dinotwins_jax.evaluate import evaluate_run
from dinotwins_jax.files import read_json_lines
from dinotwins_jax.memory import abstract_batch
from dinotwins_jax.quiet import quiet_libraries
from dinotwins_jax.stopping import Stopped
from dinotwins_jax.train import train
from experiments.gpu.budget import keeps, steps_that_fit
from experiments.gpu.child import Job, serve
from experiments.gpu.plan import Item
from experiments.gpu.program import fresh_state

_FIELDS = ("image", "size", "place")  # of a batch, for the step
_WARM, _TIMED = 6, 20  # steps
_PROBE = 0.3  # share of the time that the probe gets
_TOY = {
    **{"batch_size": 8, "model.embed_dim": 48, "model.depth": 2, "model.num_heads": 3},
    **{"data.scenes.num_train": 60, "data.scenes.num_test": 20, "data.scenes.size": 24},
    **{"views.global_size": 16, "views.local_size": 8, "evals.resize": 16, "evals.knn_k": (5,)},
    **{"evals.n_last_blocks": 1, "evals.monitor_images": 40, "evals.attention_size": 16},
    **{"loss.dino.hidden_dim": 32, "loss.barlow_twins.hidden_dims": (32, 32, 32)},
}


class Rate(NamedTuple):
    """steps: of the compiled program's schedules; seconds of compilation and of a step."""

    steps: int
    compile_s: float
    step_s: float


def measure(item: Item, ready: None, job: Job) -> dict:
    """Figures of "training" or "probe"."""
    quiet_libraries()
    workdir = Path(job.out) / "training"
    if item.name == "probe":
        return {"scores": knn_scores(evaluate_run(workdir, tasks=["knn"]))}
    shutil.rmtree(workdir, ignore_errors=True)  # of an earlier check
    end = time.monotonic() + (1.0 - _PROBE) * job.left()
    keys = data_keys(job.data) | (_TOY if job.toy else {})
    planned = (
        4
        if job.toy
        else steps_that_fit(end - time.monotonic(), 1.0 / item.values["steps_per_second"])
    )
    rate = rate_of(config_of(keys, planned))
    left, steps = end - time.monotonic(), rate.steps
    if not job.toy and not keeps(steps, left, rate.step_s, rate.compile_s):
        steps = steps_that_fit(left - rate.compile_s, rate.step_s)
    with stopping_at(end):
        try:
            train(config_of(keys, steps), workdir)
            stopped = None
        except Stopped as stop:
            stopped = str(stop)
    return figures(workdir, steps, stopped) | {
        "data": keys["data.source"],
        "step_ms": 1000 * rate.step_s,
        "compile_s": rate.compile_s,
    }


def data_keys(data: str) -> dict:
    """Config keys of CIFAR-10 in the folder `data` or its cifar10/, of the demo's scenes without it."""
    for folder in (Path(data) / "cifar10", Path(data)) if data else ():
        if (folder / "train.npz").is_file():
            return {"data.source": "cifar10", "data.dir": str(folder)}
    return {"data.source": "scenes"}


def config_of(keys: dict, steps: int) -> ConfigDict:
    """hybrid:cifar10+auto for so many steps, with four looks of the monitor; `auto` suits short runs."""
    config = named_config("hybrid:cifar10+auto", {})
    config.total_steps = steps
    config.model.dtype = "bfloat16"
    config.update_from_flattened_dict(keys)
    config.mesh.data = 1
    config.log.every_steps = max(1, steps // 20)
    config.checkpoint.every_epochs = config.total_epochs
    config.evals.monitor_every_epochs = config.total_epochs / 4
    config.evals.tasks, config.evals.pictures = (), 0
    return config


def rate_of(config: ConfigDict) -> Rate:
    """Compiles a run's step and measures it with the run's data."""
    run = build(config)
    state = fresh_state(run)
    start = time.perf_counter()
    batch = abstract_batch(run, config.batch_size)
    step = run.placement.compile(run.train_step, state).lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    options = {"batch_size": config.batch_size, "canvas_size": run.canvas_size}
    with contextlib.closing(train_batches(run.source, seed=config.seed, **options)) as batches:
        for number in range(_WARM + _TIMED):
            if number == _WARM:
                jax.block_until_ready(state)
                start = time.perf_counter()
            batch = next(batches)
            state, _ = step(state, run.placement.put_batch({k: batch[k] for k in _FIELDS}))
        jax.block_until_ready(state)
    return Rate(config.total_steps, compile_s, (time.perf_counter() - start) / _TIMED)


@contextlib.contextmanager
def stopping_at(end: float):
    """Sends this process SIGTERM from a moment of time.monotonic() on, every second, after which a training
    saves its state and ends; before and after its loop nothing happens."""
    over = threading.Event()

    def send() -> None:
        over.wait(max(end - time.monotonic(), 0.0))
        while not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(1.0)

    kept = signal.signal(signal.SIGTERM, lambda *_: None)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.signal(signal.SIGTERM, kept)


def figures(workdir: Path, steps: int, stopped: str | None) -> dict:
    """What the log of a training tells; stopped: why it ended before its last step, or None."""
    rows = read_json_lines(workdir / "metrics.jsonl", print)
    monitored = [row for row in rows if "monitor/knn_top1" in row]
    names = ("loss", "monitor/knn_top1", "monitor/ridge_top1", "images_per_s")
    return {
        "steps": steps,
        "steps_done": int(rows[-1]["step"]) if rows else 0,
        "stopped": stopped,
        "last": {name: rows[-1][name] for name in names if rows and name in rows[-1]},
        "monitor": [
            {"step": int(row["step"])} | {n: row[n] for n in names[1:3] if n in row}
            for row in monitored
        ],
    }


def knn_scores(scores: dict) -> dict[str, dict[str, float]]:
    """{features: {k: top-1 in %}} of k-NN."""
    return {
        row: {
            k: of["top1"] for k, of in tasks["knn"].items() if isinstance(of, dict) and "top1" in of
        }
        for row, tasks in scores.items()
        if "knn" in tasks
    }


if __name__ == "__main__":
    serve(measure)
