"""A ViT as an ONNX graph, written node by node from its parameters.

Letters: b images (any number), h w C image, p patch size, N patches, T tokens (class token, registers,
patches), D embed, H heads, d width of a head.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dinotwins_jax.models.positions import interpolate_pos_embed, rope_of
from dinotwins_jax.models.vit import VisionTransformer, as_pair

OPSET = 17  # the first with LayerNormalization
_IR_VERSION = (
    8  # of the first onnx release with that opset; runtimes refuse newer ones than their own
)


def onnx_model(
    vit: VisionTransformer,
    params,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> bytes:
    """The forward pass at one image size, for any number of images, in float32.

    Args:
      size: (height, width) of the images in pixels, multiples of the patch size; learned positions are
        interpolated to it.
      mean, std: of each channel, for values in [0, 1].
    Returns:
      The content of an .onnx file. Its input is images u8[b, h, w, C], which it normalises, its outputs
      are cls f32[b, D] and patches f32[b, N, D], the fields of ViTOutput.
    """
    graph = _Graph()
    x = _tokens(graph, vit, params, size, np.float32(mean), np.float32(std))
    rope = None
    if vit.positions == "rope":
        grid, width = vit.grid(size), vit.embed_dim // vit.num_heads
        rope = [np.asarray(table) for table in rope_of(grid, width, 1 + vit.num_register_tokens)]
    for i in range(vit.depth):
        x = _block(graph, vit, x, params[f"blocks_{i}"], rope, f"blocks.{i}")
    x = graph.norm(x, params["norm"], vit.norm_eps, "norm")
    # A scalar index removes the axis.
    cls = graph("Gather", x, graph.constant(np.int64(0)), axis=1, name="cls")
    first, end = (np.int64([n]) for n in (1 + vit.num_register_tokens, np.iinfo(np.int64).max))
    patches = graph("Slice", x, first, end, np.int64([1]), name="patches")
    rows, columns = vit.grid(size)
    outputs = {cls: ("b", vit.embed_dim), patches: ("b", rows * columns, vit.embed_dim)}
    return graph.model({"images": ("b", *size, len(mean))}, outputs)


class _Graph:
    """Nodes in the order of computation, and constants. Values are named by strings."""

    def __init__(self):
        import onnx.helper
        import onnx.numpy_helper

        self._onnx = onnx
        self._nodes, self._constants = [], {}

    def constant(self, value: np.ndarray, name: str = "") -> str:
        name = name or f"constant.{len(self._constants)}"
        value = np.asarray(value, order="C")
        self._constants[name] = self._onnx.numpy_helper.from_array(value, name)
        return name

    def __call__(self, op: str, *inputs, parts: int = 1, name: str = "", **attributes) -> Any:
        """Adds a node and returns its output, or a list of `parts` outputs; arrays become constants."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        name = name or f"{op}.{len(self._nodes)}"
        outputs = [name] if parts == 1 else [f"{name}.{i}" for i in range(parts)]
        node = self._onnx.helper.make_node(op, names, outputs, name=name, **attributes)
        self._nodes.append(node)
        return outputs[0] if parts == 1 else outputs

    def cast(self, x: str) -> str:
        return self("Cast", x, to=self._onnx.TensorProto.FLOAT)

    def dense(self, x: str, layer, name: str) -> str:
        kernel = self.constant(np.asarray(layer["kernel"]), f"{name}.kernel")
        bias = self.constant(np.asarray(layer["bias"]), f"{name}.bias")
        return self("Add", self("MatMul", x, kernel), bias, name=name)

    def norm(self, x: str, layer, eps: float, name: str) -> str:
        scale = self.constant(np.asarray(layer["scale"]), f"{name}.scale")
        bias = self.constant(np.asarray(layer["bias"]), f"{name}.bias")
        return self("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps, name=name)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
        return self("Reshape", x, np.int64(shape))

    def model(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> bytes:
        """The whole model; inputs are uint8, outputs float32, by name and shape."""
        kinds, helper = self._onnx.TensorProto, self._onnx.helper
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes,
            "vit",
            [info(name, kinds.UINT8, shape) for name, shape in inputs.items()],
            [info(name, kinds.FLOAT, shape) for name, shape in outputs.items()],
            list(self._constants.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        options = {"opset_imports": [opset], "ir_version": _IR_VERSION}
        options |= {"producer_name": "dinotwins_jax"}
        return helper.make_model(graph, **options).SerializeToString()


def _tokens(graph: _Graph, vit, params, size, mean, std) -> str:
    """The tokens [b, T, D] that enter the first block."""
    p, (rows, columns) = vit.patch_size, vit.grid(size)
    x = graph("Div", graph.cast("images"), np.float32(255))
    x = graph("Div", graph("Sub", x, mean), std)
    embed = params["patch_embed"]
    if "conv_0" in embed:
        x = _convolutions(graph, x, embed)
    else:
        x = graph.reshape(x, -1, rows, p, columns, p, len(mean))
        x = graph("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    kernel = np.asarray(embed["kernel"]).reshape(-1, vit.embed_dim)
    x = graph.reshape(x, -1, rows * columns, len(kernel))
    x = graph.dense(x, {"kernel": kernel, "bias": embed["bias"]}, "patch_embed")
    prefix = np.asarray(params["cls_token"])
    if vit.positions == "learned":
        stored = vit.grid(as_pair(vit.image_size))
        positions = jnp.asarray(params["pos_embed"])
        positions = interpolate_pos_embed(
            positions, stored, (rows, columns), vit.position_interpolation
        )
        prefix = prefix + np.asarray(positions[:, :1])
        x = graph("Add", x, graph.constant(np.asarray(positions[:, 1:]), "pos_embed"))
    if vit.num_register_tokens:
        prefix = np.concatenate([prefix, np.asarray(params["register_tokens"])], axis=1)
    batch = graph("Shape", "images", start=0, end=1)
    shape = graph("Concat", batch, np.int64(prefix.shape[1:]), axis=0)
    prefix = graph("Expand", graph.constant(prefix, "prefix_tokens"), shape)
    return graph("Concat", prefix, x, axis=1)


def _convolutions(graph: _Graph, x: str, embed) -> str:
    """Images [b, h, w, C] -> [b, h / p, w / p, D], the convolutions of models/stem.py."""
    x = graph("Transpose", x, perm=[0, 3, 1, 2])
    for i in range(sum(name.startswith("conv_") for name in embed)):
        layer, name = embed[f"conv_{i}"], f"patch_embed.conv_{i}"
        kernel = graph.constant(np.asarray(layer["kernel"]).transpose(3, 2, 0, 1), f"{name}.kernel")
        bias = graph.constant(np.asarray(layer["bias"]), f"{name}.bias")
        x = graph("Conv", x, kernel, bias, strides=[2, 2], pads=[1, 1, 1, 1], name=name)
        x = graph("Relu", x)
    return graph("Transpose", x, perm=[0, 2, 3, 1])


def _block(graph: _Graph, vit, x: str, params, rope, name: str) -> str:
    for norm, branch, gamma in (("norm1", _attention, "gamma1"), ("norm2", _ffn, "gamma2")):
        y = graph.norm(x, params[norm], vit.norm_eps, f"{name}.{norm}")
        y = branch(graph, vit, y, params, rope, name)
        if vit.layer_scale_init is not None:
            y = graph("Mul", y, graph.constant(np.asarray(params[gamma]), f"{name}.{gamma}"))
        x = graph("Add", x, y)
    return x


def _attention(graph: _Graph, vit, x: str, params, rope, name: str) -> str:
    """softmax(q k^T / sqrt(d)) v, projected: [b, T, D] -> [b, T, D]."""
    params, name = params["attn"], f"{name}.attn"
    H, width = vit.num_heads, vit.embed_dim // vit.num_heads
    parts = graph("Split", graph.dense(x, params["qkv"], f"{name}.qkv"), parts=3, axis=-1)
    heads = [graph.reshape(part, 0, 0, H, width) for part in parts]
    q, k, v = (graph("Transpose", part, perm=[0, 2, 1, 3]) for part in heads)  # [b, H, T, d]
    if rope is not None:
        q, k = (_rotate(graph, part, *rope) for part in (q, k))
    logits = graph("MatMul", q, graph("Transpose", k, perm=[0, 1, 3, 2]))
    weights = graph("Softmax", graph("Mul", logits, np.float32(width**-0.5)), axis=-1)
    y = graph("Transpose", graph("MatMul", weights, v), perm=[0, 2, 1, 3])
    return graph.dense(graph.reshape(y, 0, 0, vit.embed_dim), params["proj"], f"{name}.proj")


def _rotate(graph: _Graph, x: str, cos: np.ndarray, sin: np.ndarray) -> str:
    """positions.rotate of x [b, H, T, d]; cos, sin: f32[T, d / 2]."""
    a, b = graph("Split", x, parts=2, axis=-1)
    left = graph("Sub", graph("Mul", a, cos), graph("Mul", b, sin))
    right = graph("Add", graph("Mul", b, cos), graph("Mul", a, sin))
    return graph("Concat", left, right, axis=-1)


def _ffn(graph: _Graph, vit, x: str, params, rope, name: str) -> str:
    """The MLP or SwiGLU: [b, T, D] -> [b, T, D]."""
    del rope
    params, name = params["mlp"], f"{name}.mlp"
    if vit.ffn == "swiglu":
        gate, value = graph("Split", graph.dense(x, params["w12"], f"{name}.w12"), parts=2, axis=-1)
        x = graph("Mul", graph("Mul", gate, graph("Sigmoid", gate)), value)
        return graph.dense(x, params["w3"], f"{name}.w3")
    x = graph.dense(x, params["fc1"], f"{name}.fc1")
    cdf = graph("Add", graph("Erf", graph("Mul", x, np.float32(0.5**0.5))), np.float32(1))
    x = graph("Mul", x, graph("Mul", cdf, np.float32(0.5)))
    return graph.dense(x, params["fc2"], f"{name}.fc2")
