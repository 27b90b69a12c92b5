"""Writes features of pictures: python -m dinotwins_jax.embed --workdir=RUN --images=DIR --out=features.npz

RUN is a run, a folder that export wrote, or a file of weights; --images is a folder, a file or a glob
pattern in quotes, also prepared data. --split=test instead takes the pictures of the run's own data, with
their labels; --config.data.dir=… says where they have moved. A second start of the same command goes on
where the first one stopped.
"""

import os
import sys
from pathlib import Path

import numpy as np
from absl import flags

from dinotwins_jax.callable_module import call_as_function
from dinotwins_jax.cli import command, compiled_beside, exit_code, fail, overrides_of_run
from dinotwins_jax.data.base import SPLITS

_OF_MODEL = ("data.window", "data.mean", "data.std", "data.canvas_size")  # of its preprocessing


def api(
    source,
    images=None,
    out: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    tokens: tuple[str, ...] = ("cls",),
    checkpoint: str | int = "last",
    batch_size: int | None = None,
    classifier=None,
    overwrite: bool = False,
) -> dict[str, np.ndarray]:
    """Features of pictures: `dinotwins_jax.embed`.

    Args:
      source: a Model, or what `load` takes.
      images: a folder, a file, a glob pattern or prepared data; or a list of paths, PIL images and uint8
        arrays, of which only paths can be written to `out`.
      out: a file .npz or .parquet, or a folder for shards; None: nothing is written.
      split: instead of images: "pretrain", "train" or "test" of the run's own data, with labels.
      tokens: of "cls", "mean_patch" and "patches".
      checkpoint: see `load`.
      batch_size: images on the devices at once; by default that of evaluation.
      classifier: of `probe`, or its file; adds prediction str[M], probabilities f32[M, C] and their
        predicted_names.
      overwrite: replace what is at `out`.
    Returns:
      names str[M]; cls f32[M, E], mean_patch f32[M, E], patches f16[M, N, E]; labels i32[M] and class_names
      with split; model, source and place, texts; left_out, names of pictures that cannot be read.
    Raises:
      ValueError, OSError: see `write_features`.
    """
    from dinotwins_jax.data.pictures import Pictures
    from dinotwins_jax.features.classifier import load_classifier
    from dinotwins_jax.features.embedding import features_of, write_features
    from dinotwins_jax.features.files import read_features
    from dinotwins_jax.features.loading import load
    from dinotwins_jax.features.model import Model

    model = source if isinstance(source, Model) else load(source, checkpoint)
    pictures, place = _pictures(model, images, split), _place(images, split)
    tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    if isinstance(classifier, str | os.PathLike):
        classifier = load_classifier(classifier)
    options = {"tokens": tokens, "batch_size": batch_size, "classifier": classifier}
    options["place"] = place
    if out is None:
        return features_of(model, pictures, **options)
    out = Path(out).expanduser()
    if isinstance(pictures, Pictures):
        pictures.check_names()
    write_features(model, pictures, out, **options, overwrite=overwrite)
    return read_features(out)


def _pictures(model, images, split: str | None):
    """The Source of --images or --split."""
    from dinotwins_jax.data.pictures import Pictures, listed, pictures_in

    if (images is None) == (split is None):
        raise ValueError("give either images or split, the pictures to embed")
    if split is not None:
        return _own_pictures(model, split)
    if isinstance(images, str | os.PathLike):
        found = pictures_in(images, model.reading)
    else:
        found = Pictures(listed(images), model.view.canvas_size, model.reading)
    found.max_pixels = model.max_pixels
    return found


def _place(images, split: str | None) -> str:
    """What a features file says of where its pictures are."""
    if split is not None:
        return f"split {split}"
    if not isinstance(images, str | os.PathLike):
        return ""
    return os.path.abspath(os.path.expanduser(images))


def _own_pictures(model, split: str):
    from dinotwins_jax.data import open_source, split_section

    if model.config is None:
        raise ValueError(f"{model.source} is not a run: it has no data for split '{split}'")
    data = split_section(model.config, split)
    if ":" in str(data["source"]):
        raise ValueError(
            f"{model.source} names code as its data source, '{data['source']}', which is not run: give "
            "images"
        )
    return open_source(data, split)


def _change_data(model, changed: dict) -> None:
    """Changes keys of the run's data, such as where they lie, but not how a picture is read."""
    for key in changed:
        if not key.startswith("data.") or key.startswith(_OF_MODEL):
            raise ValueError(
                f"--config.{key}: embed changes keys of the data alone, such as data.dir"
            )
    if changed:
        model.config.update_from_flattened_dict(changed)


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string(
        "workdir", None, "a run, an exported folder or a file of weights", **options
    )
    flags.DEFINE_string(
        "images", None, "a folder, a file, a glob pattern or prepared data", **options
    )
    flags.DEFINE_enum("split", None, list(SPLITS), "instead: pictures of the run's data", **options)
    flags.DEFINE_string("out", None, "a file .npz or .parquet, or a folder for shards", **options)
    flags.DEFINE_list("tokens", ["cls"], "of cls, mean_patch and patches (float16)", **options)
    flags.DEFINE_string("checkpoint", "last", "last, best or a step", **options)
    flags.DEFINE_integer(
        "batch_size",
        None,
        "images at once; that of evaluation if not given",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_string("classifier", None, "of probe: also writes its predictions", **options)
    flags.DEFINE_boolean("overwrite", False, "replace what is at --out", **options)


def _embed(values: flags.FlagValues) -> int:
    if not values.workdir or not values.out or bool(values.images) == bool(values.split):
        return fail(
            "--workdir, --out and either --images or --split are required, such as --workdir=runs/hybrid "
            "--images=/data/pictures --out=features.npz"
        )
    changed = overrides_of_run(values)
    if changed is None and values.config is not None:
        return fail(
            "embed takes the run's own config: --config.data.KEY=… changes a key of its data"
        )

    def work():
        from dinotwins_jax.devices.compilation import remember_compilations
        from dinotwins_jax.features.classifier import load_classifier
        from dinotwins_jax.features.embedding import check_out, check_tokens, write_features
        from dinotwins_jax.features.loading import load
        from dinotwins_jax.logs.counting import Count

        out = Path(values.out).expanduser()
        check_out(out, values.overwrite)
        check_tokens(values.tokens)
        classifier = load_classifier(values.classifier) if values.classifier else None
        remember_compilations(compiled_beside(values.workdir))
        model = load(values.workdir, values.checkpoint)
        _change_data(model, changed or {})
        pictures = _pictures(model, values.images, values.split)
        with Count("embed", len(pictures)) as count:
            done = write_features(
                model,
                pictures,
                out,
                tokens=tuple(values.tokens),
                batch_size=values.batch_size,
                classifier=classifier,
                place=_place(values.images, values.split),
                overwrite=values.overwrite,
                advance=count.advance,
            )
        print(
            f"{out}: {', '.join(values.tokens)} of {done.images:,} images, {done.left_out} left out"
        )

    return exit_code(work, "interrupted: the same command goes on from here")


def run(argv=None, program="python -m dinotwins_jax.embed") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    options = {"config_required": False, "directories": ()}
    return command(program, __doc__, _define, _embed, argv, **options)


call_as_function(__name__)

if __name__ == "__main__":
    sys.exit(run())
