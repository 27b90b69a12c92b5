"""Files of features: shards joined into one .npz or .parquet without holding them all, and read back."""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dinotwins_jax.files import replacing

ABOUT = ("model", "source", "place")  # texts: who made the features, and of which pictures
MANIFEST = "embed.json"  # of a folder of shards
_ONCE = ("class_names", "predicted_names", *ABOUT)  # the same in every shard
_PER_SHARD = ("left_out",)  # per shard, but not one a row


def join(shards: list[Path], out: Path, about: dict) -> None:
    """Joins shards, each an .npz, into `out`, which appears as a whole."""
    with replacing(out) as temporary:
        KINDS[out.suffix](shards, temporary, about)


def read_features(path: Path, without: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz, a .parquet or a folder of shards, in memory.

    Args:
      without: names of arrays that are not read.
    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: not features, unfinished, or damaged; the message is one line.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, without)
    if not path.is_file():
        raise FileNotFoundError(f"no file of features: {path}")
    if path.suffix == ".parquet":
        return _read_parquet(path, without)
    return _checked(path, _read_npz(path, without))


@contextlib.contextmanager
def check_damage(path: Path, what: str) -> Iterator[None]:
    """Context manager that turns the errors of a damaged .npz into one ValueError."""
    kinds = (ValueError, OSError, EOFError, AttributeError, KeyError, TypeError, zlib.error)
    try:
        yield
    except (*kinds, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = "not an .npz" if "allow_pickle" in reason else reason  # NumPy's words for any file
        raise ValueError(f"{path} is damaged or holds no {what}: {reason}") from None


def _read_npz(path: Path, without: tuple[str, ...]) -> dict[str, np.ndarray]:
    with check_damage(path, "features"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name not in without}


def _checked(path: Path, arrays: dict) -> dict[str, np.ndarray]:
    if "names" not in arrays or "model" not in arrays:
        raise ValueError(f"{path} holds no features: it has {', '.join(arrays) or 'no arrays'}")
    return arrays


def _read_folder(folder: Path, without: tuple[str, ...]) -> dict[str, np.ndarray]:
    shards = sorted(folder.glob("features-*.npz"))
    try:
        complete = json.loads((folder / MANIFEST).read_text()).get("complete", False)
    except (OSError, ValueError):
        complete = False
    if not shards or not complete:
        state = "is unfinished: start embed again" if shards else "holds no features"
        raise ValueError(f"{folder} {state}")
    parts = [_checked(path, _read_npz(path, without)) for path in shards]
    return {
        name: parts[0][name] if name in _ONCE else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }


def _npz(shards: list[Path], out: Path, about: dict) -> None:
    """Array by array, shard by shard: one shard's array is in memory at a time."""
    del about
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in _names(shards[0]):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                if name in _ONCE:
                    np.lib.format.write_array(file, _array(shards[0], name), allow_pickle=False)
                    continue
                heads = [_head(path, name) for path in shards]
                dtype = np.result_type(*(dtype for _, dtype in heads))  # names: the longest
                shape = (sum(shape[0] for shape, _ in heads), *heads[0][0][1:])
                head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                np.lib.format.write_array_header_2_0(file, head | {"shape": shape})
                for path in shards:
                    file.write(_array(path, name).astype(dtype).tobytes())


def _head(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in a shard."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return shape, dtype


def _array(path: Path, name: str) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays[name]


def _names(path: Path) -> list[str]:
    with np.load(path) as arrays:
        return arrays.files


def _parquet(shards: list[Path], out: Path, about: dict) -> None:
    """A row an image, a row group a shard; tokens are lists of fixed length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, left_out = None, []
    try:
        for path in shards:
            with np.load(path) as arrays:
                left_out += arrays["left_out"].tolist()
                columns = {
                    name: _column(pa, arrays[name])
                    for name in arrays.files
                    if name not in (*_ONCE, *_PER_SHARD)
                }
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(out, table.schema)
            writer.write_table(table)
        shapes = {name: list(_head(shards[0], name)[0][1:]) for name in columns}
        about = {key: about[key] for key in (*ABOUT, "class_names", "predicted")}
        about |= {"shapes": shapes, "left_out": left_out}
        writer.add_key_value_metadata({"dinotwins_jax": json.dumps(about)})
    finally:
        if writer is not None:
            writer.close()


def _column(pa, values: np.ndarray):
    if values.ndim == 1:
        return pa.array(values.tolist() if values.dtype.kind == "U" else values)
    width = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)


def _read_parquet(path: Path, without: tuple[str, ...]) -> dict[str, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = [name for name in pq.read_schema(path).names if name not in without]
        table = pq.read_table(path, columns=names).combine_chunks()
        about = json.loads((pq.read_metadata(path).metadata or {}).get(b"dinotwins_jax", b"{}"))
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} is damaged or no Parquet: {error}") from None
    if "shapes" not in about:
        raise ValueError(
            f"{path} holds no features of this program: {', '.join(table.column_names)}"
        )
    arrays = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        values = column.flatten() if about["shapes"][name] else column
        plain = values.to_numpy(zero_copy_only=False)
        plain = plain.astype(np.str_) if plain.dtype == object else plain
        arrays[name] = plain.reshape(-1, *about["shapes"][name])
    for name, key in (("class_names", "class_names"), ("predicted_names", "predicted")):
        if about[key]:
            arrays[name] = np.array(about[key], np.str_)
    texts = {name: np.array(about[name], np.str_) for name in ABOUT if name in about}
    return arrays | texts | {"left_out": np.array(about["left_out"], np.str_)}


KINDS: dict[str, Callable] = {".npz": _npz, ".parquet": _parquet}
