"""Test set-up: eight virtual CPU devices (needed by the parallel tests) and one compilation cache."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one compilation for all tests that need it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache = tempfile.mkdtemp()
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

import jax  # noqa: E402 it reads what stands above

# Modules that compare runs with runs, or commands with their promises. Compiling is what takes their time,
# so LLVM does not optimise there; XLA's own passes run all the same. Golden numbers are met as shipped.
_QUICKLY_COMPILED = {
    "test_augment_loop",
    "test_balance",
    "test_benchmark",
    "test_broken_runs",
    "test_collapse",
    "test_compare",
    "test_evaluate",
    "test_invariance",
    "test_memory",
    "test_nonfinite",
    "test_processes",
    "test_auto",
    "test_shared_objects",
    "test_pretrained",
    "test_sweep",
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
