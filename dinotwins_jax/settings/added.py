"""Config keys that the config.json of an earlier run may lack, with the values that it had."""

import copy
from typing import Any

from dinotwins_jax.settings.keys import DISTILLING, terms_of

_SUBSET = {"classes": 0, "images": 0, "long_tail": 1.0, "seed": 0}
ADDED: dict[str, Any] = {
    **{"views.vertical_flip": 0.0, "views.rotate90": 0.0, "data.folder.labels": ""},
    **{"data.coco.train_annotations": "", "data.coco.test_annotations": "", "data.max_pixels": 0},
    **{f"data.subset.{key}": value for key, value in _SUBSET.items()},
    **{"data.probe.source": "", "data.probe.dir": "", "data.probe.canvas_size": 0},
    **{f"data.probe.subset.{key}": value for key, value in _SUBSET.items()},
    **{"model.in_channels": 3, "data.mean": [], "data.std": []},
    **{"data.window.mode": "", "data.window.range": [], "data.window.percentiles": [0.5, 99.5]},
    **{"data.window.per_band": False, "model.position_interpolation": "dino"},
    **{"model.drop_path_uniform": False, "model.scan_blocks": False, "model.stem": "linear"},
    **{"optim.betas": [0.9, 0.999], "optim.lr_scaling": "linear_256", "optim.final_lr_ratio": None},
    **{"optim.frozen_last_layer": "skipped"},
    **{"evals.supervised_steps": 1000, "evals.supervised_draws": 1},
}
OF_TERMS = {"weight_norm": True}  # of every term of the kinds DISTILLING


def with_added(config: dict) -> dict:
    """A copy of a config, nested as in config.json, with the keys that it lacks.

    Sections at the top are not made up, and what is no section is left as it is.
    """
    config = copy.deepcopy(config)
    for key, value in ADDED.items():
        section, *inner, last = key.split(".")
        node = config.get(section)
        for name in inner:
            node = node.setdefault(name, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.setdefault(last, copy.deepcopy(value))
    loss = config.get("loss")
    terms = {
        name: term
        for name, term in (loss.items() if isinstance(loss, dict) else ())
        if isinstance(term, dict) and isinstance(term.get("fn", name), str)
    }
    for _, term in terms_of({"loss": terms}, *DISTILLING):
        for name, value in OF_TERMS.items():
            term.setdefault(name, value)
    return config
