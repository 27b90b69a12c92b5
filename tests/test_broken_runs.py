"""A run interrupted by five signals equals an unbroken run. Long form: python -m experiments.faults"""

import signal
import subprocess
import sys

import numpy as np
import pytest
from shrunk import SHRUNK, shrunk

from dinotwins_jax.stopping import Stopped, StopSignals
from dinotwins_jax.train import train
from experiments.faults import break_run, final_arrays, table

OPTIONS = {
    "total_steps": 60,
    "checkpoint.every_epochs": 1.0,
    "evals.tasks": (),
    "evals.pictures": 0,
}


@pytest.mark.slow
def test_five_signals_change_nothing(tmp_path):
    """SIGKILL three times, SIGTERM twice, at random moments of the start, of training, of saving."""
    options = SHRUNK | OPTIONS | {"evals.monitor_every_epochs": 0.0}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "dinotwins_jax.main", "--config=configs/hybrid.py", *flags]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    broken = tmp_path / "broken"
    faults = break_run([*command, f"--workdir={broken}"], broken, signals, seed=3, spell_s=1.0)
    assert len(faults) == 5 and faults[-1].step > 0, table(faults)
    assert {f.returned for f in faults if f.name == "SIGKILL"} == {-signal.SIGKILL}
    assert {f.returned for f in faults if f.name == "SIGTERM"} <= {75, -signal.SIGTERM}

    whole = tmp_path / "whole"
    subprocess.run([*command, f"--workdir={whole}"], check=True, capture_output=True)
    ours, theirs = final_arrays(broken), final_arrays(whole)
    assert ours.keys() == theirs.keys() and int(ours["step"]) == 60
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_call_goes_on(tmp_path, monkeypatch):
    config = shrunk(evals__tasks=(), evals__pictures=0)
    asked = StopSignals.requested
    monkeypatch.setattr(
        StopSignals,
        "requested",
        lambda self, step: (
            (signal.raise_signal(signal.SIGTERM), asked(self, step))[1] if step == 1 else None
        ),
    )
    with pytest.raises(
        Stopped, match=r"SIGTERM: stopped after step 1 of 4, which is saved in .*goes on"
    ) as stop:
        train(config, tmp_path)
    assert stop.value.code == 75
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    monkeypatch.undo()
    train(config, tmp_path)
    assert int(final_arrays(tmp_path)["step"]) == 4


def test_signals_are_noted_once_and_handlers_come_back():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.requested(1) is None
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(2) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
