"""Steps compiled for absent cards: committed reports, and today's two-block step against them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dinotwins_jax.devices.placement import make_placement
from experiments.benchmark.ahead_of_time import _change, keep
from experiments.benchmark.settings import Settings, architecture, config_of, settings_of
from experiments.benchmark.targets.absent import card_devices, lacks_compiler
from experiments.benchmark.targets.cards import CARDS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "benchmark" / "results"
COMMITTED = [RESULTS / f"ahead_of_time_{card}.json" for card in ("h100", "v5e")]
TOLERANCE = 0.1
FLAGS = ("depth", "batch_size", "chips", "crops", "prototypes", "projector", "dtype", "attention")


def two_blocks(path: Path) -> dict:
    """The committed facts of the step with two blocks on one chip."""
    steps = json.loads(path.read_text())["steps"]
    wanted = {"depth": 2, "chips": 1, "crops": "given"}
    return next(step for step in steps if wanted.items() <= step["settings"].items())


def guarded(step: dict) -> dict[str, float]:
    """What must not grow unseen."""
    return {
        "kernels": step["kernels"]["count"],
        "bytes": step["traffic"]["bytes"],
        "FLOPs of float32 products": sum(of["flops"] for of in step["products"]["float32"]),
        "sums below float32": step["reductions_below_float32"]["count"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_step_of_two_blocks_is_as_committed(path, tmp_path):
    """After a change for the better, commit the new report: its command is in docs/speed.md."""
    card = json.loads(path.read_text())["card"]
    if (reason := lacks_compiler(card)) is not None:
        pytest.skip(reason)
    before = two_blocks(path)
    settings, out = before["settings"], tmp_path / "now.json"
    flags = [f"--{name}={settings[name]}" for name in FLAGS]
    flags += [f"--methods={settings['method']}", f"--models={settings['model']}"]
    command = [sys.executable, "-m", "experiments.benchmark.ahead_of_time", f"--for={card}"]
    # Not this process' virtual devices and cache.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    subprocess.run([*command, *flags, f"--out={out}"], cwd=ROOT, env=environment, check=True)
    (now,) = json.loads(out.read_text())["steps"]
    assert guarded(now) == pytest.approx(guarded(before), rel=TOLERANCE)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_report_adds_up(path):
    found = json.loads(path.read_text())
    card = CARDS[found["card"]]
    assert found["source"] == card.source
    for step in found["steps"]:
        parts, traffic = step["traffic"]["by_part"], step["traffic"]["bytes"]
        assert sum(of["bytes"] for of in parts.values()) == traffic
        assert sum(of["kernels"] for of in parts.values()) == step["kernels"]["count"]
        roofline = step["roofline"]
        assert roofline["memory_s"] == pytest.approx(traffic / card.memory_rate)
        assert roofline["seconds"] >= max(roofline["memory_s"], roofline["products_s"]) * 0.999
        shares = [of["share"] for of in step["products"]["by_dtype"].values()]
        assert sum(shares) == pytest.approx(1.0)
        plain = {"crops": "given", "way": "plain", "chips": 1}
        if plain.items() <= step["settings"].items():
            # What is found in the program and what the formula says agree.
            needed = step["products"]["needed_flops"]
            assert step["products"]["flops"] == pytest.approx(needed, rel=0.01)
        named = sum(of["bytes"] for name, of in parts.items() if name != "unnamed")
        assert named > 0.98 * traffic


@pytest.mark.parametrize("card", CARDS)
def test_an_absent_compiler_is_one_line_with_what_to_install(card):
    if lacks_compiler(card) is None:
        pytest.skip("the compiler is installed")
    with pytest.raises(
        ValueError, match=f"no compiler for {card}: pip install '.+', of the version"
    ):
        card_devices(card, 1)


def test_a_slice_that_does_not_exist_is_refused():
    if (reason := lacks_compiler("v5e")) is not None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match="no slice of v5e has 3 chips"):
        card_devices("v5e", 3)


@pytest.mark.parametrize("card", ["v5e", "v6e"])
def test_a_state_may_be_shared_by_a_part_of_a_row_of_chips(card):
    """fsdp 8 on a slice of 16 x 16, whose rows have 16."""
    if (reason := lacks_compiler(card)) is not None:
        pytest.skip(reason)
    placement = make_placement("jit", 256, card_devices(card, 256), fsdp=8)
    state = placement.abstract({"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)})
    sharding = state["kernel"].sharding
    assert sharding.shard_shape((64, 64)) == (64, 8)
    rows = {tuple(device.coords[1:]) for device in sharding.mesh.devices[0]}
    assert len(rows) == 1, "the chips that share a state are neighbours"


def test_the_depth_of_the_settings_is_that_of_the_config():
    settings = settings_of("hybrid", "vit_small", depth=2)
    config = config_of(settings)
    assert (config.model.depth, config.evals.n_last_blocks) == (2, 2)
    assert architecture(settings) == architecture(Settings(model="vit_small")) | {"depth": 2}
    assert "vit_small/16 of 2 blocks" in settings.text()
    assert config_of(settings_of("hybrid", "vit_small")).model.depth is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.remat=True", ("model.remat", True)),
        ("optim.lr=1e-3", ("optim.lr", 1e-3)),
        ("model.name=vit_tiny", ("model.name", "vit_tiny")),
    ],
)
def test_a_change_is_a_key_and_a_python_value_or_a_string(text, expected):
    assert _change(text) == expected


def test_a_report_keeps_other_programs_and_one_of_each(tmp_path):
    path = tmp_path / "report.json"
    for depth, kernels in ((2, 10), (12, 20), (2, 30)):
        keep(path, "h100", {"settings": {"depth": depth}, "kernels": kernels})
    report = json.loads(path.read_text())
    assert [(step["settings"]["depth"], step["kernels"]) for step in report["steps"]] == [
        (12, 20),
        (2, 30),
    ]
    with pytest.raises(ValueError, match="is of h100, not of v5e: choose another --out"):
        keep(path, "v5e", {"settings": {}})
