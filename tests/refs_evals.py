"""Plain-loop references of dinotwins_jax.evals."""

import math

import numpy as np


def knn_scores(train, train_labels, test, k, temperature, num_classes):
    """One vote at a time, in float64."""
    scores = np.zeros((len(test), num_classes))
    for n, query in enumerate(np.asarray(test, np.float64)):
        similarities = []
        for key, label in zip(np.asarray(train, np.float64), train_labels, strict=True):
            if label >= 0:
                cosine = query @ key / (np.linalg.norm(query) * np.linalg.norm(key))
                similarities.append((cosine, label))
        for cosine, label in sorted(similarities, reverse=True)[:k]:
            scores[n, label] += math.exp(cosine / temperature)
    return scores


def softmax_regression(features, labels, order, weight, rate, momentum):
    """SGD as torch.optim.SGD with a cosine to zero, one image at a time, in float64."""
    weight = np.array(weight, np.float64)
    bias = np.zeros(weight.shape[1])
    velocity_weight, velocity_bias = np.zeros_like(weight), np.zeros_like(bias)
    for step, batch in enumerate(order):
        gradient_weight, gradient_bias = np.zeros_like(weight), np.zeros_like(bias)
        for image in batch:
            x = np.asarray(features[image], np.float64)
            logits = x @ weight + bias
            error = np.exp(logits - logits.max())
            error /= error.sum()
            error[labels[image]] -= 1.0
            gradient_weight += np.outer(x, error) / len(batch)
            gradient_bias += error / len(batch)
        now = 0.5 * rate * (1.0 + math.cos(math.pi * step / len(order)))
        velocity_weight = momentum * velocity_weight + gradient_weight
        velocity_bias = momentum * velocity_bias + gradient_bias
        weight -= now * velocity_weight
        bias -= now * velocity_bias
    return weight, bias


def knn_multilabel_scores(train, multi_hot, test, k, temperature):
    """Share of the k nearest's votes that each class has, one neighbour at a time, in float64."""
    scores = np.zeros((len(test), multi_hot.shape[1]))
    for n, query in enumerate(np.asarray(test, np.float64)):
        similarities = []
        for m, key in enumerate(np.asarray(train, np.float64)):
            cosine = query @ key / (np.linalg.norm(query) * np.linalg.norm(key))
            similarities.append((cosine, m))
        total = 0.0
        for cosine, m in sorted(similarities, reverse=True)[:k]:
            vote = math.exp(cosine / temperature)
            total += vote
            for c in range(multi_hot.shape[1]):
                scores[n, c] += vote * bool(multi_hot[m, c])
        scores[n] /= total
    return scores


def adamw_trajectory(p, gradients, rates, weight_decay, b1=0.9, b2=0.999, eps=1e-8):
    """One tensor after AdamW steps with decoupled decay (arXiv:1711.05101, Algorithm 2), in float64."""
    p = np.array(p, np.float64)
    first, second = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = np.asarray(g, np.float64)
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        direction = first / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
        p = p - rate * (direction + weight_decay * p)
    return p
