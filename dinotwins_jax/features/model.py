"""A trained backbone as a function of pictures; `loading.load` makes one.

Letters: B images, N patches, E width of a token, h x w patches.
"""

import os
from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import jax
import numpy as np

from dinotwins_jax.data.pictures import Picture, Pictures, listed
from dinotwins_jax.data.reading import RGB, BadImage, Reading
from dinotwins_jax.evals.attention import cls_attention
from dinotwins_jax.evals.features import checksum
from dinotwins_jax.evals.view import View
from dinotwins_jax.features.classifier import Classifier, Predictions, load_classifier
from dinotwins_jax.models.vit import VisionTransformer, as_pair

# Below so many operations a short batch is filled up: compiled once, and equal to a long one to the bit.
_CHEAP_BATCH = 2e11


class Features(NamedTuple):
    """Tokens of images after the final LayerNorm.

    cls: f32[B, E] class tokens; patches: f32[B, N, E], row by row.
    """

    cls: np.ndarray
    patches: np.ndarray


class Model:
    """A backbone with its parameters and the preprocessing that belongs to them.

    Attributes:
      module: the VisionTransformer, a Flax module; module.apply({"params": params}, views) -> ViTOutput.
      params: its parameters, on this process' devices.
      config: ConfigDict of the run that trained it; None for weights from elsewhere.
      source: where it was loaded from.
      view: resize, centre crop, canvas, mean and std of evaluation, and the batch size.
      reading: channels of a picture, and the window of samples wider than 8 bits.
    """

    def __init__(
        self,
        module: VisionTransformer,
        params,
        view: View,
        *,
        reading: Reading = RGB,
        config=None,
        source: str = "",
    ):
        self.module, self.params, self.view = module, params, view
        self.reading, self.config, self.source = reading, config, source

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest picture that the run reads, config.data.max_pixels; 0: Pillow's limit."""
        return 0 if self.config is None else self.config.data.get("max_pixels", 0)

    @cached_property
    def identity(self) -> str:
        """sha256 of the parameters and the preprocessing: features of two models never mix."""
        view = self.view._replace(batch_size=0, put=None, report=None)
        rule = self.module.position_interpolation
        other = "" if rule == "dino" else f" {rule}"
        seen = f"{view} {self.reading} {np.dtype(self.module.dtype)}{other}"
        seen = np.array(seen.encode())
        return checksum({"params": self.params, "seen": seen})

    def __call__(self, images: Picture, *, batch_size: int | None = None) -> Features:
        """Features of pictures, in their order.

        Args:
          images: one or a sequence of paths, PIL images, u8[H, W, 3] or u8[H, W] arrays of any sizes;
            or u8[B, H, W, 3].
          batch_size: images on the devices at once; by default that of evaluation, fewer for a few
            images where a whole batch would be expensive.
        Returns:
          Features, numpy. From batch_size images on, or with the same batch_size, they equal those of
          evaluation to the bit; otherwise in all but the last bits.
        Raises:
          BadImage, a ValueError: a picture that cannot be read; the message names it.
          TypeError, ValueError: no pictures, or something else.
        """
        return Features(*self._map(partial(tokens, self.module), images, batch_size))

    def attention(self, images: Picture, *, batch_size: int | None = None) -> np.ndarray:
        """Attention of the class token to the patches in the last block, f32[B, heads, h, w].

        Args: as of a call.
        """
        return self._map(partial(_attention, self.module), images, batch_size)

    def predict(
        self, images: Picture, classifier: Classifier | str | os.PathLike, *, batch_size=None
    ) -> Predictions:
        """Classes of pictures and their probabilities, by a classifier of `probe` or its file.

        Args:
          images, batch_size: as of a call.
        Raises:
          ValueError, OSError: as of a call; no such file, or a classifier for another model.
        """
        if not isinstance(classifier, Classifier):
            classifier = load_classifier(classifier)
        classifier.check_model(self.identity)
        found = self(images, batch_size=batch_size)
        return classifier.predict({"cls": found.cls, "mean_patch": found.patches.mean(axis=1)})

    def preprocess(self, image: Picture) -> np.ndarray:
        """One picture as the module takes it, f32[h, w, C]: resized, cropped, normalised."""
        views = self._map(_pixels, image, 1)
        if len(views) != 1:
            raise ValueError(f"preprocess takes one image, not {len(views)}")
        return views[0]

    def batches(
        self, source, function, *, indices=None, batch_size: int | None = None
    ) -> Iterator[tuple]:
        """Yields (function(params, views) on the host, record indices i64[b]) over records of a Source.

        Unreadable records are left out. A batch is computed while the one before is fetched.

        Args:
          indices: of the records; None: all.
        """
        view = self.view._replace(batch_size=batch_size or self.view.batch_size)
        running = None
        for views, index, valid in view.batches(source, indices, bad_limit=1.0):
            following = function(self.params, views), index, valid
            if running:
                yield _fetched(*running)
            running = following
        yield _fetched(*running)

    def _map(self, function, images, batch_size):
        """function(params, views) over pictures, as numpy; raises for one that cannot be read."""
        pictures = Pictures(listed(images), self.view.canvas_size, self.reading)
        pictures.max_pixels = self.max_pixels
        if not len(pictures):
            raise ValueError("no images: give at least one")
        view = self._view(len(pictures), batch_size)
        found, indices = view.map(partial(function, self.params), pictures, bad_limit=1.0)
        if len(indices) < len(pictures):
            for i in np.setdiff1d(np.arange(len(pictures)), indices).tolist():
                pictures[i]  # raises BadImage with its name
                raise BadImage(pictures.name(i), "unreadable in its batch, readable now")
        return found

    def _view(self, count: int, batch_size: int | None) -> View:
        """The view with the batch size for so many images."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be positive")
        whole = batch_size or self.view.batch_size
        if batch_size is None and count < whole and self._operations(whole) > _CHEAP_BATCH:
            whole = min(whole, max(jax.local_device_count(), 1 << (count - 1).bit_length()))
        return self.view._replace(batch_size=whole)

    def _operations(self, batch: int) -> float:
        """Floating-point operations of a batch, without attention."""
        rows, columns = self.module.grid(as_pair(self.view.crop))
        weights = sum(x.size for x in jax.tree.leaves(self.params))
        return 2.0 * weights * rows * columns * batch


def _fetched(rows, index: np.ndarray, valid: np.ndarray) -> tuple:
    return jax.tree.map(lambda x: np.asarray(x)[valid], rows), index[valid]


@jax.jit
def _pixels(params, views):
    del params
    return views


@partial(jax.jit, static_argnums=0)
def tokens(backbone: VisionTransformer, params, views) -> tuple[jax.Array, jax.Array]:
    """(class tokens f32[B, E], patch tokens f32[B, N, E]) of views f32[B, h, w, C]."""
    output = backbone.apply({"params": params}, views)
    return output.cls, output.patches


@partial(jax.jit, static_argnums=0)
def _attention(backbone: VisionTransformer, params, views) -> jax.Array:
    attention = backbone.apply({"params": params}, views, return_attention=True).attention
    grid = backbone.grid(views.shape[1:3])
    return cls_attention(attention, grid, 1 + backbone.num_register_tokens)
