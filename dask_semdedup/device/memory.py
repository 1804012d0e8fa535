"""One pool of device memory for cuDF, CuPy and torch, so that none of them keeps memory that another one lacks.

By default, cuDF asks the driver for each column, which waits for the device, and torch keeps all memory that it has
allocated once. With RMM, which comes with cuDF, all three allocate from one pool. It is installed when a process reads
or scores its first cuDF partition, and never for pandas frames. To leave the allocators alone, set the Dask option
``semdedup.share-memory-pool`` to False, or the environment variable ``DASK_SEMDEDUP__SHARE_MEMORY_POOL=False``, which
reaches Dask's workers too.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import dask

__all__ = ["device_bytes", "share_memory_pool"]

logger = logging.getLogger(__name__)

INITIAL_BYTES = 256 << 20
"""Initial size of the pool."""

KEPT_SHARE = 4
"""The pool keeps up to one in this many bytes of the device while they are unused."""

_lock = threading.Lock()

_torch_shares: bool | None = None


def share_memory_pool() -> bool:
    """Let cuDF, CuPy and torch allocate from one RMM pool, unless that is switched off or impossible.

    An RMM resource that the user has set, such as that of dask-cuda's ``--rmm-pool-size``, serves as the pool;
    otherwise one is installed on the current device. Further calls change nothing, except that they install a pool if
    another device has become the current one.

    Returns
    -------
    bool
        Whether torch allocates from RMM. It does only if this is called before torch first uses CUDA in this process;
        later, cuDF and CuPy share a pool and torch keeps its own.

    Notes
    -----
    Unused memory of the pool is not free to CUDA. When the search asks for free memory (`torch.cuda.mem_get_info`), the
    answer may be too low, by a quarter of the device at most, and the search then works in smaller steps; it is never
    too high. Torch's own statistics, such as `torch.cuda.memory_allocated`, raise while it allocates from RMM.

    While torch holds memory of the RMM resource, that must not be replaced by one that does not forward to it.
    """
    if not dask.config.get("semdedup.share-memory-pool", True):
        return False
    with _lock:
        return _share()


def _share() -> bool:
    """Install the pool, and then the allocators: memory must return to the resource that it came from."""
    global _torch_shares
    try:
        import cupy
        import rmm
        import torch
        from rmm.allocators.cupy import rmm_cupy_allocator
        from rmm.allocators.torch import rmm_torch_allocator
    except ImportError as error:
        logger.debug("No shared memory pool: %s", error)
        return False
    # This asks the driver and does not initialize CUDA in torch.
    if not torch.cuda.is_available() or not _install_pool(rmm):
        return False
    if _torch_shares is None:
        cupy.cuda.set_allocator(rmm_cupy_allocator)
        _torch_shares = _give_to_torch(torch, rmm_torch_allocator)
    return _torch_shares


def device_bytes() -> int | None:
    """Return the bytes of memory of the current GPU, or None if there is none."""
    import torch

    try:
        import rmm

        # It leaves CUDA in torch uninitialized, whose allocator may still be replaced.
        return int(rmm.mr.available_device_memory()[1])
    except ImportError:
        return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
    except RuntimeError as error:
        logger.debug("The memory of the GPU is not known: %s", error)
        return None


def _install_pool(rmm: Any) -> bool:
    """Replace RMM's default resource, which is no pool, by one; return whether the current device has a pool."""
    if type(rmm.mr.get_current_device_resource()) is not rmm.mr.CudaMemoryResource:
        return True
    _, total = rmm.mr.available_device_memory()
    try:
        # The driver's pool rather than RMM's own: it maps pages, so that blocks leave no gaps too small for a large
        # matrix, and it returns unused memory. It lacks CUDA IPC, for UCX between GPUs: for that, let dask-cuda make a
        # pool.
        pool = rmm.mr.CudaAsyncMemoryResource(
            initial_pool_size=INITIAL_BYTES, release_threshold=max(INITIAL_BYTES, total // KEPT_SHARE)
        )
    except (RuntimeError, MemoryError) as error:
        logger.debug("No shared memory pool: %s", error)
        return False
    rmm.mr.set_current_device_resource(pool)
    return True


def _give_to_torch(torch: Any, allocator: Any) -> bool:
    """Let torch allocate from RMM; return False if it has used CUDA before."""
    try:
        torch.cuda.memory.change_current_allocator(allocator)
    except RuntimeError as error:
        logger.debug("Torch keeps its own memory pool: %s", error)
        return False
    return True
