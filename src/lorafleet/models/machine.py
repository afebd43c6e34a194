"""What this machine has: device, precision, memory, allocator, speed; the facts that ``doctor`` reports."""

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

import lorafleet
from lorafleet.cache import cache_folder
from lorafleet.errors import ConfigError, did_you_mean
from lorafleet.lora.compiled import compiled_gemm
from lorafleet.models.demo import demo_base_place

_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "accelerate"),
    *("numpy", "pydantic", "scikit-learn", "optuna"),
)

# A container's limit and use, in the second and the first version of cgroups.
_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)

_CLEAR_REFS = Path("/proc/self/clear_refs")

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def pick_device(name: str) -> torch.device:
    """Turn the ``device`` knob into a device that exists here.

    Args:
        name: ``auto`` (a CUDA GPU where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        ConfigError: The name is no device, or the device is not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        near = did_you_mean(name, ["auto", "cpu", "cuda", "mps"])
        raise ConfigError(f"device = {name!r} is no device{near}; use auto, cpu, cuda, cuda:0 or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise ConfigError(f"device = {name!r}, but PyTorch {torch.__version__} finds no CUDA GPU; use auto or cpu")
        if (device.index or 0) >= count:
            raise ConfigError(f"device = {name!r}, but there are {count} GPUs: cuda:0 to cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device = {name!r}, but PyTorch {torch.__version__} finds no Apple GPU; use auto or cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device = {name!r} cannot run a base model; use auto, cpu, cuda, cuda:0 or mps")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn the ``dtype`` knob into a precision: ``auto`` is bfloat16 on a GPU that computes in it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype = {name!r} is no precision; use auto, float32, bfloat16 or float16")
    return dtype


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held so far, in bytes: on a GPU, or on the host for any other device."""
    if device.type == "cuda":
        held: int = torch.cuda.max_memory_allocated(device)
        return held
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a child process inherits its parent's.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that can still be allocated on the host, in bytes; a container's limit counts."""
    free: int = psutil.virtual_memory().available
    for limit, used in _CGROUP_FILES:
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device, in bytes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return available_memory_bytes()


def memory_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Run something, and tell the most memory that it held beyond what was held before, in bytes.

    Returns:
        None where the system does not tell: outside Linux, for the CPU.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # or the run would use what earlier work left in the process
    _CLEAR_REFS.write_text("5")  # the peak starts anew from what is held now
    before = peak_memory_bytes(device)
    run()
    return peak_memory_bytes(device) - before


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory for a tensor was refused; on a CPU PyTorch has no type of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def keep_large_allocations() -> bool:
    """Keep freed activations in the process instead of returning them to the kernel after every step.

    Page faults of large activations cost a fifth to a third of a training step on CPU. Changes the C allocator of the
    whole process, so call it once, at the start of a CPU run.

    Returns:
        Whether the C library took the settings; only glibc has them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 256 << 20))
    taken = [mallopt(key, value) == 1 for key, value in settings]
    return all(taken)


def matmul_peak(size: int = 1024, seconds: float = 0.5, dtype: torch.dtype = torch.float32) -> float:
    """Measure this machine's matrix-product rate now: the best of repeated ``size``-cubed products.

    Args:
        size: Rows and columns of both factors.
        seconds: How long to measure.
        dtype: Precision of the factors.

    Returns:
        Operations per second (2·size³ per product), on PyTorch's current threads.
    """
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    torch.mm(a, b, out=out)
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def package_versions(names: tuple[str, ...] = _PACKAGES) -> dict[str, str | None]:
    """The installed version of each package; ``None`` for one that is not installed."""
    return {name: _version(name) for name in names}


def doctor() -> dict[str, Any]:
    """Report what lorafleet finds on this machine, in plain values, as ``lorafleet doctor --json`` prints them.

    Returns:
        ``lorafleet``, ``python``, ``platform``: versions.
        ``packages``: version of each package that matters; none where it is not installed.
        ``device``: what ``device: auto`` chooses, its name, precision and memory.
        ``memory``: bytes of the host: total, available, and the most this process held.
        ``threads``: PyTorch's threads and the CPUs this process may use.
        ``matmul_gflops``: measured rate of float32 matrix products on the CPU, 1e9 operations per second.
        ``cache``: the cache folder, its free bytes, and whether the demo base is there.
        ``works``: what makes training and decoding fast, and whether it works here.
        ``extras``: for each extra ``installed``, or the command that installs it.
        ``problems``: what will stop or slow a run, each with its remedy.
    """
    device = pick_device("auto")
    place = cache_folder()
    memory = {"total_bytes": psutil.virtual_memory().total, "available_bytes": available_memory_bytes()}
    threads = {"torch": torch.get_num_threads(), "cpus": _usable_cpus()}
    cache = {"folder": str(place), "free_bytes": _free_bytes(place), "demo_base": demo_base_place().is_dir()}
    return {
        "lorafleet": lorafleet.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": _device_facts(device),
        "memory": memory | {"peak_bytes": peak_memory_bytes(device)},
        "threads": threads,
        "matmul_gflops": round(matmul_peak(seconds=0.3) / 1e9, 1),
        "cache": cache,
        "works": {
            "padding-free training": True,
            "large allocations kept": platform.libc_ver()[0] == "glibc",
            "prepacked weights (oneDNN)": hasattr(torch.ops.mkldnn, "_reorder_linear_weight"),
            "small products compiled (GCC)": compiled_gemm() is not None,
            "bfloat16 on the device": pick_dtype("auto", device) == torch.bfloat16,
        },
        "extras": _extras(),
        "problems": _problems(memory, threads, cache),
    }


def _problems(memory: dict[str, int], threads: dict[str, int], cache: dict[str, Any]) -> list[str]:
    problems = []
    if memory["available_bytes"] < 2 << 30:
        problems.append("less than 2 GiB of memory is available; the demo base needs about 2 GiB to train")
    if not cache["demo_base"] and cache["free_bytes"] < 2 << 30:
        problems.append(f"less than 2 GiB free at {cache['folder']}; set LORAFLEET_CACHE to another disk")
    if threads["torch"] > threads["cpus"]:
        problems.append(f"PyTorch uses {threads['torch']} threads on {threads['cpus']} CPUs; set num_threads")
    return problems


def _extras() -> dict[str, str]:
    """State of each extra, by the package's own list of what it needs."""
    try:
        needs = [Requirement(text) for text in requires("lorafleet") or ()]
        names = metadata("lorafleet").get_all("Provides-Extra") or []
    except PackageNotFoundError:  # run from a source tree that was never installed
        return {}
    states = {}
    for name in names:
        mine = [n.name for n in needs if _only_for(n, name)]
        missing = [package for package in mine if _version(package) is None]
        states[name] = f"pip install 'lorafleet[{name}]'" if missing else "installed"
    return states


def _device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"auto": str(device), "dtype": str(pick_dtype("auto", device)).removeprefix("torch.")}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts |= {"name": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
        facts |= {"total_bytes": total, "free_bytes": free, "cuda": torch.version.cuda}
    else:
        facts |= {"name": platform.processor() or platform.machine(), "simd": torch.backends.cpu.get_cpu_capability()}
    return facts


def _only_for(need: Requirement, extra: str) -> bool:
    marker = need.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
