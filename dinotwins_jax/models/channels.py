"""Backbones for pictures of another number of channels: conversion of the patch embedding."""

import numpy as np

CONVERTED = (
    "the patch embedding is summed over channels for 1, else repeated and scaled to the same sum"
)


def with_channels(params: dict, channels: int) -> dict:
    """Parameters of a ViT whose patch embedding, or the first convolution of its stem, takes `channels`."""
    embed = params["patch_embed"]
    kernel = converted(np.asarray(_first(params)["kernel"]), channels)
    changed = (
        {"conv_0": embed["conv_0"] | {"kernel": kernel}}
        if "conv_0" in embed
        else {"kernel": kernel}
    )
    return params | {"patch_embed": embed | changed}


def channels_of(params: dict) -> int:
    """Channels of the images that a ViT with these parameters takes."""
    return _first(params)["kernel"].shape[2]


def _first(params: dict) -> dict:
    """The layer that reads the pixels."""
    return params["patch_embed"].get("conv_0", params["patch_embed"])


def converted(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Converts a kernel [p, p, C, D] to another number of channels.

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
