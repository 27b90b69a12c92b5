"""Plain-loop references of attention maps and of their scores against masks, in float64."""

import numpy as np
import scipy.linalg


def rollout(attentions, grid, prefix):
    """The product of all blocks' matrices, entry by entry, and its class-token row."""
    attentions = [np.asarray(attention, np.float64) for attention in attentions]
    images, _, tokens, _ = attentions[0].shape
    maps = np.zeros((images, *grid))
    for b in range(images):
        product = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
        for attention in attentions:
            matrix = [[0.0] * tokens for _ in range(tokens)]
            for i in range(tokens):
                for j in range(tokens):
                    mean = sum(attention[b, :, i, j]) / len(attention[b])
                    matrix[i][j] = mean + (1.0 if i == j else 0.0)
                total = sum(matrix[i])
                matrix[i] = [value / total for value in matrix[i]]
            product = [
                [sum(matrix[i][k] * product[k][j] for k in range(tokens)) for j in range(tokens)]
                for i in range(tokens)
            ]
        for cell in range(grid[0] * grid[1]):
            maps[b, cell // grid[1], cell % grid[1]] = product[0][prefix + cell]
    return maps


def upsample(kept, size):
    """Nearest: every pixel takes the cell that its centre lies in."""
    h, w = kept.shape
    pixels = np.zeros(size, bool)
    for y in range(size[0]):
        for x in range(size[1]):
            pixels[y, x] = kept[int((y + 0.5) * h / size[0]), int((x + 0.5) * w / size[1])]
    return pixels


def jaccard(a, b):
    """Of two masks of pixels."""
    both = either = 0
    for p, q in zip(a.ravel(), b.ravel(), strict=True):
        both += bool(p and q)
        either += bool(p or q)
    return both / either if either else 0.0


def box(mask):
    """(top, left, bottom, right), the last two outside."""
    places = [place for place in np.ndindex(mask.shape) if mask[place]]
    ys, xs = [y for y, _ in places], [x for _, x in places]
    return min(ys), min(xs), max(ys) + 1, max(xs) + 1


def box_pixels(corners, size):
    pixels = np.zeros(size, bool)
    pixels[corners[0] : corners[2], corners[1] : corners[3]] = True
    return pixels


def largest_part(kept):
    """The largest 4-connected part of a grid, found by flooding; the first one met among equals."""
    left = {place for place in np.ndindex(kept.shape) if kept[place]}
    best = []
    for start in sorted(left):
        if start not in left:
            continue
        part, front = [], [start]
        left.remove(start)
        while front:
            y, x = front.pop()
            part.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    front.append(near)
        if len(part) > len(best):
            best = part
    mask = np.zeros(kept.shape, bool)
    for place in best:
        mask[place] = True
    return mask


def box_found(region, objects):
    """Whether the box of a region of pixels has IoU >= 0.5 with the box of an object."""
    if not region.any():
        return False
    mine = box_pixels(box(region), region.shape)
    return any(
        jaccard(mine, box_pixels(box(mask), mask.shape)) >= 0.5 for mask in objects if mask.any()
    )


def cross_fit(values):
    """values[image][candidate] -> (value that each image gets, candidates used on even and odd ones)."""
    used = []
    for half in (0, 1):
        others = [row for i, row in enumerate(values) if i % 2 != half]
        totals = [sum(column) / len(others) for column in zip(*others, strict=True)]
        used.append(totals.index(max(totals)))
    return [row[used[i % 2]] for i, row in enumerate(values)], used


def mean_sem(values):
    """Mean and standard error in %."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return 100 * mean, 100 * (variance / n) ** 0.5


def cut_vector(patches, tau, centre):
    """Second smallest solution of (D - W) y = lambda D y, from SciPy's generalised solver."""
    patches = np.asarray(patches, np.float64)
    if centre:
        patches = patches - patches.mean(axis=0)
    n = len(patches)
    weights = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            lengths = np.linalg.norm(patches[i]) * np.linalg.norm(patches[j])
            weights[i, j] = 1.0 if patches[i] @ patches[j] / lengths > tau else 1e-5
    degrees = np.diag(weights.sum(axis=1))
    _, vectors = scipy.linalg.eigh(degrees - weights, degrees)
    return vectors[:, 1]
