"""Backbones for pictures of another number of channels: conversion of the patch embedding."""

import numpy as np

CONVERTED = (
    "the patch embedding is summed over channels for 1, else repeated and scaled to the same sum"
)


def with_channels(params: dict, channels: int) -> dict:
    """Parameters of a ViT whose patch embedding takes `channels`."""
    embed = params["patch_embed"]
    kernel = converted(np.asarray(embed["kernel"]), channels)
    return params | {"patch_embed": embed | {"kernel": kernel}}


def converted(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Converts a patch embedding [p, p, C, D] to another number of channels.

    To 1: the sum over channels, which treats a grey picture as it did the same one in colours. To n: the
    channels repeated, cut to n, and times C / n, so that equal channels give what they gave.

    Source: timm's adapt_input_conv.
    """
    there = kernel.shape[2]
    if there == channels:
        return kernel
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // there), 1))[:, :, :channels]
    return repeated * np.asarray(there / channels, kernel.dtype)
