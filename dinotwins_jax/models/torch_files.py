"""Weights of PyTorch's world from their files, without PyTorch: .safetensors, .npz, .pth."""

import io
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dinotwins_jax.models.torch_weights import vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer

# Where a checkpoint nests: the teacher is the model that DINO evaluates.
_NESTS = ("teacher", "state_dict", "model")
_HEADS = re.compile(r"^(module\.|backbone\.)*(head|dino_head|ibot_head|projector)\.")
_SAFETENSORS = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": jnp.bfloat16,
    "I64": "i8",
    "I32": "i4",
}
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def load_vit(
    path: str | Path, like: VisionTransformer | None = None
) -> tuple[VisionTransformer, dict]:
    """A ViT and its parameters from a file of DINO's, DINOv2's or timm's names.

    Args:
      like: says how many heads a model of its width has, which no weight tells; otherwise heads are
        64 wide, as in all ViTs of DINO, DeiT and timm.
    Raises:
      ValueError, OSError: no such file, not a file of weights, or not of this architecture.
    """
    weights = read_state_dict(path)
    try:
        fields, params = vit_fields(weights), vit_from_torch(weights)
        if like is not None and like.embed_dim == fields["embed_dim"]:
            fields["num_heads"] = like.num_heads
        if fields["embed_dim"] % fields["num_heads"]:
            width = fields["embed_dim"]
            raise ValueError(f"width {width} is not a multiple of 64, the width of a head")
        return VisionTransformer(**fields), params
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Names and tensors of a backbone.

    Of a training checkpoint the "teacher" is taken, or what lies under "state_dict" or "model";
    projection heads and everything that is no tensor are left out.

    Args:
      path: .safetensors, .npz, or .pth / .pt / .bin of PyTorch 1.6 and newer. Of a pickle only
        tensors are made; whatever else it asks for is refused, not run.
    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, a broken one, or a pickle that asks for something else.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    readers |= dict.fromkeys((".pth", ".pt", ".bin"), _read_torch)
    if path.suffix not in readers:
        raise ValueError(f"{path}: weights are one of {', '.join(readers)}, not '{path.suffix}'")
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights: {path}")
    try:
        found = readers[path.suffix](path)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # broken files raise nearly every built-in exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is broken or no such file: {reason}") from error
    for nest in _NESTS:
        if isinstance(found.get(nest), dict):
            found = found[nest]
    tensors = {
        name: value
        for name, value in found.items()
        if isinstance(value, np.ndarray) and not _HEADS.search(name)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors of a backbone; it has {', '.join(map(str, found))}"
        )
    return tensors


def vit_fields(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a VisionTransformer that the shapes of its weights say.

    num_heads is that of heads 64 wide. Raises ValueError for another architecture.
    """
    weights = {re.sub(r"^(module\.|backbone\.)+", "", name): w for name, w in weights.items()}
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in weights:
            raise ValueError(f"no tensor '{name}': not a ViT with an MLP; it has {_some(weights)}")
    D, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
    if grid * grid + 1 != weights["pos_embed"].shape[1]:
        raise ValueError(
            f"pos_embed {weights['pos_embed'].shape}: not a class token and a square grid"
        )
    registers = [weights[n].shape[1] for n in ("register_tokens", "reg_token") if n in weights]
    fields = {
        "embed_dim": D,
        "depth": len({n.split(".")[1] for n in weights if n.startswith("blocks.")}),
        "num_heads": -(-D // 64),
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / D,
        "num_register_tokens": registers[0] if registers else 0,
    }
    if "blocks.0.ls1.gamma" in weights:
        fields["layer_scale_init"] = 1.0  # there to make room: the weights replace it
    return fields


def _some(names) -> str:
    return ", ".join(sorted(names)[:6]) + " …"


def _read_npz(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> dict:
    """An u64 length, so many bytes of JSON, then the tensors."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise _Refused(f"tensor '{name}' is of type {entry['dtype']}")
        first, last = (start + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[first:last], np.dtype(_SAFETENSORS[entry["dtype"]]))
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


class _Refused(ValueError):
    """What a file asks for and does not get."""


class _Storage(NamedTuple):
    values: np.ndarray  # flat


class _Inert:
    """Stands for objects beside the tensors, such as the arguments of a training run."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _tensor(storage: _Storage, offset: int, size, stride, *_) -> np.ndarray:
    values = storage.values[offset:]
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(values):
        raise _Refused(f"a tensor of shape {tuple(size)} is larger than its {len(values)} numbers")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values, size, steps).copy()


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain containers; refuses every other name."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str):
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
            ("argparse", "Namespace"): _Inert,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise _Refused(f"its pickle asks for {module}.{name}, which no weights need: not loaded")

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise _Refused(f"its pickle refers to a {kind}")
        data = self._archive.read(f"{self._root}/data/{key}")
        return _Storage(np.frombuffer(data, np.dtype(dtype), count))


def _read_torch(path: Path) -> dict:
    if not zipfile.is_zipfile(path):
        raise _Refused(
            "not a zip file: truncated, or older than PyTorch 1.6; torch.save(torch.load(old), new) "
            "writes the new format"
        )
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("a zip file without one data.pkl: not written by torch.save")
        found = _Unpickler(archive, pickles[0].removesuffix("/data.pkl")).load()
    if not isinstance(found, dict):
        raise _Refused(f"it holds a {type(found).__name__}, not a dictionary of tensors")
    return found
