"""Time limits beside other errors, signals and clean-up."""

import contextlib
import signal
import time

import jax
import pytest

from dinotwins_jax.damage import damage
from dinotwins_jax.logs.writers import Log
from dinotwins_jax.stopping import Stopped, StopSignals, time_limit
from experiments.comparison.command import limited


def alarm():
    signal.raise_signal(signal.SIGALRM)


def test_the_end_of_the_time_is_no_damage_and_no_failure_of_a_tracker(tmp_path):
    with pytest.raises(Stopped, match="60 minutes are over"), time_limit(60), damage() as found:
        alarm()
    assert found == []
    log = Log(tmp_path, (), "project", {})
    log._trackers = {"wandb": None}
    with pytest.raises(Stopped), time_limit(60), log._harmless("wandb"):
        alarm()
    assert log._trackers == {"wandb": None}


def test_a_second_alarm_does_not_interrupt_the_clean_up():
    cleaned = []
    with pytest.raises(Stopped), time_limit(60):
        try:
            alarm()
        finally:
            try:
                raise OSError("of the clean-up")
            except OSError:
                alarm()
            cleaned.append(True)
    assert cleaned


def test_an_end_that_something_swallowed_comes_again():
    with pytest.raises(Stopped), time_limit(60):
        with contextlib.suppress(BaseException):  # as Python while an object is finalised
            alarm()
        alarm()


def test_an_alarm_after_a_signal_is_noted_until_the_state_is_saved():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with time_limit(60), StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        alarm()  # while the state is saved
        assert stop.requested(1) == "SIGINT"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_timer_ends_where_a_training_stopped():
    timers = []
    with pytest.raises(Stopped, match="saved"), time_limit(0.001):
        try:
            with StopSignals() as stop:
                time.sleep(0.1)
                raise Stopped(f"{stop.requested(1)}: saved")
        finally:
            timers.append(signal.getitimer(signal.ITIMER_REAL))
    assert timers == [(0.0, 0.0)]


def test_the_timer_goes_on_where_a_training_ended_just_before():
    """What follows the training, an evaluation, is stopped."""
    with pytest.raises(Stopped, match="60 minutes are over"), time_limit(60):
        with StopSignals():
            alarm()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        alarm()


def test_a_time_limit_is_for_one_process(monkeypatch):
    with pytest.raises(ValueError, match=r"--minutes=5 is for one process, and a launcher started"):
        limited(5.0, {"SLURM_STEP_NUM_TASKS": "2"})
    with limited(0.0, {"SLURM_STEP_NUM_TASKS": "2"}), limited(5.0, {}):
        pass
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    several = pytest.raises(ValueError, match=r"5 minutes is for one process, and there are 4")
    with several, time_limit(5.0):
        pass
