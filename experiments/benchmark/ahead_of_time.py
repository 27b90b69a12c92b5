"""What a training step costs on an accelerator that is absent: compiled for it here, and read.

    python -m experiments.benchmark.ahead_of_time --for=h100 --models=vit_small --out=h100.json
    python -m experiments.benchmark.ahead_of_time --for=v5e --depth=2 --chips=1,4,8

Compiles the step that the target would run, for the method's COCO config, and reads from the program:
memory, kernels, bytes moved by each part of the model, matrix products by dtype, sums below float32,
attention weights in memory, collectives, and the time and utilisation that the card's public figures
allow. Nothing is run. The compilers are packages of their own: requirements-bench.txt. Without a card
XLA's GPU compiler can neither measure which kernels are faster nor choose cuBLAS: kernels and bytes are an
upper bound there.
"""

import ast
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import ConfigDict

from dinotwins_jax.build import build
from dinotwins_jax.cli import exit_code
from dinotwins_jax.files import replace_text
from dinotwins_jax.memory import abstract_batch
from experiments.benchmark.flops import step_flops
from experiments.benchmark.hlo.report import report
from experiments.benchmark.hlo.table import text_of
from experiments.benchmark.hlo.text import parse
from experiments.benchmark.settings import METHODS, Settings, config_of, settings_of
from experiments.benchmark.targets.absent import card_devices, prepare
from experiments.benchmark.targets.cards import CARDS

_CANVAS = 640  # pixels, the longer side of COCO's images


def measure(
    card: str,
    settings: Settings,
    chips: int = 1,
    crops: str = "drawn",
    changes: dict | None = None,
    hlo: Path | None = None,
) -> dict:
    """Compiles one step and reads it.

    Args:
      card: of CARDS; chips: how many of them; settings: batch_size is that of one chip.
      crops: "drawn" from the images in the step, as in training, or "given" to it as an input.
      changes: config key -> value, such as {"model.remat": True}.
      hlo: file for the compiled program's text.
    Returns:
      the facts of hlo.report.report, with settings, seconds of compilation, memory, and in "roofline" the
      utilisation: the FLOPs that the step needs (benchmark.flops) over what the card does in the time.
    """
    whole = settings._replace(batch_size=settings.batch_size * chips)
    config = config_of(whole)
    config.data.canvas_size = _CANVAS
    config.update_from_flattened_dict(changes or {})
    given = {"make_crops": lambda batch: batch} if crops == "given" else {}
    run = build(config, card_devices(card, chips), **given)
    state = run.placement.abstract(jax.eval_shape(run.fresh_state))
    batch = crops_batch(run, whole) if given else abstract_batch(run, whole.batch_size)
    start = time.perf_counter()
    lowered = run.placement.compile(run.train_step, state).lower(state, batch)
    lowering = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    text = compiled.as_text()
    if hlo is not None:
        replace_text(hlo, text)
    target = CARDS[card]
    facts = report(parse(text), target, chips, _tokens(config))
    needed = step_flops(settings)
    facts["products"]["needed_flops"] = needed
    facts["roofline"]["utilisation"] = needed / target.flops / facts["roofline"]["seconds"]
    return {
        "settings": settings._asdict() | {"chips": chips, "crops": crops} | (changes or {}),
        "title": f"{settings.text()} a chip, {chips} x {target.device}, crops {crops}",
        "jax": jax.__version__,
        "lower_s": round(lowering - start, 1),
        "compile_s": round(done - lowering, 1),
        "memory": _memory(compiled.memory_analysis()),
    } | facts


def crops_batch(run, settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of crops, float32."""
    B, g, s = settings.batch_size, settings.global_size, settings.local_size
    shapes = {"global_crops": (B, 2, g, g, 3), "local_crops": (B, settings.num_local, s, s, 3)}
    return run.placement.abstract_batch(
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    )


def _tokens(config: ConfigDict) -> list[int]:
    """Lengths of the sequences of global and local crops."""
    prefix = 1 + config.model.num_register_tokens
    sizes = {config.views.global_size, config.views.local_size}
    return [prefix + (size // config.model.patch_size) ** 2 for size in sizes]


def _memory(analysis) -> dict[str, int]:
    """Bytes on one chip; peak: the new state replaces the old one in place."""
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
        "peak": kept - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
    }


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_enum("for", "h100", list(CARDS), "Card to compile for")
    flags.DEFINE_list("methods", ["hybrid"], f"Configs: {', '.join(METHODS)}")
    flags.DEFINE_list("models", ["vit_small"], "Names of models.create_vit")
    flags.DEFINE_integer("batch_size", 64, "Images a chip")
    flags.DEFINE_list(
        "chips", ["1"], "Numbers of chips, one program each; 1,4,8 shows the collectives"
    )
    flags.DEFINE_enum("crops", "drawn", ["drawn", "given"], "Drawn in the step, or its input")
    flags.DEFINE_list(
        "depth", [], "Blocks, instead of the model's, one program each; 2 compile soon"
    )
    flags.DEFINE_integer("prototypes", 65536, "K of DINO")
    flags.DEFINE_integer("projector", 8192, "D of Barlow Twins")
    flags.DEFINE_string("dtype", "bfloat16", "Of compute")
    flags.DEFINE_string("attention", "xla", "config.model.attention")
    flags.DEFINE_string("way", "plain", "plain, remat, micro4, fsdp4, or several with +")
    flags.DEFINE_multi_string("set", [], "Any config key: --set=model.remat=True")
    flags.DEFINE_string("out", None, "Report of all figures (JSON); other programs in it stay")
    flags.DEFINE_string("hlo", None, "File for the text of the last program")


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS

    def work():
        card = getattr(given, "for")
        prepare(CARDS[card].platform)
        changes = dict(_change(text) for text in given.set)
        hlo = given.hlo and Path(given.hlo)
        for settings, chips in _programs(given):
            step = measure(card, settings, chips, given.crops, changes, hlo)
            print(text_of(step, CARDS[card]), flush=True)
            if given.out:
                keep(Path(given.out), card, step)

    return exit_code(work)


def keep(path: Path, card: str, step: dict) -> None:
    """Writes the facts of a step into a report, in the place of those with its settings; the others stay.

    Raises:
      ValueError: the report is of another card.
    """
    report = json.loads(path.read_text()) if path.exists() else {"card": card, "steps": []}
    if report["card"] != card:
        raise ValueError(f"{path} is of {report['card']}, not of {card}: choose another --out")
    others = [one for one in report["steps"] if one["settings"] != step["settings"]]
    report |= {"source": CARDS[card].source, "steps": [*others, step]}
    replace_text(path, json.dumps(report, indent=1) + "\n")


def _programs(given) -> list[tuple[Settings, int]]:
    """Settings and chips of every program that the flags ask for."""
    names = ("batch_size", "prototypes", "projector", "dtype", "attention", "way")
    values = {name: getattr(given, name) for name in names}
    return [
        (settings_of(method, model, depth=depth, **values), chips)
        for method in given.methods
        for model in given.models
        for depth in (map(int, given.depth) if given.depth else [None])
        for chips in map(int, given.chips)
    ]


def _change(text: str) -> tuple[str, object]:
    """ "model.remat=True" -> ("model.remat", True); what is no Python literal is a string."""
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


if __name__ == "__main__":
    define_flags()
    app.run(main)
