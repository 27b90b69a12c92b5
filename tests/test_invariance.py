"""Invariance of training to devices, pmap, fsdp, processes, micro-batches, remat and blocks as a loop.

All cases, with the crops of a training: python -m experiments.invariance
"""

import functools

import jax
import numpy as np
import pytest

from dinotwins_jax.devices.placement import make_placement
from experiments import invariance
from experiments.invariance import LIMIT, Case, difference, differences, run_case, table

CASES = [
    Case(devices=8, fsdp=4),
    Case(mode="pmap", devices=2, micro_batches=4),
    Case(devices=2),
    Case(devices=8),
    Case(mode="pmap", devices=8),
    Case(devices=4, fsdp=2, processes=2),
    Case(micro_batches=4),
    Case(devices=4, fsdp=2, micro_batches=2, remat=True),
    Case("dino", micro_batches=4),
    Case("barlow_twins", micro_batches=4),
    Case("dinov3", devices=8, fsdp=4),
    Case("dinov3", mode="pmap", devices=8),
    Case("dinov3", micro_batches=4),
    Case("two views", mode="pmap", devices=8),
    Case(devices=4, fsdp=2, scan=True),
    Case("dino", devices=8, dtype="bfloat16"),
]


@functools.cache
def reference(case):
    return run_case(case, real_crops=False)


def slow(cases):
    """Parameters of a slow test, identified by title."""
    return [pytest.param(case, id=case.title(), marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow(CASES))
def test_the_same_training_wherever_it_runs(case, monkeypatch):
    run = run_case
    monkeypatch.setattr(
        invariance,
        "run_case",
        lambda of, crops: reference(of) if of == of.reference else run(of, crops),
    )
    found = differences([case], real_crops=False)[case.title()]
    assert all(np.isfinite(value) for value in found.values())
    assert max(found.values()) <= case.limit, found


# Heads of its own for the teacher, every view paired; a loss of patch tokens, which couples images.
OTHERS = {
    "pairs": {"barlow_twins": {"hidden_dims": (16, 16), "pair": "student_teacher", "views": "all"}},
    "patches": {"mine": {"fn": "fork:patchwise"}},
}


@pytest.mark.parametrize("case", slow([Case("patches", micro_batches=4), Case("pairs", "pmap", 8)]))
def test_other_losses_too(case, monkeypatch):
    monkeypatch.setattr(invariance, "TERMS", OTHERS)
    ours, theirs = (run_case(c, real_crops=False) for c in (case, Case(case.method)))
    for name in ("loss", "gradients", "student", "teacher"):
        assert difference(ours[name], theirs[name]) <= LIMIT, name


@pytest.mark.slow
def test_other_blocks_too(monkeypatch):
    """SwiGLU and augmented rotary positions: all devices and micro-batches use the same draw."""
    fields = {"ffn": "swiglu", "positions": "rope", "rope_shift": 0.2, "rope_rescale": 2.0}
    monkeypatch.setattr(invariance, "VIT", invariance.VIT.clone(**fields, num_register_tokens=2))
    ours, theirs = (
        run_case(case, real_crops=False)
        for case in (Case(devices=4, fsdp=2, micro_batches=2, remat=True), Case())
    )
    for name in ("loss", "gradients", "student", "teacher"):
        assert difference(ours[name], theirs[name]) <= LIMIT, name


def test_a_difference_shows():
    theirs = {"a": np.array([1.0, -2.0]), "small": np.array([1e-6])}
    assert difference(theirs, theirs) == 0.0
    assert difference(theirs | {"a": np.array([1.1, -2.0])}, theirs) == pytest.approx(0.05)
    assert difference(theirs | {"small": np.array([0.0])}, theirs) == pytest.approx(1.0)
    assert np.isnan(difference(theirs | {"a": np.array([np.nan, 0.0])}, theirs))
    with pytest.raises(ValueError, match="small"):
        difference({"a": theirs["a"]}, theirs)
    assert "1.0e-05" in table({"case": {"loss": 1e-5}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 12}, "batch_size 12 does not divide by 8 devices"),
        ({"mode": "pjit"}, "choose jit or pmap"),
        ({"fsdp": 3}, "mesh.fsdp 3 does not divide 8 devices"),
        ({"fsdp": 0}, "fsdp must be positive"),
        ({"data": -1}, "mesh is data=-1"),
        ({"data": 4, "fsdp": 4}, "needs 16 devices: there are 8"),
        ({"mode": "pmap", "fsdp": 2}, "fsdp is 2: .*pmap keeps whole states"),
        ({"micro_batches": 3}, r"does not divide by 8 devices .* times config.micro_batches 3"),
        ({"micro_batches": 0}, "micro_batches is 0"),
    ],
)
def test_bad_placements_are_named(options, message):
    options = {"mode": "jit", "batch_size": 16} | options
    with pytest.raises(ValueError, match=message):
        make_placement(**options, devices=jax.devices()[:8])
