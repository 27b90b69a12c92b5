"""Detection of damaged checkpoints: fingerprints of arrays, readable indices, matching shapes."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import tensorstore

from dinotwins_jax.files import full_disk


def fingerprint(tree) -> dict[str, int]:
    """Checksums {path: u32} of all arrays, independent of their sharding."""
    found = paths(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in found]))
    return {path: int(value) for (path, _), value in zip(found, sums, strict=True)}


def paths(tree) -> list[tuple[str, object]]:
    """Lists (path, leaf) of all leaves, with paths such as "params/backbone/pos_embed"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Checksum u32[] of each array: sum modulo 2^32 of its words, each times its own odd number."""

    def of(x):
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        words = words.astype(jnp.uint32).reshape(-1)
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [of(x) for x in leaves]


def changed(tree, expected: dict[str, int]) -> list[str]:
    """Paths of the arrays whose fingerprints differ from the saved ones."""
    return [path for path, value in fingerprint(tree).items() if expected.get(path) != value]


def check_index(path: Path) -> None:
    """Raises ValueError if the index of the arrays cannot be read.

    Orbax would detect this too, but array by array and with a traceback for each.
    """
    base = {"driver": "file", "path": f"{path}/"} if isinstance(path, Path) else f"{path}/"
    spec = {"driver": "ocdbt", "base": base}
    if not tensorstore.KvStore.open(spec).result().list().result():
        raise ValueError("the index of its arrays is empty")


def check_shapes(step: int, saved: dict, wanted: dict) -> None:
    """Raises ValueError if the shapes {path: shape} of a checkpoint differ from those of the config."""
    differ = [p for p in saved.keys() | wanted.keys() if saved.get(p) != wanted.get(p)]
    if differ:
        path = min(differ)
        raise ValueError(
            f"the checkpoint of step {step} has another model or optimiser: {path} has shape "
            f"{saved.get(path, 'none')} there and {wanted.get(path, 'none')} in this config "
            f"({len(differ)} arrays differ)"
        )


# Errors of the machine, not of the file: the checkpoint may be intact.
_NOT_DAMAGE = (
    *("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE", "Permission denied"),
    *("Cannot connect to host", "Server disconnected", "Forbidden", "Unauthorized"),
    *("Input/output error", "Stale file handle", "Too many open files", "Cannot allocate memory"),
)


@contextlib.contextmanager
def damage():
    """Collects errors that mean a damaged file; raises all others without touching a file."""
    found: list[str] = []
    try:
        yield found
    except Exception as error:
        chain, cause = [], error
        while cause is not None:
            chain.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        text = "\n".join(chain)
        machine = isinstance(
            error,
            MemoryError
            | PermissionError
            | ConnectionError
            | TimeoutError
            | jax.errors.JaxRuntimeError,
        )
        if machine or any(word in text for word in _NOT_DAMAGE):
            raise OSError(f"a checkpoint cannot be read now: {first_line(error)}") from error
        found.append(first_line(error))


def first_line(error: Exception) -> str:
    """First line of an error message, shortened."""
    if words := full_disk(error):  # they come at the end of a long line
        return words
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
