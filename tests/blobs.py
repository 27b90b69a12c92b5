"""Features of made-up classes."""

import numpy as np


def blobs(num_images, dim, num_classes, *, spread=0.5, seed=0):
    """Features around one random corner per class, balanced labels; corners do not depend on seed."""
    corners = np.random.RandomState(99).normal(size=(num_classes, dim))
    rng = np.random.RandomState(seed)
    labels = np.arange(num_images, dtype=np.int32) % num_classes
    noise = rng.normal(size=(num_images, dim))
    return (corners[labels] + spread * noise).astype(np.float32), labels
