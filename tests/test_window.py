"""Windows: how samples that are not unsigned 8-bit become 8 bits, and where the numbers are kept."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from shrunk import shrunk
from wide_files import files, random_pixels, reading, tiff

from dinotwins_jax.build import build_for_evaluation
from dinotwins_jax.data.base import UnfitImage, decode_image
from dinotwins_jax.data.look import look_at, set_ranges, settle_window
from dinotwins_jax.data.window import eight_bits, window_keys, window_of
from dinotwins_jax.inputs import moments_of
from dinotwins_jax.workdir import claim_workdir, with_known_values

TWELVE = random_pixels((40, 50), np.uint16) >> 4
TWELVE[0, :2] = 0, 4095
SIGNED = TWELVE.astype(np.int16) - 2048


def levels(pixels):
    return len(np.unique(pixels))


def test_12_bit_samples_keep_their_levels_only_with_a_window():
    """Without one, 4,096 values become 17 grey levels."""
    data = tiff(TWELVE)
    assert levels(decode_image(data)) == levels(decode_image(data, reading=reading(1))) == 17
    fixed = decode_image(data, reading=reading(1, mode="fixed", range=(0, 4095)))
    assert levels(fixed) == 256
    np.testing.assert_array_equal(fixed[..., 0], np.floor(TWELVE * (255 / 4095) + 0.5))
    three = decode_image(data, reading=reading(3, mode="fixed", range=(0, 4095)))
    np.testing.assert_array_equal(three, np.repeat(fixed, 3, axis=2))


def test_16_bit_grey_without_a_window_is_as_ever():
    wide = random_pixels((40, 50), np.uint16)
    np.testing.assert_array_equal(
        decode_image(tiff(wide))[..., 0], (wide.astype(np.int64) * 255 + 32767) // 65535
    )


def test_signed_samples_keep_both_halves():
    """Without a window the full range of the type: -32,768 to 32,767 become 0 to 255."""
    wide = np.array([[-32768, -16384, 0, 16384, 32767]], np.int16)
    assert decode_image(tiff(wide), reading=reading(1))[0, :, 0].tolist() == [0, 64, 128, 191, 255]
    assert decode_image(tiff(np.array([[-128, 0, 127]], np.int8)))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    below = decode_image(tiff(SIGNED), reading=reading(1))[SIGNED < 0]
    assert levels(below) > 5
    fixed = decode_image(tiff(SIGNED), reading=reading(1, mode="fixed", range=(-2048, 2047)))
    assert levels(fixed[SIGNED < 0]) == 128 and levels(fixed) == 256


def test_floating_point_pictures_need_a_window():
    data = tiff(np.linspace(-1, 3, 2000, dtype=np.float32).reshape(40, 50))
    with pytest.raises(UnfitImage, match=r"floating-point.*config\.data\.window"):
        decode_image(data, name="f.tif")
    pixels = decode_image(data, reading=reading(1, mode="fixed", range=(0, 2)))
    assert pixels.min() == 0 and pixels.max() == 255 and (pixels == 0).mean() > 0.2
    holes = np.array([[np.nan, -np.inf, np.inf, 0.0, 1.0]], np.float32)
    assert decode_image(tiff(holes), reading=reading(1, mode="fixed", range=(0, 1)))[
        0, :, 0
    ].tolist() == [0, 0, 255, 0, 255]
    assert decode_image(tiff(holes), reading=reading(1, mode="picture"))[0, 4, 0] == 255
    with pytest.raises(UnfitImage, match="no finite samples"):
        decode_image(tiff(np.full((3, 3), np.nan, np.float32)), reading=reading(1, mode="picture"))


def test_32_bit_integers_need_a_window_where_16_bits_do_not_hold_them():
    small = random_pixels((40, 50), np.uint16)
    np.testing.assert_array_equal(
        decode_image(tiff(small.astype(np.uint32))), decode_image(tiff(small))
    )
    with pytest.raises(UnfitImage, match=r"32-bit samples from 0 to 70000 .*config\.data\.window"):
        decode_image(tiff(np.array([[0, 70000]], np.uint32)))
    wide = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    window = reading(1, mode="fixed", range=(0, 2**32 - 1))
    assert decode_image(tiff(wide), reading=window)[0, :, 0].tolist() == [0, 128, 255]


def test_8_bit_samples_are_left_alone():
    grey = random_pixels((40, 50))
    for window in ({"mode": "fixed", "range": (100, 120)}, {"mode": "picture"}):
        np.testing.assert_array_equal(
            decode_image(tiff(grey), reading=reading(1, **window))[..., 0], grey
        )


def test_percentiles_of_each_picture_and_of_each_band():
    pixels = np.zeros((10, 100, 2), np.uint16)
    pixels[..., 0] = np.arange(1000).reshape(10, 100)
    pixels[..., 1] = pixels[..., 0] * 10
    together = eight_bits(pixels, window_of({"mode": "picture", "percentiles": (0, 100)}, 2))
    assert together[..., 0].max() == 26 and together[..., 1].max() == 255
    apart = {"mode": "picture", "percentiles": (0, 100), "per_band": True}
    each = eight_bits(pixels, window_of(apart, 2))
    np.testing.assert_array_equal(each[..., 0], each[..., 1])
    cut = eight_bits(pixels[..., :1], window_of({"mode": "picture", "percentiles": (10, 90)}, 1))
    assert 0.09 < (cut == 0).mean() < 0.11 and 0.09 < (cut == 255).mean() < 0.11
    assert not eight_bits(np.full((3, 3, 1), 7, np.uint16), window_of({"mode": "picture"}, 1)).any()


def test_a_pair_for_each_band():
    pixels = np.array([[[0, 0], [10, 1000]]], np.uint16)
    window = window_of({"mode": "fixed", "range": ((0, 10), (0, 1000))}, 2)
    assert eight_bits(pixels, window).tolist() == [[[0, 0], [255, 255]]]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "auto"}, r"mode is 'auto': choose fixed or picture or set"),
        ({"mode": "fixed"}, r"range is \(\): mode 'fixed' needs"),
        ({"mode": "fixed", "range": (5, 5)}, r"range is \(5, 5\): .*low < high"),
        ({"mode": "fixed", "range": ((0, 1), (0, 2))}, r"range is .* 3 such pairs"),
        ({"mode": "fixed", "range": "wide"}, r"range is wide"),
        ({"mode": "", "range": (0, 4095)}, r"range is .*its mode is ''.*use 'fixed'"),
        ({"mode": "picture", "range": (0, 1)}, r"range is .*its mode is 'picture'"),
        ({"mode": "picture", "percentiles": (99, 1)}, r"percentiles is \(99, 1\)"),
    ],
)
def test_keys_that_do_not_fit(section, message):
    with pytest.raises(ValueError, match=rf"config\.data\.window\.{message}"):
        window_of(section)


@pytest.mark.parametrize("section", [
    {"mode": "fixed", "range": (0.0, 4095.0)}, {"mode": "picture", "percentiles": (1.0, 99.0)},
    {"mode": "fixed", "range": ((0.0, 1.0), (0.0, 2.0))}, {"mode": "set", "per_band": True},
    {"mode": "set", "range": (3.0, 9.0)},
], ids=str)  # fmt: skip
def test_a_window_survives_the_config(section):
    window = window_of(section, 2)
    assert window_of(json.loads(json.dumps(window_keys(window))), 2) == window
    assert window_of({}) is window_of(None) is None


# The start of a run


def test_the_start_names_the_range_found_and_the_key(tmp_path):
    """One warning, of 12-bit as of signed samples; none with a window."""
    twelve = look_at(files(tmp_path / "a", [tiff(TWELVE)] * 3, reading(1)))
    (warning,) = twelve.warnings
    assert "16-bit samples from 0 to 4,095" in warning and "17 levels" in warning
    assert "config.data.window" in warning and "16-bit samples" in twelve.lines[0]
    (warning,) = look_at(files(tmp_path / "b", [tiff(SIGNED)] * 3)).warnings
    assert "16-bit signed samples from -2,048 to 2,047" in warning
    window = reading(1, mode="fixed", range=(0, 4095))
    found = look_at(files(tmp_path / "a", [tiff(TWELVE)] * 3, window))
    assert found.warnings == () and "window 0 to 4,095" in found.lines[0]
    plain = files(tmp_path / "c", [tiff(random_pixels((9, 9)))] * 3, window)
    assert "no effect" in look_at(plain).warnings[0]
    holes = np.array([[np.nan, -0.5, 2.0]], np.float32)
    found = look_at(files(tmp_path / "e", [tiff(holes)] * 3, reading(1, mode="picture")))
    assert "32-bit floating-point samples from -0.5 to 2 in 3 of 3" in found.lines[0]
    with pytest.raises(UnfitImage, match="floating-point"):
        look_at(files(tmp_path / "d", [tiff(np.zeros((5, 5), np.float32))] * 3))


def test_the_window_of_a_set_is_that_of_its_pictures(tmp_path):
    """Of wide samples of a seeded choice of pictures; unreadable and 8-bit ones do not count."""
    contents = [tiff(np.full((10, 10), 10 * k, np.uint16)) for k in range(101)]
    contents += [b"broken", tiff(random_pixels((9, 9)))]
    source = files(tmp_path, contents, reading(1, mode="set", percentiles=(0, 100)))
    ((low, high),) = set_ranges(source, seed=0)
    assert 0 <= low <= 100 and 900 <= high <= 1000
    assert set_ranges(source, seed=0) == ((low, high),) != set_ranges(source, seed=1)
    assert settle_window(source, 0).window.ranges == source.reading.window.ranges == ((low, high),)
    small = files(tmp_path / "8", [tiff(random_pixels((9, 9)))], reading(1, mode="set"))
    assert set_ranges(small, 0) == ((0.0, 255.0),)


def test_the_window_of_each_band_of_a_set(tmp_path):
    pixels = np.stack([TWELVE, TWELVE // 16], axis=-1)
    window = {"mode": "set", "percentiles": (0, 100), "per_band": True}
    source = files(tmp_path, [tiff(pixels)] * 3, reading(2, **window))
    assert set_ranges(source, 0) == ((0.0, 4095.0), (0.0, 255.0))


@pytest.fixture
def of_a_set(tmp_path):
    """The config of a run on 12-bit pictures whose window is that of the set."""
    files(tmp_path / "data", [tiff(TWELVE)] * 8)
    window = {"mode": "set", "percentiles": (0.0, 100.0), "range": (), "per_band": False}
    options = {
        "data__source": "folder",
        "data__dir": str(tmp_path / "data"),
        "model__in_channels": 1,
    }
    config = shrunk(**options)
    config.data.window = ConfigDict(window)
    return config


def test_the_numbers_are_stored_in_the_config_and_not_computed_again(of_a_set, tmp_path):
    run = build_for_evaluation(of_a_set)
    assert run.config.data.window.range == (0.0, 4095.0)
    for source in (run.source, *run.probe_sources):
        assert source.reading.window.ranges == ((0.0, 4095.0),)
    stored = ConfigDict(json.loads(json.dumps(run.config.to_dict())))
    stored.data.window.range = [0.0, 2000.0]  # what the run had
    again = build_for_evaluation(stored)
    assert again.source.reading.window.ranges == ((0.0, 2000.0),)


def test_a_resumed_run_has_the_window_that_it_had(of_a_set, tmp_path):
    workdir = tmp_path / "run"
    before = build_for_evaluation(of_a_set).config
    claim_workdir(workdir, before.to_dict())
    assert with_known_values(of_a_set, workdir).data.window.range == ()  # no checkpoint yet
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    files(tmp_path / "data", [tiff(TWELVE // 8)] * 8)  # the pictures have changed since
    resumed = with_known_values(of_a_set, workdir)
    assert resumed.data.window.range == (0.0, 4095.0)
    claim_workdir(workdir, build_for_evaluation(resumed).config.to_dict())
    of_a_set.data.window.percentiles = (1.0, 99.0)  # another window: refused by claim_workdir
    other = build_for_evaluation(with_known_values(of_a_set, workdir)).config
    with pytest.raises(ValueError, match=r"another config.*data\.window\.percentiles"):
        claim_workdir(workdir, other.to_dict())


def test_a_finished_run_of_a_set_is_not_trained_again(of_a_set, tmp_path):
    """Its config.json has the numbers, the config that asks for it has not."""
    from experiments.comparison.plan import is_finished

    stored = of_a_set.to_dict()
    stored["data"]["window"] = dict(stored["data"]["window"], range=(0.0, 4095.0))
    claim_workdir(tmp_path / "run", stored)
    report = {"step": 4, "seconds": dict.fromkeys(of_a_set.evals.tasks, 1.0)}
    (tmp_path / "run" / "scores.json").write_text(json.dumps(report))
    assert is_finished(tmp_path / "run", of_a_set, 4)
    of_a_set.data.window.percentiles = (1.0, 99.0)
    assert not is_finished(tmp_path / "run", of_a_set, 4)


def test_a_config_of_before_these_keys_still_builds_and_resumes(tmp_path):
    config = shrunk()
    old = config.to_dict()
    del old["model"]["in_channels"], old["data"]["window"], old["data"]["mean"], old["data"]["std"]
    claim_workdir(tmp_path, old)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    claim_workdir(tmp_path, config.to_dict())
    run = build_for_evaluation(ConfigDict(old))
    assert run.backbone.in_channels == 3 and moments_of(run.config) == moments_of(config)
