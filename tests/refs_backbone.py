"""Plain-loop references of DINOv2's and DINOv3's block components, in float64 numpy."""

import math

import numpy as np


def rotated(x, grid, prefix, base=100.0):
    """Rotates x [T, D] of one head, prefix + h * w tokens, in each plane (i, i + D / 2) of a patch.

    DINOv3: the angle is 2 pi * coordinate / period; i < D / 4 turns by the row, the others by the column.
    """
    x = np.asarray(x, np.float64)
    D = x.shape[1]
    out = x.copy()
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = prefix + row * grid[1] + column
            y = 2 * (row + 0.5) / grid[0] - 1
            z = 2 * (column + 0.5) / grid[1] - 1
            for i in range(D // 2):
                place = y if i < D // 4 else z
                period = base ** (2 * (i % (D // 4)) / (D // 2))
                angle = 2 * math.pi * place / period
                a, b = x[token, i], x[token, i + D // 2]
                out[token, i] = a * math.cos(angle) - b * math.sin(angle)
                out[token, i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def swiglu(x, w12, b12, w3, b3):
    """x [N, I] -> [N, O]; w12 [I, 2 H], w3 [H, O]: w3(silu(x w1) * (x w2)), the first half of w12 is w1."""
    x = np.asarray(x, np.float64)
    hidden = w3.shape[0]
    out = np.zeros((len(x), w3.shape[1]))
    for n in range(len(x)):
        gated = np.zeros(hidden)
        for h in range(hidden):
            gate = sum(x[n, i] * w12[i, h] for i in range(x.shape[1])) + b12[h]
            value = sum(x[n, i] * w12[i, hidden + h] for i in range(x.shape[1])) + b12[hidden + h]
            gated[h] = gate / (1 + math.exp(-gate)) * value
        for o in range(w3.shape[1]):
            out[n, o] = sum(gated[h] * w3[h, o] for h in range(hidden)) + b3[o]
    return out


def slope(f, x, direction, step=1e-5):
    """Central difference of the scalar f at x along direction, float64."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def conv_stem(image, params):
    """Tokens [N, D] of an image [H, W, C]: convolutions 3 x 3, stride 2, zeros around, each followed by
    ReLU, then a linear map."""
    x = np.asarray(image, np.float64)
    for number in range(sum(name.startswith("conv_") for name in params)):
        kernel, bias = params[f"conv_{number}"]["kernel"], params[f"conv_{number}"]["bias"]
        H, W, C = x.shape
        out = np.zeros((H // 2, W // 2, len(bias)))
        for row in range(H // 2):
            for column in range(W // 2):
                out[row, column] = bias
                for i in range(3):
                    for j in range(3):
                        y, z = 2 * row + i - 1, 2 * column + j - 1
                        if 0 <= y < H and 0 <= z < W:
                            out[row, column] += sum(x[y, z, c] * kernel[i, j, c] for c in range(C))
        x = np.maximum(out, 0.0)
    return x.reshape(-1, x.shape[-1]) @ params["kernel"] + params["bias"]
