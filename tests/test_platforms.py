"""Programs are built and lowered for the platform of their devices, not for that of this machine."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from shrunk import shrunk

from dinotwins_jax.augment.multi_crop import center_view, make_multi_crop
from dinotwins_jax.devices.placement import make_placement
from dinotwins_jax.inputs import make_crops_of

IMAGES = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.uint8)
PAIRS = jax.ShapeDtypeStruct((2, 2), jnp.int32)  # sizes or places
PLAIN = {
    "jitter_prob": 0.0,
    "grayscale_prob": 0.0,
    "blur_prob": (0.0,) * 3,
    "solarize_prob": (0.0,) * 3,
}


def loops(traced, platform: str) -> int:
    """Loops of the program that is lowered for a platform."""
    return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")


def test_crops_without_a_choice_are_a_loop_on_a_cpu_only():
    keys = jax.eval_shape(partial(jax.random.split, num=2), jax.random.key(0))
    multi_crop = make_multi_crop(global_size=16, local_size=8, num_local=1, **PLAIN)
    view = partial(center_view, resize=16, crop=12)
    for traced in (
        jax.jit(multi_crop).trace(IMAGES, PAIRS, keys),
        jax.jit(view).trace(IMAGES, PAIRS),
    ):
        assert loops(traced, "cpu") > 0
        assert loops(traced, "cuda") == loops(traced, "tpu") == 0


@pytest.mark.parametrize(("platform", "looped"), [("cpu", True), ("gpu", False)])
def test_the_crops_of_a_run_are_those_of_its_devices(platform, looped):
    placement = make_placement("jit", 2, jax.devices()[:1])
    assert placement.platform == "cpu"
    config = shrunk(**{f"views__{name}": value for name, value in PLAIN.items()})
    make_crops = make_crops_of(config, placement._replace(platform=platform))
    traced = jax.jit(make_crops).trace({"image": IMAGES, "size": PAIRS, "place": PAIRS})
    assert (loops(traced, "cuda") > 0) == looped
