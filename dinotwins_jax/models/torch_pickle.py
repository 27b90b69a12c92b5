"""State dicts from torch.save files, by a restricted unpickler that runs no code."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
# Objects besides tensors; DINO's optimiser stores lr and weight decay as numpy scalars.
_INERT = {
    ("argparse", "Namespace"),
    ("torch", "device"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


class Refused(ValueError):
    """Raised for file content that is not loaded."""


class _Storage(NamedTuple):
    content: bytes
    dtype: np.dtype


class _Inert:
    """Placeholder for objects other than tensors, such as the arguments of a training run."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _tensor(storage: _Storage, offset: int, size, stride, _grad, _hooks, metadata=None):
    if metadata:
        raise Refused(f"a tensor is a lazy view ({metadata}): save its clone")
    item = storage.dtype.itemsize
    steps = [step * item for step in stride]
    # np.ndarray checks offset and strides against the buffer; as_strided would read past it.
    return np.ndarray(size, storage.dtype, storage.content, offset * item, steps).copy()


class _Unpickler(pickle.Unpickler):
    """Unpickler of tensors and plain containers; refuses every other name."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str):
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
        } | dict.fromkeys(_INERT, _Inert)
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return name  # not the type: a pickle may set attributes on it
        raise Refused(
            f"its pickle refers to {module}.{name}, which weights do not need: not loaded"
        )

    def persistent_load(self, pid):
        kind, storage, key, *_ = pid
        if kind != "storage":
            raise Refused(f"its pickle refers to a {kind}")
        data = self._archive.read(f"{self._root}/data/{key}")
        return _Storage(data, np.dtype(_STORAGES[storage]))


def read_torch(path: Path) -> dict:
    """Reads a torch.save file. Raises Refused for an older format, no dictionary, or unsafe content."""
    if not zipfile.is_zipfile(path):
        raise Refused(
            "not a zip file: truncated, or older than PyTorch 1.6; torch.save(torch.load(old), new) "
            "writes the new format"
        )
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("a zip file without one data.pkl: not written by torch.save")
        found = _Unpickler(archive, pickles[0].removesuffix("/data.pkl")).load()
    if not isinstance(found, dict):
        raise Refused(f"it holds a {type(found).__name__}, not a dictionary of tensors")
    return found
