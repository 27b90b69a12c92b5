"""The 8-bit differences to Pillow that docs/data.md quotes stay what they are, on generated scenes."""

import numpy as np
import pytest
from PIL import Image

from experiments import pillow_levels


def scenes(count):
    return pillow_levels.pictures("", count)


def test_each_operation_differs_by_the_rounding_of_8_bits():
    images = [np.asarray(Image.fromarray(image).resize((96, 96))) for image in scenes(2)]
    planes = np.stack([image.transpose(2, 0, 1) for image in images]).astype(np.float32) / 255
    bounds = {
        "grayscale": (0.05, 0.6),
        "solarize": (0.001, 0.001),
        "hue": (0.3, 15.0),
        "blur": (0.5, 3.0),
    }
    for name, (ours, pillows) in pillow_levels.operations().items():
        pillow = [np.asarray(pillows(Image.fromarray(image))) for image in images]
        levels = 255 * np.stack([np.asarray(ours(x)).transpose(1, 2, 0) for x in planes])
        found = pillow_levels.difference(levels, np.stack(pillow))
        kind = name.split()[0]
        if kind in pillow_levels.BLENDS:  # Pillow cuts the fraction off: half a level darker
            assert 0.3 < found["mean"] < 0.55 and found["largest"] < 1.2, name
        else:
            mean, largest = bounds[kind]
            assert abs(found["mean"]) <= mean and found["largest"] <= largest, (name, found)
        if kind == "blur":
            assert 0.8 < found["energy"] < 1.02


@pytest.mark.slow
def test_whole_views_are_a_level_brighter_which_is_little_beside_the_jitter():
    found, spread = pillow_levels.figures(scenes(16))
    assert 0.5 < found["views"]["mean"] < 1.6 and found["views"]["absolute"] < 2.0
    assert spread > 15 * found["views"]["mean"]
    text = pillow_levels.table(found, spread)
    assert "| views " in text and "over draws: ± " in text


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"it has no [.]jpg or [.]png files"):
        pillow_levels.pictures(str(tmp_path), 3)
