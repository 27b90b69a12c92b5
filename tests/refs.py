"""Plain-loop references in float64, straight from the papers' equations."""

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
