"""The grouped product of ``gemm_batch.c``, compiled for this machine by its own GCC and kept in the cache folder.

Libraries are made for larger products. Beside oneMKL's it takes two thirds of the time for those of LoRA and of short
attention, and what a row gives does not depend on the others. Where there is no GCC, oneMKL's is used.
"""

import ctypes
import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import torch

from lorafleet.cache import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("gemm_batch.c")
_TARGETS = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
_FLAGS = ("-O2", "-std=gnu11", "-w", "-shared", "-fPIC", "-fopenmp")
_SECONDS = 120.0


@cache
def compiled_gemm() -> Callable[..., None] | None:
    """``sgemm_batch_64`` with oneMKL's arguments, compiled at the first call on a machine; none where it cannot be."""
    compiler, target = shutil.which("gcc"), _TARGETS.get(torch.backends.cpu.get_cpu_capability())
    if sys.platform != "linux" or compiler is None or target is None:
        return None
    pools = _thread_pools()
    try:
        library = ctypes.CDLL(str(_library([compiler, *_FLAGS, *target])))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        place = f"{cache_folder()}, which LORAFLEET_CACHE sets"
        logger.warning(
            "small products are slower: %s cannot be compiled into %s: %s %s", SOURCE.name, place, error, said
        )
        return None
    if _thread_pools() != pools:
        logger.info("small products are left to oneMKL: GCC's threads are not those that PyTorch has")
        return None
    return cast(Callable[..., None], library.sgemm_batch_64)


def _library(command: list[str]) -> Path:
    """The compiled file; one that somebody else can write to is not run.

    Raises:
        OSError: It cannot be written, or is another user's.
        SubprocessError: The compiler fails.
    """
    what = " ".join([*command, SOURCE.read_text(encoding="utf-8"), str(os.getuid())])
    path = cache_folder() / f"gemm-batch-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("compiling %s, once on this machine", SOURCE.name)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            made = [*command, str(SOURCE), "-o", str(temporary)]
            subprocess.run(made, check=True, capture_output=True, timeout=_SECONDS)
            temporary.chmod(0o700)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if (state := path.stat()).st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"{path} can be changed by others; delete it")
    return path


def _thread_pools() -> set[str]:
    """The OpenMP libraries in this process. Each has threads of its own, and idle ones take the others' cores."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.rpartition(" ")[2] for line in lines}
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}
