"""Code for a model card: how each library turns a picture into the features of an export.

Every text sets cls, [1, D], and patches, [1, N, D], of picture.jpg. Tests run them.
"""

from string import Template

from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.preprocessing import Preprocessing

_OPEN = 'ImageOps.exif_transpose(Image.open("picture.jpg"))'
_TRANSFORM = """transform = transforms.Compose(
    [
        transforms.Resize($resize, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(($height, $width)),
        transforms.ToTensor(),
        transforms.Normalize($mean, $std),
    ]
)"""
_TIMMS = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
_TIMM = """import timm
import torch
from PIL import Image, ImageOps
$imports
model = timm.create_model("local-dir:.", pretrained=True).eval()
$transform
images = transform($picture)[None]
with torch.no_grad():
    cls = model(images)  # [1, $D]
    patches = model.forward_features(images)[:, $prefix:]  # [1, $N, $D]
"""
_HF = """import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModel.from_pretrained(".").eval()
inputs = processor($picture, return_tensors="pt")
with torch.no_grad():
    tokens = model(**inputs).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, $prefix:]  # [1, $D], [1, $N, $D]
"""
_PIPELINE = """from transformers import pipeline

extract = pipeline("image-feature-extraction", model=".")
tokens = extract("picture.jpg")  # last_hidden_state as lists: [1][$T][$D]
"""
_DINO = """import json
$importsfrom pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision import transforms
from $module import $name  # the official code

arguments = json.loads(Path("config.json").read_text())["arguments"]
model = $name($arguments).eval()
model.load_state_dict(load_file("model.safetensors"))
$transform
images = transform($picture)[None]
with torch.no_grad():
    $features
"""
_DINO_FEATURES = """tokens = model.get_intermediate_layers(images, 1)[0]
cls, patches = tokens[:, 0], tokens[:, 1:]  # [1, $D], [1, $N, $D]"""
_DINOV2_FEATURES = """features = model.forward_features(images)
cls = features["x_norm_clstoken"]  # [1, $D]
patches = features["x_norm_patchtokens"]  # [1, $N, $D]"""
_PIXELS = '''

def pixels(file, resize=$resize, height=$height, width=$width):
    """The centre of a picture, u8[height, width, $C]."""
    picture = ImageOps.exif_transpose(Image.open(file))$mode
    sides = [resize * side // min(picture.size) for side in picture.size]
    picture = picture.resize(sides, Image.Resampling.BICUBIC)
    left, top = (round((a - b) / 2) for a, b in zip(sides, (width, height)))
    picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture).reshape(height, width, $C)


images = np.stack([pixels("picture.jpg")])
'''
_ONNX_IMPORTS = """import numpy as np
import onnxruntime
from PIL import Image, ImageOps
"""
_ONNX = """model = onnxruntime.InferenceSession("$file")
cls, patches = model.run(["cls", "patches"], {"images": images})  # [1, $D], [1, $N, $D]
"""
_STABLEHLO_IMPORTS = """from pathlib import Path

import numpy as np
from jax import export
from PIL import Image, ImageOps
"""
_STABLEHLO = """model = export.deserialize(bytearray(Path("$file").read_bytes()))
features = model.call(images)
cls, patches = features["cls"], features["patches"]  # [1, $D], [1, $N, $D]
"""
_OURS = """import dinotwins_jax as dt

cls, patches = dt.load(".")("picture.jpg")  # [1, $D], [1, $N, $D]
"""
_PACKAGES = {
    "timm": "`pip install timm torchvision`",
    "hf": "`pip install transformers torch torchvision`",
    "dino": "`pip install torch torchvision safetensors`, and the official repository on `PYTHONPATH`",
    "onnx": "`pip install onnxruntime numpy pillow`",
    "stablehlo": "`pip install jax flatbuffers numpy pillow`",
}


def code(target: str, vit: VisionTransformer, pre: Preprocessing, config: dict, file: str) -> str:
    """Markdown with the code blocks of a target, to be run in the directory of the export.

    Args:
      pre: of `file`.
      config: config.json of the export.
      file: of the weights or the program.
    """
    mode = {1: '.convert("L")', 3: '.convert("RGB")'}.get(pre.channels, "")
    rows, columns = vit.grid(pre.crop)
    prefix, N = 1 + vit.num_register_tokens, rows * columns
    values = {
        "picture": f"{_OPEN}{mode}",
        "mode": mode,
        "file": file,
        "resize": pre.resize,
        "height": pre.crop[0],
        "width": pre.crop[1],
        "mean": list(pre.mean),
        "std": list(pre.std),
        "C": pre.channels,
        "D": vit.embed_dim,
        "N": N,
        "T": prefix + N,
        "prefix": prefix,
    }
    blocks = [Template(text).substitute(values) for text in _blocks(target, pre, config)]
    text = "\n".join(f"```python\n{block}```\n" for block in blocks)
    return f"{_PACKAGES[target]}\n\n{text}".rstrip("\n")


def _blocks(target: str, pre: Preprocessing, config: dict) -> list[str]:
    """The texts with their placeholders."""
    if target == "timm":
        # timm has no short side for a crop that is not square: preprocessing.timm_transform.
        square = pre.crop[0] == pre.crop[1]
        parts = ("", _TIMMS) if square else ("from torchvision import transforms\n", _TRANSFORM)
        return [_TIMM.replace("$imports", parts[0]).replace("$transform", parts[1]), _OURS]
    if target == "hf":
        return [_HF, *([_PIPELINE] if pre.channels == 3 else []), _OURS]
    if target == "dino":
        return [_dino(config), _OURS]
    imports, use = {
        "onnx": (_ONNX_IMPORTS, _ONNX),
        "stablehlo": (_STABLEHLO_IMPORTS, _STABLEHLO),
    }[target]
    return [imports + _PIXELS + use]


def _dino(config: dict) -> str:
    module, _, name = config["class"].rpartition(".")
    norm = "norm_layer" in config  # an argument that JSON cannot hold
    parts = {
        "$imports": "from functools import partial\n" if norm else "",
        "$module": module,
        "$name": name,
        "$arguments": "**arguments" + (", norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)" * norm),
        "$transform": _TRANSFORM,
        "$features": (_DINO_FEATURES if norm else _DINOV2_FEATURES).replace("\n", "\n    "),
    }
    text = _DINO
    for place, part in parts.items():
        text = text.replace(place, part)
    return text
