"""Training of the whole network with labels: the supervised baseline and full fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrunk import shrunk

from dinotwins_jax.augment.multi_crop import make_multi_crop, make_random_crop
from dinotwins_jax.evals import supervised
from dinotwins_jax.evals.finetune_step import layer_scales
from dinotwins_jax.evals.supervised import CROPS, Supervised
from dinotwins_jax.evals.supervised_step import (
    SupervisedSettings,
    fit,
    start_of,
    supervised_loss,
)
from dinotwins_jax.evals.view import View
from dinotwins_jax.failures import failing_alone
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.train import train

QUICK = SupervisedSettings(steps=40, shares=(0.5, 1.0), learning_rates=(1e-5, 3e-3), batch_size=16)


class Colours:
    """Pictures that are reddish (class 0) or bluish (class 1)."""

    class_names = ("red", "blue")

    def __init__(self, count: int, seed: int):
        self.labels = np.arange(count, dtype=np.int32) % 2
        self._images = np.random.RandomState(seed).randint(0, 100, (count, 16, 16, 3)).astype("u1")
        for image, label in zip(self._images, self.labels, strict=True):
            image[..., 2 * label] += 100

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self._images[i]

    def name(self, i):
        return f"colours/{i}"


@pytest.fixture(scope="module")
def toy():
    """(backbone, params, sources, view)."""
    backbone = VisionTransformer(
        embed_dim=16, depth=1, num_heads=2, patch_size=8, image_size=16, drop_path_rate=0.1
    )
    params = backbone.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return backbone, params, (Colours(60, 0), Colours(40, 1)), View(16, 16, 16, 20)


def made(toy, settings=QUICK, cache=None):
    return Supervised(*toy, settings, orientation={"flip": 0.5}, cache=cache, data=["a", "b"])


@pytest.fixture(scope="module")
def learned(toy, tmp_path_factory):
    """(Supervised, directory of its fits, scores of half of the labels and of all of them)."""
    cache = tmp_path_factory.mktemp("cache")
    whole, (train_set, test_set) = made(toy, cache=cache), toy[2]
    scores = whole.score(train_set.labels, test_set.labels, (0.5, 1.0), (0, 1), 2)
    return whole, cache, scores


def test_a_network_learns_from_labels_alone(learned):
    """Chance is 50%."""
    _, _, scores = learned
    assert set(scores) == {"50%", "100%"}
    for group in scores.values():
        assert group["top1_mean"] > 90 and group["protocol"] == "supervised-whole-v1"
        assert group["num_test"] == 40 and group["recipe"]["smoothing"] == 0.1
    assert [split["num_train"] for split in scores["50%"]["splits"]] == [30, 30]
    assert len(scores["100%"]["splits"]) == 1  # all labels are one draw


def test_rate_and_length_are_of_the_settings_and_selected_on_held_out_training_images(learned):
    for group in learned[2].values():
        for split in group["splits"]:
            assert split["learning_rate"] == 3e-3 and split["steps"] in (20, 40)
            assert split["holdout_top1"] > 90


def test_all_rates_lengths_and_fractions_are_one_program(learned):
    assert learned[0]._step._cache_size() == 1


def test_a_second_evaluation_fits_nothing_again(toy, learned, monkeypatch):
    """Unless labels or settings are others."""
    _, cache, scores = learned
    train_set, test_set = toy[2]
    monkeypatch.setattr(supervised, "fit", None)  # a fit would fail
    again = made(toy, cache=cache)
    assert again.score(train_set.labels, test_set.labels, (0.5, 1.0), (0, 1), 2) == scores
    for labels in (
        (1 - train_set.labels, test_set.labels),
        (train_set.labels, 1 - test_set.labels),
    ):
        with pytest.raises(TypeError):
            again.score(*labels, (0.5,), (0,), 2)
    with pytest.raises(TypeError):
        made(toy, QUICK._replace(smoothing=0.0), cache).score(
            train_set.labels, test_set.labels, (0.5,), (0,), 2
        )


def test_a_fit_takes_the_memory_of_its_own_network_alone(toy):
    """The step writes in place, and the start survives."""
    backbone, _, (source, _), view = toy
    whole, settings = made(toy), QUICK._replace(batch_size=4)
    start = start_of(backbone, whole._params, 2)
    kept, seen = jax.tree.map(np.array, start), []

    def step(network, *rest):
        seen.append(network)
        return whole._step(network, *rest)

    options = {"rate": 1e-3, "steps": 2, "seed": 0, "canvas_size": view.canvas_size}
    network = fit(step, start, source, source.labels, np.arange(8), settings, **options)
    taken = [leaf.is_deleted() for of in seen for leaf in jax.tree.leaves(of)]
    assert len(seen) == 2 and all(taken)
    jax.tree.map(np.testing.assert_array_equal, start, kept)
    assert np.abs(np.asarray(network["head"]["kernel"])).max() > 0


def test_too_little_memory_costs_the_task_alone(toy, capsys):
    backbone, params, (source, _), view = toy
    failed, start = {}, start_of(backbone, params, 2)

    def larger_than_any_memory(*_):
        return jax.block_until_ready(jnp.zeros(2**47, jnp.uint8)), None

    options = {"rate": 1e-3, "steps": 2, "seed": 0, "canvas_size": view.canvas_size}
    rest = (source, source.labels, np.arange(8), QUICK)
    with failing_alone("task scratch", "scratch", failed):
        fit(larger_than_any_memory, start, *rest, **options)
    assert failed["scratch"].startswith(
        "training the whole network with 16 images in a batch does not fit into the memory of the device"
    )
    assert capsys.readouterr().err.startswith("task scratch failed: training")


def test_test_labels_select_nothing(toy):
    """Turned round they give the complement of the accuracy, and the same rate, length and held-out
    score."""
    train_set, test_set = toy[2]
    short = QUICK._replace(steps=6, learning_rates=(1e-3,))
    found = [
        made(toy, short).score(train_set.labels, labels, (0.5,), (0,), 2)["50%"]["splits"][0]
        for labels in (test_set.labels, 1 - test_set.labels)
    ]
    assert found[0]["top1"] == pytest.approx(100 - found[1]["top1"])
    for name in ("learning_rate", "steps", "holdout_top1"):
        assert found[0][name] == found[1][name]


def test_several_labels_an_image_are_scored_by_mean_average_precision(toy):
    train_set, test_set = toy[2]
    several = [np.stack([s.labels == 0, s.labels >= 0], axis=1) for s in (train_set, test_set)]
    settings = QUICK._replace(steps=30, shares=(1.0,), learning_rates=(3e-3,))
    (group,) = made(toy, settings).score(*several, (1.0,), (0,), 2).values()
    assert group["protocol"] == "supervised-whole-multilabel-v1" and group["map_mean"] > 85
    assert "top1_mean" not in group and "holdout_map" in group["splits"][0]


def test_the_loss_is_the_smoothed_cross_entropy_of_the_readable_images():
    rng = np.random.RandomState(0)
    logits, labels, valid = (
        rng.normal(size=(4, 3)),
        np.array([0, 2, 1, 1]),
        np.array([1, 1, 0, 1], bool),
    )
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = 0.9 * np.eye(3)[labels] + 0.1 / 3
    expected = -(targets * logp).sum(axis=1)[valid].mean()
    found = supervised_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(valid), 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    several, p = rng.rand(4, 3) > 0.5, 1 / (1 + np.exp(-logits))
    expected = -np.where(several, np.log(p), np.log(1 - p))[valid].mean()
    found = supervised_loss(jnp.asarray(logits), jnp.asarray(several), jnp.asarray(valid), 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_lowest_layers_learn_slowest(toy):
    _, params, *_ = toy
    scales = layer_scales({"backbone": params, "head": jnp.zeros(2)}, 0.5)
    found = {name: set(jax.tree.leaves(of)) for name, of in scales["backbone"].items()}
    assert found["norm"] == {1.0} and found["blocks_0"] == {0.5} and scales["head"] == 1.0
    assert found["patch_embed"] == found["pos_embed"] == found["cls_token"] == {0.25}


@pytest.mark.slow
def test_a_training_view_is_the_first_global_crop():
    images = np.random.RandomState(0).randint(0, 256, (3, 16, 16, 3)).astype("u1")
    sizes, keys = np.full((3, 2), 16, np.int32), jax.random.split(jax.random.key(1), 3)
    views = {"global_size": 8, "local_size": 8, "jitter_prob": 0.0, "grayscale_prob": 0.0, **CROPS}
    both = make_multi_crop(**views, num_local=0)(images, sizes, keys)["global_crops"]
    one = make_random_crop(**views)(images, sizes, keys)
    np.testing.assert_array_equal(one, both[:, 0])


@pytest.mark.slow
def test_an_evaluation_has_the_baseline_as_a_row_and_methods_share_it(tmp_path):
    from configs import barlow_twins, hybrid

    options = {"evals__tasks": ("scratch", "finetune_all"), "evals__supervised_steps": 4}
    runs = {"hybrid": hybrid, "barlow_twins": barlow_twins}
    scores = {
        name: train(shrunk(module, **options), tmp_path / name, cache=tmp_path / "cache")
        for name, module in runs.items()
    }
    for of in scores.values():
        assert set(of) == {"from scratch", "teacher"}
        assert set(of["from scratch"]["whole"]) == set(of["teacher"]["whole"]) == {"50%"}
        assert of["teacher"]["whole"]["50%"]["recipe"]["layer_decay"] == 0.65
    assert scores["hybrid"]["from scratch"] == scores["barlow_twins"]["from scratch"]
    fits = (3 + 1 + 1) + 2 * (3 + 1)  # rates, the longer training of the baseline, all labels
    assert len(list((tmp_path / "cache").glob("supervised-*.json"))) == fits
