"""The cost of the demo's compiled step has not increased."""

import pytest

from experiments.benchmark.step_cost import committed, measure, version


@pytest.mark.slow
def test_flops_memory_and_fusions_have_not_grown():
    known = committed().get(version())
    if known is None:
        pytest.skip(
            f"no figures of jax {version()}: python -m experiments.benchmark.step_cost --write"
        )
    found = measure()
    assert set(found) == set(known)
    for name, value in found.items():
        assert value <= 1.1 * known[name], (
            f"{name} of the demo's step grew from {known[name]:,.0f} to {value:,.0f}; where that is "
            "meant: python -m experiments.benchmark.step_cost --write"
        )
