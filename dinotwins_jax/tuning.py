"""The tasks that train weights with labels, from a run's config: the last blocks, or the whole network."""

from pathlib import Path

from dinotwins_jax.build import EvalRun, Run
from dinotwins_jax.evals.finetune import fine_tune
from dinotwins_jax.evals.supervised import Supervised
from dinotwins_jax.evals.supervised_step import SupervisedSettings
from dinotwins_jax.evals.view import View
from dinotwins_jax.weights import with_mask_token

# Of pretrained weights: lower layers learn slower, and a quarter of the steps is enough.
FINE_TUNING = {"layer_decay": 0.65, "shares": (0.25,)}


def last_blocks(run: Run | EvalRun, config, params, view: View) -> dict[str, dict]:
    """{"finetune": scores}, and "finetune multilabel" if images have several labels."""
    evals = config.evals
    train, test = run.probe_sources
    return {
        f"finetune {kind}".strip(): fine_tune(
            run.backbone,
            params,
            lambda indices: view.of(train, indices),
            y,
            lambda indices: view.of(test, indices),
            t,
            num_classes=len(train.class_names),
            fraction=evals.finetune_fraction,
            split_seeds=tuple(evals.split_seeds),
            blocks=evals.finetune_blocks,
            epochs=evals.finetune_epochs,
        )
        for kind, (y, t) in _kinds(train, test).items()
    }


def whole_network(
    run: Run | EvalRun, config, params, view: View, cache: Path, data: list[str], pretrained: bool
) -> dict[str, dict]:
    """{"whole": scores by fraction of the labels}, and "whole multilabel" if images have several labels.

    Args:
      params: of the backbone at the start.
      cache: directory of remembered fits; data: `source_checksum` of train and test.
      pretrained: whether params are, see FINE_TUNING.
    """
    evals, views = config.evals, config.views
    train, test = run.probe_sources
    settings = SupervisedSettings(
        steps=evals.supervised_steps, **(FINE_TUNING if pretrained else {})
    )
    supervised = Supervised(
        with_mask_token(run.backbone, params),
        params,
        run.probe_sources,
        view,
        settings,
        orientation={key: views.get(key, 0.0) for key in ("flip", "vertical_flip", "rotate90")},
        cache=cache,
        data=data,
    )
    draws = tuple(evals.split_seeds)[: evals.supervised_draws]
    fractions = tuple(evals.label_fractions)
    return {
        f"whole {kind}".strip(): supervised.score(y, t, fractions, draws, len(train.class_names))
        for kind, (y, t) in _kinds(train, test).items()
    }


def _kinds(train, test) -> dict[str, tuple]:
    """{"" or "multilabel": (training labels, test labels)}."""
    kinds = {"": (train.labels, test.labels)}
    several = tuple(getattr(source, "multi_hot", None) for source in (train, test))
    return kinds | ({"multilabel": several} if all(s is not None for s in several) else {})
