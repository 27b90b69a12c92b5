"""Part: the PyTorch step of experiments.benchmark on the same card, beside ours of the part "step"."""

import importlib.util
import statistics
from pathlib import Path

from experiments.benchmark.settings import architecture
from experiments.benchmark.worker import Contestant
from experiments.gpu import reason
from experiments.gpu.child import Job, serve
from experiments.gpu.plan import Item
from experiments.gpu.program import settings_of
from experiments.gpu.report import measured

_ROUNDS, _SECONDS, _MOST = 3, 0.7, 100  # seconds and steps of a round


def measure(item: Item, ready: None, job: Job) -> dict:
    """Milliseconds of a step of PyTorch, and how much faster ours is."""
    check_torch(job.toy)
    settings = settings_of(item.values)
    shape = architecture(settings) | {
        key.removeprefix("model."): value for key, value in item.values["keys"].items()
    }
    values = settings._asdict() | shape | {"compile": item.values["compile"]}
    try:
        with Contestant("experiments.benchmark.torch_step", values) as torch:
            one = torch.ask("steps", count=1)["seconds"]
            count = max(1, min(_MOST, round(_SECONDS / one)))
            ms = [1000 * torch.ask("steps", count=count)["seconds"] / count for _ in range(_ROUNDS)]
            facts = torch.facts | torch.ask("peak")
    except RuntimeError as error:
        raise RuntimeError(reason.of_log(Path(job.log))) from error
    found = {
        "model": settings.model,
        "batch_size": settings.batch_size,
        "ms": statistics.median(ms),
        "ms_min": min(ms),
        "ms_max": max(ms),
        "images_per_s": 1000 * settings.batch_size / statistics.median(ms),
    }
    return found | facts | ours(job.found, found)


def check_torch(anywhere: bool) -> None:
    """Raises RuntimeError without PyTorch, or, unless `anywhere`, a card that it can use."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError("PyTorch is not installed: pip install torch")
    import torch

    if not (anywhere or torch.cuda.is_available()):
        raise RuntimeError(f"PyTorch {torch.__version__} finds no CUDA device")


def ours(report: dict, theirs: dict) -> dict:
    """The fastest step of ours with the same model, batch and given crops: {"ours", "ours_ms", "ratio":
    images/s of ours over theirs}; {} if none was measured."""
    like = [
        item
        for item in measured(report, "step").values()
        if not item["augments"] and all(item[key] == theirs[key] for key in ("model", "batch_size"))
    ]
    if not like:
        return {}
    best = min(like, key=lambda item: item["ms"])
    return {"ours": best["name"], "ours_ms": best["ms"], "ratio": theirs["ms"] / best["ms"]}


if __name__ == "__main__":
    serve(measure)
