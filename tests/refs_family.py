"""Plain-loop references in float64 of the family's losses, written from the papers' equations."""

import math

import numpy as np
from refs import softmax


def unit(x):
    return x / np.linalg.norm(x)


def byol_loss(predictions, targets):
    """Eq. 2 of arXiv:2006.07733, both ways: [B, 2, D] each."""
    total = 0.0
    for b in range(len(predictions)):
        for v in range(2):
            total += np.sum((unit(predictions[b, v]) - unit(targets[b, 1 - v])) ** 2)
    return total / len(predictions)


def nt_xent_loss(z, temp):
    """Algorithm 1 of arXiv:2002.05709: z [B, 2, D]."""
    rows = [unit(z[b, v]) for b in range(len(z)) for v in range(2)]
    n, terms = len(rows), []
    for i in range(n):
        j = i ^ 1  # the other view of the image
        others = [math.exp(rows[i] @ rows[k] / temp) for k in range(n) if k != i]
        terms.append(-math.log(math.exp(rows[i] @ rows[j] / temp) / sum(others)))
    return np.mean(terms)


def vicreg_loss(z_a, z_b, similarity=25.0, variance=25.0, covariance=1.0):
    """Eq. 1-6 of arXiv:2105.04906, with the official halves of the two hinges."""
    B, D = z_a.shape
    invariance = np.mean((z_a - z_b) ** 2)
    hinge = redundancy = 0.0
    for z in (z_a, z_b):
        z0 = z - z.mean(0)
        for i in range(D):
            hinge += max(0.0, 1 - math.sqrt(np.sum(z0[:, i] ** 2) / (B - 1) + 1e-4)) / D / 2
            for j in range(D):
                if i != j:
                    redundancy += (sum(z0[b, i] * z0[b, j] for b in range(B)) / (B - 1)) ** 2 / D
    return similarity * invariance + variance * hinge + covariance * redundancy


def koleo_loss(x):
    """Eq. 2 of arXiv:1806.03198 for unit vectors, eps 1e-8."""
    x, terms = [unit(row) for row in x], []
    for i, row in enumerate(x):
        near = min(np.linalg.norm(row - other) for j, other in enumerate(x) if j != i)
        terms.append(-math.log(near + 1e-8))
    return np.mean(terms)


def sinkhorn_knopp(logits, temp, num_iters=3):
    """Rows and columns of exp(logits / temp) in turns, element by element."""
    B, K = logits.shape
    q = np.exp(logits / temp)
    q /= q.sum()
    for _ in range(num_iters):
        for k in range(K):
            q[:, k] /= q[:, k].sum() * K
        for b in range(B):
            q[b] /= q[b].sum() * B
    return q * B


def ibot_loss(student, teacher, center, masks, student_temp, teacher_temp):
    """Eq. 2 of arXiv:2111.07832: [B, N, K] logits, bool [B, N]; mean over each crop's hidden patches."""
    total = 0.0
    for b in range(len(masks)):
        terms = []
        for n in np.flatnonzero(masks[b]):
            p = softmax((teacher[b, n] - center) / teacher_temp)
            terms.append(-np.sum(p * np.log(softmax(student[b, n] / student_temp))))
        total += np.mean(terms) if terms else 0.0
    return total / len(masks)


def block_mask(draws, target, grid, min_patches):
    """One crop's mask by the official procedure; draws() gives four uniform numbers for a try."""
    h, w = grid
    mask, count, tries = np.zeros(grid, bool), 0, 0
    while count < target and tries < 10:
        area, aspect, top, left = draws()
        room = min(target - count, 0.5 * h * w)
        area = min_patches + area * (room - min_patches)
        aspect = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        tries += 1
        if not (height < h and width < w):
            continue
        top, left = int(top * (h - height + 1)), int(left * (w - width + 1))
        new = sum(
            not mask[i, j] for i in range(top, top + height) for j in range(left, left + width)
        )
        if 0 < new <= room:
            mask[top : top + height, left : left + width] = True
            count, tries = count + new, 0
    return mask
