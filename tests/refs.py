"""Plain-loop references in float64, written from the papers' equations."""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Algorithm 1 of arXiv:2104.14294 with multi-crop: student [B, V, K], teacher [B, 2, K]."""
    terms = []
    for t in range(teacher.shape[1]):
        for v in range(student.shape[1]):
            if t == v:
                continue
            for b in range(student.shape[0]):
                p = softmax((teacher[b, t] - center) / teacher_temp)
                q = softmax(student[b, v] / student_temp)
                terms.append(-sum(p[k] * np.log(q[k]) for k in range(len(p))))
    return np.mean(terms)


def barlow_twins_loss(z_a, z_b, lambd):
    """Eq. 1-2 of arXiv:2103.03230: (loss, on_diag, off_diag) of [B, D] views."""
    z_a = (z_a - z_a.mean(0)) / np.sqrt(z_a.var(0) + 1e-5)
    z_b = (z_b - z_b.mean(0)) / np.sqrt(z_b.var(0) + 1e-5)
    B, D = z_a.shape
    on_diag = off_diag = 0.0
    for i in range(D):
        for j in range(D):
            c = sum(z_a[b, i] * z_b[b, j] for b in range(B)) / B
            if i == j:
                on_diag += (c - 1) ** 2
            else:
                off_diag += c**2
    return on_diag + lambd * off_diag, on_diag, off_diag


def dino_head_with_batch_norm(weights, x):
    """Logits of the official head with use_bn_in_head, from its state dict, in float64."""
    x = np.asarray(x, np.float64)
    for linear, norm in (("mlp.0", "mlp.1"), ("mlp.3", "mlp.4"), ("mlp.6", None)):
        x = x @ weights[f"{linear}.weight"].T + weights[f"{linear}.bias"]
        if norm is not None:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
            x = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    v = weights["last_layer.weight_v"]
    return x @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T


def adamw_step(params, grads, mask, memory, t, lr, decay, b1=0.9, b2=0.999, eps=1e-8):
    """One AdamW step (arXiv:1711.05101) on a nested dict; `memory` keeps the moments by path."""

    def walk(p, g, m, path):
        if isinstance(p, dict):
            return {k: walk(p[k], g[k], m[k], (*path, k)) for k in p}
        g = np.asarray(g, np.float64)
        first, second = memory.get(path, (np.zeros_like(g), np.zeros_like(g)))
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        memory[path] = first, second
        adam = first / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
        return p * (1 - lr * decay * m) - lr * adam

    return walk(params, grads, mask, ())


def random_resized_crop(rng, height, width, scale, ratio):
    """(top, left, height, width) as torchvision's RandomResizedCrop.get_params draws them."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def truncated_gaussian_blur(planes, radius, taps):
    """torchvision's GaussianBlur(taps, radius) of planes [3, h, w], tap by tap; edges reflected."""
    reach = taps // 2
    kernel = np.exp([-0.5 * ((t - reach) / radius) ** 2 for t in range(taps)])
    kernel /= kernel.sum()
    _, height, width = planes.shape
    padded = np.pad(planes, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    result = np.zeros(planes.shape)
    for i in range(taps):
        for j in range(taps):
            result += kernel[i] * kernel[j] * padded[:, i : i + height, j : j + width]
    return result


def weighted_sum(loss, loss_state, student, teacher, hparams):
    """(sum of weight x loss, {term: unweighted loss}, {term: its metrics}) of a losses.WeightedSum."""
    total, values, metrics = 0.0, {}, {}
    for name, (weight, term) in loss.terms.items():
        values[name], _, metrics[name] = term.apply(loss_state[name], student, teacher, hparams)
        total = total + weight * values[name]
    return total, values, metrics
