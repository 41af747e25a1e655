"""What every test runs on: eight virtual CPU devices, the reference arrays, the real images."""

import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could set its devices"
# All of these are read when jax is imported, and are inherited by the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Virtual devices share one thread pool; with fewer threads than about twice the devices jax < 0.12
# deadlocks in a loop of collectives.
os.environ.setdefault("PJRT_NPROC", "32")
# Eight devices cost a single-device test nothing that could be measured. XLA_FLAGS rather than
# JAX_NUM_CPU_DEVICES, because the latter wins: a test's own program may still set it to 1 or 2.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# Many compilations, few steps: all programs are compiled in two thirds of the time, and alike, in this process and in
# others. A grey on the border of two levels is rounded to one or the other by how products and sums were fused.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# No test reaches for a model hub; transformers would ask it even about a local folder.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Absolute, so that both folders are found from any working directory, at collection time too.
for _name in ("goldens", "cxr"):
    _variable = f"RADDINO_{_name.upper()}"
    _folder = Path(os.environ.get(_variable) or ROOT.parent / "shared" / _name)
    os.environ[_variable] = str(_folder.resolve())

# torchvision 0.28 registers operators that the CPU build of torch 2.13 lacks, and fails to import;
# an empty module in that place is all it needs.
_stub = "torchvision._meta_registrations"
sys.modules.setdefault(_stub, types.ModuleType(_stub))


def pytest_configure(config):
    """Compiled programs outlive the run: on a second run the suite mostly reads them back."""
    if hasattr(config, "cache"):  # absent with -p no:cacheprovider
        folder = str(config.cache.mkdir("jax"))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _folder_of(variable: str, what: str) -> Path:
    folder = Path(os.environ[variable])
    if not folder.is_dir():
        pytest.skip(f"no {what} at {folder} (set {variable})")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The arrays computed by the reference code."""
    return _folder_of("RADDINO_GOLDENS", "reference arrays")


@pytest.fixture(scope="session")
def cxr() -> Path:
    """The real chest X-rays, with DICOM and broken files."""
    return _folder_of("RADDINO_CXR", "chest X-rays")
