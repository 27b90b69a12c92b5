"""Time: what a part gets, and what an item needs by the pace of those before."""

from collections.abc import Sequence


def allotted(shares: Sequence[float], left: float) -> float:
    """Seconds of the first of these parts: its share of `left` seconds. What it leaves, the others get."""
    return max(left, 0.0) * shares[0] / sum(shares)


def pace(done: Sequence[tuple[float, float]]) -> float:
    """Seconds taken over seconds guessed, of (guess, taken) pairs; 1.0 without any."""
    guessed = sum(guess for guess, _ in done)
    return sum(taken for _, taken in done) / guessed if guessed else 1.0


def needs(guess: float, done: Sequence[tuple[float, float]]) -> float:
    """Seconds that an item of this guess needs, by the pace of those done."""
    return guess * pace(done)


def steps_that_fit(seconds: float, per_step: float, reserve: float = 0.15) -> int:
    """Steps of a training that fit into `seconds`, at least 1; reserve: share for all that is no step."""
    return max(1, int((1.0 - reserve) * seconds / per_step))


def keeps(planned: int, seconds: float, per_step: float, compile_s: float) -> bool:
    """Whether a compiled program of `planned` steps is used as it is: it fits into `seconds`, and another
    compilation would not make the training half as long again."""
    fits = planned <= steps_that_fit(seconds, per_step, reserve=0.0)
    return fits and steps_that_fit(seconds - compile_s, per_step) < 1.5 * planned
