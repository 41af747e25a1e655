"""RAD-DINO in JAX."""

import os

# Virtual CPU devices share one thread pool and deadlock when it has fewer threads than about twice their number (jax
# before 0.12). It must be set before jax is imported, and only for them: one device is a third faster without.
if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
    os.environ.setdefault("PJRT_NPROC", "32")
