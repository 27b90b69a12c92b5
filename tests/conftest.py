"""Eight virtual CPU devices for every test (the parallel ones need them), one compilation cache."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one compilation for all tests that need it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache = tempfile.mkdtemp()
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
