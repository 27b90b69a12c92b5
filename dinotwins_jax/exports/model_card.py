"""The model card of an export: README.md, what the model is, how it was trained, judged and is loaded."""

import hashlib
import re
from pathlib import PurePath
from typing import NamedTuple

from dinotwins_jax import __version__
from dinotwins_jax.durations import total_steps
from dinotwins_jax.evals.names import TERMS, task_title, term_title
from dinotwins_jax.evals.table import markdown, score_rows, summary
from dinotwins_jax.exports.targets import Export
from dinotwins_jax.exports.usage import code
from dinotwins_jax.models.torch_export import interpolation_in
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.preprocessing import Preprocessing

_LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "stablehlo": "jax"}
_MARK = "<!-- Written by dinotwins_jax.export; sha256 of the text above: {} -->\n"


class Weights(NamedTuple):
    """The weights of a card: of which run, and when."""

    run: str
    step: int
    images: int | None  # of training, None: not known
    report: dict | None  # scores.json, if it is of these weights


def model_card(
    target: str,
    vit: VisionTransformer,
    config,
    pre: Preprocessing,
    export: Export,
    weights: Weights,
) -> str:
    """The text of README.md, in Markdown with the front matter that the Hugging Face Hub reads.

    Args:
      config: of the run. No path of it is named but for the last part.
    """
    file, view = next(iter(export.programs.items()), ("model.safetensors", pre))
    sections = [
        _front_matter(target, config),
        f"# {_plain(weights.run)}",
        "Features of images, learned without labels: a Vision Transformer trained with dinotwins_jax "
        f"{__version__}.",
        markdown([["", ""], *_facts(vit, config, pre, export, weights)]),
        f"## Input\n\n{_input(target, vit, pre, export)}",
        "## Use\n\nIn this directory, with a `picture.jpg`:\n\n"
        + code(target, vit, view, export.config, file),
        f"## Scores\n\n{_scores(weights)}",
    ]
    text = "\n\n".join(sections) + "\n\n"
    return text + _MARK.format(_checksum(text))


def is_unchanged(card: str) -> bool:
    """Whether a README.md is as an export wrote it."""
    text, last = card[: card.rfind("<!--")], card[card.rfind("<!--") :]
    return last == _MARK.format(_checksum(text))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _plain(text: str) -> str:
    """Text from a config or a file name, without what Markdown would read as its own."""
    text = text.encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8
    return re.sub(r"[`|<>\[\]\x00-\x1f]+", " ", text).strip()


def _front_matter(target: str, config) -> str:
    lines = [f"library_name: {_LIBRARIES[target]}"] if target in _LIBRARIES else []
    lines += [
        "pipeline_tag: image-feature-extraction",
        "license: unknown  # to fill in, such as apache-2.0",
        "tags:",
        "- vision-transformer",
        "- self-supervised-learning",
        *(f"- {name.replace('_', '-')}" for name in config.loss if name in TERMS),
    ]
    return "\n".join(["---", *lines, "---"])


def _facts(vit, config, pre: Preprocessing, export: Export, weights: Weights) -> list[list[str]]:
    extras = {
        f"{vit.num_register_tokens} register tokens": vit.num_register_tokens,
        "LayerScale": vit.layer_scale_init is not None,
        "SwiGLU": vit.ffn == "swiglu",
        "rotary positions": vit.positions == "rope",
    }
    model = (
        f"ViT: width {vit.embed_dim}, {vit.depth} blocks, {vit.num_heads} heads, patches of "
        f"{vit.patch_size} × {vit.patch_size} pixels; {export.parameters:,} parameters, float32"
    )
    terms = [
        f"{term_title(name)} (weight {term.get('weight', 1.0)})"
        for name, term in config.loss.items()
    ]
    rows = [
        ["model", ", ".join([model, *(what for what, there in extras.items() if there)])],
        ["method", f"{_plain(' + '.join(terms))}; these are the teacher's weights"],
        ["data", _data(config, weights)],
        ["training", _training(config, weights)],
    ]
    if start := config.get("init_from"):
        rows.append(["start", f"weights of {_plain(PurePath(start).name)}"])
    return [
        *rows,
        ["image size", _size(pre)],
        ["licence", "to fill in, here and in the first lines"],
    ]


def _size(pre: Preprocessing) -> str:
    return "{} × {} pixels".format(*pre.crop)


def _data(config, weights: Weights) -> str:
    text, probe = _data_name(config.data), config.data.get("probe") or {}
    if weights.images:
        text += f": {weights.images:,} training images"
    sets = (weights.report or {}).get("sets")
    if not sets:
        return text
    classes = f" of {sets['classes']:,} classes" if sets["classes"] else ""
    of = f" {_data_name(probe)}:" if probe.get("source") else ""
    return f"{text}; scored with{of} {sets['train']:,} labelled and {sets['test']:,} test images{classes}"


def _data_name(data) -> str:
    """The source of a section `data`, and the last part of its place."""
    if data.source == "tfds":
        name = data.tfds.name
    else:  # the last folder; "/data/mine/**/*.jpg" is mine
        folders = [part for part in PurePath(data.dir).parts if not re.search(r"[*?\[]", part)]
        name = folders[-1] if folders and folders[-1] != "/" else ""
    return _plain(f"{data.source}, {name}" if name else data.source)


def _training(config, weights: Weights) -> str:
    text = f"step {weights.step:,}"
    if weights.images:
        text += f" of {total_steps(config, weights.images):,}"
    optim = config.optim
    batches = f"batches of {config.batch_size} images"
    return f"{text}, {batches}, {_plain(optim.name)}, learning rate {optim.lr:g} for a batch of 256"


def _input(target: str, vit, pre: Preprocessing, export: Export) -> str:
    views = export.programs or {"model.safetensors": pre}
    several = len(views) > 1
    parts = [f"For `{name}`:\n\n{_view(v)}" if several else _view(v) for name, v in views.items()]
    if export.programs:
        parts.append(
            f"Step 4 is in the file: its input `images` is u8[b, height, width, {pre.channels}], for any "
            "number of images."
        )
    if target == "hf":
        parts.append(
            "The image processor rounds the corner of the crop down, training rounded it to the nearest "
            "pixel: in a quarter of all pictures they are a pixel apart."
        )
    there = interpolation_in(target, vit, export.config)
    if there not in ("", vit.position_interpolation):
        parts.append(
            f"At other image sizes {_LIBRARIES[target]} resamples the positions in another way than this "
            f"model did in training ({there}, not {vit.position_interpolation}), and features differ from "
            "those of dinotwins_jax."
        )
    return "\n\n".join(parts)


def _view(pre: Preprocessing) -> str:
    kind = {1: "Grey", 3: "RGB"}.get(pre.channels, f"{pre.channels} channels")
    mean, std = (", ".join(f"{x:.4g}" for x in moments) for moments in (pre.mean, pre.std))
    window = ", ".join(f"{key} {value}" for key, value in (pre.window or {}).items())
    wider = f"; wider samples by the window {_plain(window)}" if window else ""
    return (
        f"1. {kind}, 8 bits a channel{wider}; turned as the EXIF orientation says.\n"
        f"2. Short side {pre.resize} pixels, bicubic with antialiasing.\n"
        f"3. Centre crop of {_size(pre)}.\n"
        f"4. Values / 255, minus the mean ({mean}), over the standard deviation ({std})."
    )


def _scores(weights: Weights) -> str:
    if weights.report is None:
        return (
            "None of these weights. `python -m dinotwins_jax.evaluate` with the run's workdir makes them, "
            "and the next export adds them."
        )
    scores = weights.report["scores"]
    tasks = dict.fromkeys(task for of_row in scores.values() for task in of_row)
    protocols = [
        f"- {task_title(task)}: {'; '.join(found)}"
        for task in tasks
        if (found := score_rows(scores, task)[2])
    ]
    table = summary(scores) if scores else "None: the data has no labels and no masks."
    lines = [
        f"In %, after step {weights.step:,}, beside the same network with random weights:",
        table,
    ]
    return "\n\n".join([*lines, "\n".join(protocols)]).strip()
