"""Self-supervised Vision Transformers in JAX: DINO, Barlow Twins and their hybrid.

import dinotwins_jax as dt

model = dt.load("runs/hybrid")         # a run, an exported folder or a file of weights
features = model(["a.jpg", "b.png"])   # Features(cls f32[B, E], patches f32[B, N, E])

dt.train("hybrid:demo", "runs/mine", **{"optim.lr": 1e-3})
dt.embed("runs/mine", "/data/pictures", out="features.npz")
classifier = dt.probe("features.npz", "labels.csv")
model.predict("a.jpg", classifier)
"""

import importlib

__version__ = "0.1.0"

# Name -> the module that has it. JAX is imported with the first name used, not with the package.
_API = {"load": "loading", "Features": "model", "Model": "model"}
_API |= {"load_classifier": "classifier", "Classifier": "classifier"}  # of features/
_CALLED = ("train", "embed", "probe")  # modules that are called as the function of their name


def __getattr__(name: str):
    if name in _CALLED:
        return importlib.import_module(f"dinotwins_jax.{name}")
    if name in _API:
        return getattr(importlib.import_module(f"dinotwins_jax.features.{_API[name]}"), name)
    raise AttributeError(f"module 'dinotwins_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API, *_CALLED])
