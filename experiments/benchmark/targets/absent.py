"""Devices of accelerators that are absent here: JAX compiles for them, nothing can be run.

Their compilers are packages that nothing else needs: see requirements-bench.txt.
"""

import importlib.util
import os
from pathlib import Path

import jax
from jax.experimental import topologies

from experiments.benchmark.targets.cards import CARDS

_SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_COMPILERS = {"gpu": ("jax_cuda12_plugin", "jax[cuda12]"), "tpu": ("libtpu", "libtpu")}


def lacks_compiler(name: str) -> str | None:
    """Why nothing can be compiled for the card `name` here, with what to install; None if it can."""
    module, package = _COMPILERS[CARDS[name].platform]
    if importlib.util.find_spec(module):
        return None
    return (
        f"no compiler for {name}: pip install '{package}', of the version of jax {jax.__version__}"
    )


def prepare(platform: str) -> None:
    """Settings of JAX and XLA for absent devices; before the first use of a device."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else asks the cloud what machine this is
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is taken
    else:  # tuning runs kernels, which needs a card
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_autotune_level=0".strip()


def card_devices(name: str, chips: int) -> list[jax.Device]:
    """The first `chips` devices of a machine or slice of the card `name`.

    Raises:
      ValueError: no compiler, or no slice of so many chips.
    """
    if (reason := lacks_compiler(name)) is not None:
        raise ValueError(reason)
    if CARDS[name].platform == "tpu":
        if chips not in _SLICES:
            raise ValueError(f"no slice of {name} has {chips} chips: choose of {list(_SLICES)}")
        return tpu_devices(f"{name}:{_SLICES[chips]}")[:chips]
    target = (Path(__file__).parent / f"{name}.txtpb").read_text()
    return list(
        topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x1x{chips}"
        ).devices
    )


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology, such as "v5e:2x2". Raises ValueError without libtpu, or for no such
    topology."""
    prepare("tpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise ValueError(f"TPU topology {topology}: {str(error).splitlines()[0]}") from error
