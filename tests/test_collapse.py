"""The two collapses of DINO and their prevention, in runs of seconds; the table and the picture."""

import numpy as np
import pytest
from shrunk import SHRUNK

from experiments import collapse


def small(variant):
    config = collapse.config_of(variant, steps=80)
    sizes = {
        k: v for k, v in SHRUNK.items() if k.startswith(("model.", "views.", "data.", "mesh."))
    }
    config.update_from_flattened_dict(
        sizes
        | {
            "batch_size": 16,
            "optim.lr": 2e-2,
            "teacher.momentum": 0.9,
            "teacher.final_momentum": 0.9,
        }
        | {"loss.dino.out_dim": 16, "loss.dino.hidden_dim": 32, "loss.dino.bottleneck_dim": 16}
        | {"log.every_steps": 4}
    )
    return config


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return collapse.curves(tmp_path_factory.mktemp("collapse"), small)


@pytest.mark.slow
def test_each_alone_collapses_its_own_way_and_both_together_do_not(found):
    end = {variant: {m: np.mean(v[-3:]) for m, v in of.items()} for variant, of in found.items()}
    assert end["centering alone"]["teacher_entropy"] > 0.99
    assert end["sharpening alone"]["marginal_entropy"] < 0.1
    both = end["both"]
    assert both["marginal_entropy"] > both["teacher_entropy"] + 0.1  # it tells images apart
    assert both["teacher_entropy"] < 0.9 and both["marginal_entropy"] > 0.5
    assert both["kl"] > 10 * max(end["centering alone"]["kl"], end["sharpening alone"]["kl"])


@pytest.mark.slow
def test_table_and_picture(found, tmp_path):
    assert "| sharpening alone" in collapse.table(found)
    collapse.draw(found, tmp_path / "collapse.png")
    assert (tmp_path / "collapse.png").stat().st_size > 10_000
