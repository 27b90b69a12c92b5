"""Access to reference numbers computed by the official PyTorch codes (tests/golden)."""

from pathlib import Path

import jax
import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


def subset(arrays: dict, prefix: str) -> dict[str, np.ndarray]:
    """Entries whose name starts with `prefix`, without it."""
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def relative_error(ours, reference, floor=1e-30) -> float:
    """|ours - reference| / |reference|, L2 over the whole array; a reference below `floor` is rounding."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), floor))


def assert_close(ours, reference, tolerance=1e-5, what="", floor=1e-30):
    error = relative_error(ours, reference, floor)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_trees_close(ours, reference, tolerance, floor=1e-30):
    flat = jax.tree_util.tree_leaves_with_path(reference)
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for (path, expected), value in zip(flat, jax.tree.leaves(ours), strict=True):
        assert_close(value, expected, tolerance, jax.tree_util.keystr(path), floor)
