"""Any number of channels from the crops to the exported weights, and in prepared data."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shrunk import shrunk
from test_bands import encoded
from wide_files import files, random_pixels, reading, tiff

from dinotwins_jax.augment import ops
from dinotwins_jax.augment.blur import gaussian_blur
from dinotwins_jax.augment.multi_crop import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    center_view,
    channel_moments,
    make_multi_crop,
)
from dinotwins_jax.build import build, build_for_evaluation
from dinotwins_jax.crop_sheet import draw_crop_sheet
from dinotwins_jax.data import open_source, shards
from dinotwins_jax.data.base import read_image
from dinotwins_jax.data.store import Settings, union
from dinotwins_jax.data.window import window_keys
from dinotwins_jax.evals.dense import image_set
from dinotwins_jax.evals.features import pixel_embed
from dinotwins_jax.evals.view import View
from dinotwins_jax.evaluate import _from_torch
from dinotwins_jax.inputs import moments_of
from dinotwins_jax.memory import abstract_batch
from dinotwins_jax.models.channels import converted
from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.models.torch_files import load_vit
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.pretrained import read_backbone
from dinotwins_jax.settings import advice
from dinotwins_jax.training.state import init_backbone

SLOWLY_TOO = [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))]
EXPORTED = [4, pytest.param(1, marks=pytest.mark.slow)]
CROPS = {"global_size": 16, "local_size": 8, "num_local": 2}
# No operation mixes bands, and none depends on their number.
PLAIN = {"contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale_prob": 0.0}
SIZES = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 4, "image_size": 16}


def batch_of(channels, count=4):
    keys = jax.random.split(jax.random.key(0), count)
    return random_pixels((count, 24, 24, channels)), jnp.full((count, 2), 24), keys


# Crops


@jax.jit
def of_any_bands(planes):
    """The operations that treat bands alike."""
    rows, box = planes.swapaxes(0, 1), (1, 2, 8, 9)
    return (
        ops.blend(planes, ops.BRIGHTNESS, 1.3),
        ops.solarize(planes),
        gaussian_blur(planes, 1.0),
        ops.resize_rows(rows, box, (6, 6)),
        ops.resize_rows(rows, box, (6, 6), max_box=(10, 10)),
    )


def test_operations_treat_every_number_of_bands_alike():
    planes = random_pixels((3, 12, 12)) / np.float32(255)
    whole, second, twice = map(
        of_any_bands, (planes, planes[1:2], np.concatenate([planes, planes]))
    )
    for three, one, six in zip(whole, second, twice, strict=True):
        np.testing.assert_allclose(one, three[1:2], atol=1e-6)
        np.testing.assert_allclose(six, np.concatenate([three, three]), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_contrast_blends_with_the_mean_of_all_channels(channels):
    planes = jnp.asarray(random_pixels((channels, 6, 6)), jnp.float32) / 255
    expected = np.clip(0.5 * planes + 0.5 * planes.mean(), 0, 1)
    np.testing.assert_allclose(ops.blend(planes, ops.CONTRAST, 0.5), expected, atol=1e-6)


def test_jitter_of_other_channels_has_no_operation_on_colours():
    planes = jnp.asarray(random_pixels((4, 6, 6)), jnp.float32) / 255
    factors = jnp.array([1.2, 1.0, 0.3])
    jittered = ops.color_jitter(planes, factors, None, jnp.array([2, 1, 0, 3]))
    np.testing.assert_allclose(jittered, np.clip(1.2 * planes, 0, 1), atol=1e-6)


@pytest.fixture(scope="module")
def colour_crops():
    return jax.jit(make_multi_crop(**CROPS, **PLAIN))(*batch_of(3))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_crops_of_other_channels_have_the_same_boxes_and_pixels(colour_crops, channels):
    """Band by band what the first bands of colour pictures give, with the moments of each channel."""
    images, sizes, keys = batch_of(3)
    bands = images[..., np.arange(channels) % 3]
    mean, std = (0.1,) * channels, (0.5,) * channels
    crops = jax.jit(make_multi_crop(**CROPS, **PLAIN, mean=mean, std=std))(bands, sizes, keys)
    for name, colours in colour_crops.items():
        assert crops[name].shape == (*colours.shape[:-1], channels)
        unit = colours * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
        expected = (unit[..., np.arange(channels) % 3] - 0.1) / 0.5
        np.testing.assert_allclose(crops[name], expected, atol=1e-5)


def test_the_full_recipe_runs_on_two_channels_and_refuses_three():
    mean, std = channel_moments(2)
    multi_crop = jax.jit(make_multi_crop(**CROPS, mean=mean, std=std))
    crops = multi_crop(*batch_of(2))
    assert crops["global_crops"].shape == (4, 2, 16, 16, 2)
    assert all(bool(jnp.isfinite(part).all()) for part in crops.values())
    with pytest.raises(ValueError, match=r"uint8 \[B, S, S, 2\], got uint8 \(4, 24, 24, 3\)"):
        multi_crop(*batch_of(3))


def test_center_view_of_any_channels():
    images, sizes, _ = batch_of(3)
    colours = center_view(images, sizes, resize=16, crop=12)
    moments = {"mean": IMAGENET_MEAN[1:2], "std": IMAGENET_STD[1:2]}
    green = center_view(images[..., 1:2], sizes, resize=16, crop=12, **moments)
    np.testing.assert_allclose(green, colours[..., 1:2], atol=1e-5)


def test_moments_are_given_or_imagenets():
    assert channel_moments(3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_moments(2) == ((0.449, 0.449), (0.226, 0.226))
    assert channel_moments(2, (0.1, 0.2), ()) == ((0.1, 0.2), (0.226, 0.226))
    config = shrunk(model__in_channels=2, data__mean=(0.1, 0.2), data__std=(0.3, 0.4))
    assert moments_of(config) == ((0.1, 0.2), (0.3, 0.4))
    config = shrunk(data__mean=(0.5,))
    with pytest.raises(
        ValueError,
        match=r"config\.data\.mean is \(0\.5,\): it must have a number for each of the 3",
    ):
        build(config)
    with pytest.raises(ValueError, match=r"config\.data\.std has 0\.0: it must be positive"):
        build(shrunk(data__std=(0.0, 1.0, 1.0)))


def test_what_needs_colours_is_said_to_be_off():
    config = shrunk(model__in_channels=1)
    (line,) = [a for a in advice.find(advice.Setting(config, 60, 4)) if "in_channels" in a]
    assert line.startswith(
        "config.model.in_channels is 1: views.saturation and views.hue and views.gray"
    )
    config.views.update(jitter_prob=0.0, grayscale_prob=0.0)
    assert not any("in_channels" in a for a in advice.find(advice.Setting(config, 60, 4)))
    assert not any("in_channels" in a for a in advice.find(advice.Setting(shrunk(), 60, 4)))


# Model


def test_the_parts_of_a_run_have_its_channels():
    run = build(shrunk(model__in_channels=1))
    assert run.backbone.in_channels == 1
    assert abstract_batch(run, 8)["image"].shape == (8, 24, 24, 1)
    params = jax.eval_shape(run.fresh_state).params["backbone"]
    assert params["patch_embed"]["kernel"].shape == (8, 8, 1, 48)
    with pytest.raises(ValueError, match=r"config\.model\.in_channels is 0: it must be positive"):
        build(shrunk(model__in_channels=0))
    with pytest.raises(ValueError, match=r"scenes/pretrain/0: .* not uint8\[H, W, 4\]"):
        build(shrunk(model__in_channels=4))


def test_a_model_refuses_images_of_other_channels():
    vit = VisionTransformer(**SIZES, in_channels=4)
    params = init_backbone(vit, jax.random.key(0))
    with pytest.raises(ValueError, match="images have 3 channels, the model in_channels=4"):
        vit.apply({"params": params}, jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_a_patch_embedding_is_converted_by_timms_rule(channels):
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(np.float32)
    found = converted(kernel, channels)
    assert found.shape == (4, 4, channels, 5) and found.dtype == np.float32
    if channels == 1:
        np.testing.assert_allclose(found[:, :, 0], kernel.sum(axis=2), rtol=1e-6)
    for k in range(channels if channels > 1 else 0):
        np.testing.assert_allclose(found[:, :, k], kernel[:, :, k % 3] * 3 / channels, rtol=1e-6)
    assert converted(kernel, 3) is kernel


@partial(jax.jit, static_argnums=0)
def features(vit, params, images):
    return vit.apply({"params": params}, images).cls


def test_a_run_of_one_channel_starts_from_a_file_in_colours(tmp_path, capfd):
    """Grey pictures have the features that they had as equal colours, and a line says what was done."""
    colours = VisionTransformer(**SIZES)
    params = init_backbone(colours, jax.random.key(0))
    file = tmp_path / "colours.npz"
    np.savez(file, **vit_to_torch(params))
    grey = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    expected = features(colours, params, np.repeat(grey, 3, axis=-1))
    for channels in (1, 6):
        vit = colours.clone(in_channels=channels)
        found = read_backbone(str(file), vit, jax.random.key(1))
        ours = features(vit, found, np.repeat(grey, channels, axis=-1))
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert f"colours.npz has 3 channels, this model {channels}: " in capfd.readouterr().err


def test_weights_of_a_file_in_colours_are_evaluated_on_grey_pictures(tmp_path, capfd):
    config = shrunk(model__in_channels=1)
    colours = VisionTransformer(**SIZES | {"embed_dim": 48})
    params = init_backbone(colours, jax.random.key(0))
    np.savez(tmp_path / "colours.npz", **vit_to_torch(params))
    run = build_for_evaluation(config)
    run, weights = _from_torch(run, config, str(tmp_path / "colours.npz"))
    assert run.backbone.in_channels == 1
    kernel, summed = params["patch_embed"]["kernel"], weights.teacher["patch_embed"]["kernel"]
    np.testing.assert_allclose(summed, kernel.sum(axis=2, keepdims=True), atol=1e-6)
    assert "has 3 channels, the data are read as 1: " in capfd.readouterr().err


@pytest.mark.parametrize("channels", EXPORTED)
@pytest.mark.parametrize("target", ["timm", "dino", "hf"])
def test_exports_state_their_channels_and_are_read_back(target, channels, tmp_path):
    vit = VisionTransformer(**SIZES, in_channels=channels)
    params = init_backbone(vit, jax.random.key(0))
    tensors, config = exported(vit, params, target)
    np.savez(tmp_path / "vit.npz", **tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, loaded = load_vit(tmp_path / "vit.npz")
    assert again.in_channels == channels
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    if target == "timm":
        assert config["model_args"]["in_chans"] == channels
        assert config["pretrained_cfg"]["input_size"] == [channels, 16, 16]
    elif target == "dino":
        assert config["arguments"]["in_chans"] == channels
    else:
        assert config["num_channels"] == channels


@pytest.mark.parametrize("channels", [1, 4])
def test_timm_and_transformers_load_the_export(channels, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import save_file

    vit = VisionTransformer(**SIZES | {"image_size": 32}, in_channels=channels)
    params = init_backbone(vit, jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, channels)).astype(np.float32)
    ours = vit.apply({"params": params}, images).cls
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    for target in ("timm", "hf"):
        tensors, config = exported(vit, params, target)
        folder = tmp_path / target
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            if target == "timm":
                theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
            else:
                model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
                theirs = model.eval()(x).last_hidden_state[:, 0]
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


# Evaluation and pictures


@pytest.mark.parametrize("channels", SLOWLY_TOO)
def test_pictures_and_raw_pixels_of_any_channels(channels, tmp_path):
    pixels = [random_pixels((16, 16, channels), seed=k) for k in range(4)]
    source = files(tmp_path, map(tiff, pixels), reading(channels))
    mean, std = channel_moments(channels)
    view = View(16, 16, 16, 4, mean=mean, std=std)
    shown = image_set(source, view, range(4)).pixels
    assert shown.shape == (4, 16, 16, 3)
    first = shown[..., 0].astype(int) - np.stack(pixels)[..., 0]
    assert np.abs(first).max() <= 1
    (views, _), *_ = view.of(source)
    assert pixel_embed().apply(views).shape == (4, 16 * 16 * channels)
    draw_crop_sheet(
        tmp_path / "sheet.png", source, CROPS, canvas_size=16, seed=0, count=2, mean=mean
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB" and sheet.height > 32


# Prepared data


def prepared(source, out, **settings):
    given = source.reading
    settings |= {"channels": given.channels, "window": given.window and window_keys(given.window)}
    store, settings = union({"pretrain": source}), Settings(**settings)
    shards.write(store, out, settings, description={}, command="", workers=1)
    return {"source": "array_record", "dir": str(out), "in_channels": given.channels}


TWELVE = {"mode": "fixed", "range": (0, 4095)}


@pytest.mark.parametrize(
    ("channels", "window"), [(1, TWELVE), (3, TWELVE), (4, TWELVE), (13, None)], ids=str
)
def test_prepared_pictures_are_those_of_the_source_without_loss(channels, window, tmp_path):
    dtype = np.uint16 if window else np.uint8
    pixels = [
        random_pixels((20, 30, channels), dtype, seed=k) >> (4 if window else 0) for k in range(3)
    ]
    source = files(tmp_path / "data", map(tiff, pixels), reading(channels, **window or {}))
    data = prepared(source, tmp_path / "out")
    stored = open_source(data, "pretrain")
    assert stored.reading == source.reading
    for i in range(3):
        np.testing.assert_array_equal(read_image(stored, i), read_image(source, i))


def test_prepared_pictures_are_shrunk_band_by_band_and_plain_ones_are_jpegs(tmp_path):
    source = files(
        tmp_path / "a", [tiff(np.full((20, 30, 4), (9, 99, 199, 0), np.uint8))], reading(4)
    )
    stored = open_source(prepared(source, tmp_path / "out", short_side=10), "pretrain")
    assert (stored[0] == (9, 99, 199, 0)).all() and stored[0].shape == (10, 15, 4)
    grey = [encoded(random_pixels((20, 30))), encoded(random_pixels((20, 30)), "JPEG")]
    source = files(tmp_path / "b", grey, reading(1))
    stored = open_source(prepared(source, tmp_path / "grey"), "pretrain")
    assert stored.encoded(0)[:3] == b"\xff\xd8\xff" and stored.encoded(1) == grey[1]
    assert stored[0].shape == (20, 30, 1)


def test_a_run_with_other_channels_or_another_window_is_refused(tmp_path):
    """Without a window of its own a run has that of the prepared data."""
    source = files(tmp_path / "a", [tiff(random_pixels((9, 9), np.uint16))], reading(1, **TWELVE))
    data = prepared(source, tmp_path / "out")
    assert open_source(data, "pretrain").reading == source.reading
    assert open_source(data | {"window": TWELVE}, "pretrain").reading == source.reading
    for channels in (3, 4):
        with pytest.raises(
            ValueError, match=r"model\.in_channels=1, this run has [34]: set config"
        ):
            open_source(data | {"in_channels": channels}, "pretrain")
    for window in (TWELVE | {"range": (0, 9)}, {"mode": "picture"}, {"mode": "set"}):
        with pytest.raises(ValueError, match=r"the window 0 to 4,095, config\.data\.window is"):
            open_source(data | {"window": window}, "pretrain")
    colours = files(tmp_path / "b", [encoded(random_pixels((9, 9, 3)))], reading())
    data = prepared(colours, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"the window none, config\.data\.window is 0 to 4,095"):
        open_source(data | {"window": TWELVE}, "pretrain")


def test_prepared_data_have_the_numbers_of_the_window_of_a_set(tmp_path):
    window = {"mode": "set", "range": (0.0, 1000.0)}
    source = files(tmp_path / "a", [tiff(random_pixels((9, 9), np.uint16))], reading(1, **window))
    data = prepared(source, tmp_path / "out")
    stored = open_source(data | {"window": {"mode": "set"}}, "pretrain")
    assert stored.reading.window.ranges == ((0.0, 1000.0),)


def test_manifests_of_before_are_of_three_channels(tmp_path):
    """They state neither channels nor a window, and are completed and read as ever."""
    source = files(tmp_path / "a", [encoded(random_pixels((9, 9, 3)))] * 2, reading())
    data = prepared(source, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["channels"], manifest["settings"]["window"]
    path.write_text(json.dumps(manifest))
    assert open_source(data, "pretrain")[0].shape == (9, 9, 3)
    prepared(source, tmp_path / "out")
    with pytest.raises(ValueError, match="was begun with channels 3, now it is 4"):
        four = files(tmp_path / "a", [encoded(random_pixels((9, 9, 3)))] * 2, reading(4))
        prepared(four, tmp_path / "out")
