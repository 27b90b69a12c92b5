"""Plain-loop references of the multi-label probes."""

import math

import numpy as np


def sigmoid_regression(features, labels, order, weight, rate, momentum):
    """SGD on the classes' binary cross-entropies, added up, one image at a time, in float64."""
    weight = np.array(weight, np.float64)
    bias = np.zeros(len(weight))
    velocity_weight, velocity_bias = np.zeros_like(weight), np.zeros_like(bias)
    for step, batch in enumerate(order):
        gradient_weight, gradient_bias = np.zeros_like(weight), np.zeros_like(bias)
        for image in batch:
            x = np.asarray(features[image], np.float64)
            for c in range(len(weight)):
                error = 1 / (1 + math.exp(-(weight[c] @ x + bias[c]))) - float(labels[image][c])
                gradient_weight[c] += error * x / len(batch)
                gradient_bias[c] += error / len(batch)
        now = 0.5 * rate * (1.0 + math.cos(math.pi * step / len(order)))
        velocity_weight = momentum * velocity_weight + gradient_weight
        velocity_bias = momentum * velocity_bias + gradient_bias
        weight -= now * velocity_weight
        bias -= now * velocity_bias
    return weight, bias
