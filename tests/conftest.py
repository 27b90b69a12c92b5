"""Test set-up: eight virtual CPU devices (needed by the parallel tests) and one compilation cache."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402 it reads what stands above
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dinotwins_jax.devices.compilation import machine_id  # noqa: E402

# One compilation for all tests and processes that need it, kept for the next run beside pytest's own
# cache. Remove .pytest_cache to start cold.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = Path(__file__).parent.parent / ".pytest_cache" / "jax" / machine_id()
    options = {
        "jax_compilation_cache_dir": str(cache),
        "jax_compilation_cache_max_size": 2**31,  # bytes; the oldest programs go first
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)

# Modules that compare runs with runs, or commands with their promises. Compiling is what takes their time,
# so LLVM does not optimise there; XLA's own passes run all the same. Golden numbers are met as shipped.
_QUICKLY_COMPILED = {
    "test_api",
    "test_attention_kernels",
    "test_augment_draws",
    "test_augment_loop",
    "test_balance",
    "test_benchmark",
    "test_backbone",
    "test_broken_runs",
    "test_bucket_runs",
    "test_channels",
    "test_channels_runs",
    "test_collapse",
    "test_compare",
    "test_docs",
    "test_evaluate",
    "test_export_programs",
    "test_family_step",
    "test_finetune",
    "test_gpu_check",
    "test_invariance",
    "test_knn",
    "test_layers",
    "test_linear",
    "test_look",
    "test_memory",
    "test_model_card",
    "test_nonfinite",
    "test_orientation",
    "test_plain_gradients",
    "test_precision",
    "test_probe_data",
    "test_processes",
    "test_auto",
    "test_served_runs",
    "test_shared_objects",
    "test_pillow_levels",
    "test_photographs",
    "test_platforms",
    "test_positions",
    "test_official",
    "test_compositions",
    "test_pretrained",
    "test_supervised",
    "test_sweep",
    "test_torch_files",
    "test_train",
    "test_train_step_benchmark",
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Here, and by the environment in the processes that tests start."""
    if request.module.__name__ not in _QUICKLY_COMPILED:
        yield
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory):
    """(workdir, its teacher's backbone) of a run of step 3 on 60 images, with random weights. Its config:
    shrunk()."""
    from shrunk import shrunk

    from dinotwins_jax.build import build
    from dinotwins_jax.checkpoint import Checkpoints
    from dinotwins_jax.workdir import claim_workdir

    workdir, config = tmp_path_factory.mktemp("runs") / "run", shrunk()
    claim_workdir(workdir, config.to_dict())
    rng = np.random.RandomState(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype),
        jax.eval_shape(build(config).fresh_state),
    )
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state.replace(step=jnp.asarray(3, jnp.int32)), {"num_records": 60})
    teacher = jax.device_get(state.teacher_params["backbone"])
    return workdir, teacher


# The files that take longest start first, so that no worker ends with one of them while the others wait.
_LONGEST = ("test_train", "test_sweep", "test_augment_draws", "test_augment", "test_family_step")


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.module.__name__, len(rank)))
