"""One pool of device memory for cuDF, CuPy and torch, so that none hoards what another one lacks.

By itself cuDF asks the driver for each column, which waits for the device, and torch keeps what it has once had. With
RMM, which comes with cuDF, all three allocate from one pool. It is installed where the first cuDF partition is read or
scored in a process; frames of pandas never bring it about. To leave the allocators alone, set the Dask option
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
"""What the pool has from the start."""

KEPT_SHARE = 4
"""The pool keeps one in this many bytes of the device when nobody uses them."""

_lock = threading.Lock()

_torch_shares: bool | None = None


def share_memory_pool() -> bool:
    """Let cuDF, CuPy and torch allocate from one RMM pool, unless that is switched off or impossible.

    An RMM resource that somebody has chosen, such as that of dask-cuda's ``--rmm-pool-size``, is the pool; otherwise
    one is installed on the current device. A second call changes nothing, except that it installs a pool on another
    device, should that be the current one by then.

    Returns
    -------
    bool
        Whether torch allocates from RMM. It can only be told before it has first used CUDA in this process; later
        cuDF and CuPy share a pool, and torch keeps its own.

    Notes
    -----
    Memory that the pool holds for nobody is not free to CUDA: where the search asks how much it may take
    (`torch.cuda.mem_get_info`), it may be told too little, by a quarter of the device at most, and then works in
    smaller steps; never too much. Torch's own statistics, such as `torch.cuda.memory_allocated`, are not kept while it
    allocates from RMM: they raise.

    The RMM resource must not be replaced by one that does not forward to it while torch holds memory from it.
    """
    if not dask.config.get("semdedup.share-memory-pool", True):
        return False
    with _lock:
        return _share()


def _share() -> bool:
    """Install the pool first: what allocates from a resource must give it back to the same one."""
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
    # Asks the driver, and does not make torch use CUDA.
    if not torch.cuda.is_available() or not _install_pool(rmm):
        return False
    if _torch_shares is None:
        cupy.cuda.set_allocator(rmm_cupy_allocator)
        _torch_shares = _give_to_torch(torch, rmm_torch_allocator)
    return _torch_shares


def device_bytes() -> int | None:
    """Memory of the current GPU, or None where RMM sees none."""
    try:
        import rmm

        return int(rmm.mr.available_device_memory()[1])
    except (ImportError, RuntimeError) as error:
        logger.debug("The memory of a GPU is not known: %s", error)
        return None


def _install_pool(rmm: Any) -> bool:
    """Put a pool in the place of RMM's default, which has none; whether the current device has one."""
    if type(rmm.mr.get_current_device_resource()) is not rmm.mr.CudaMemoryResource:
        return True
    _, total = rmm.mr.available_device_memory()
    try:
        # The driver's pool rather than RMM's own: it maps pages where blocks would leave gaps that no large matrix
        # fits into, and gives back what it no longer uses. What it lacks is CUDA IPC, for UCX between GPUs: for that,
        # let dask-cuda make a pool.
        pool = rmm.mr.CudaAsyncMemoryResource(
            initial_pool_size=INITIAL_BYTES, release_threshold=max(INITIAL_BYTES, total // KEPT_SHARE)
        )
    except (RuntimeError, MemoryError) as error:
        logger.debug("No shared memory pool: %s", error)
        return False
    rmm.mr.set_current_device_resource(pool)
    return True


def _give_to_torch(torch: Any, allocator: Any) -> bool:
    """Let torch allocate from RMM; whether it was not too late."""
    try:
        torch.cuda.memory.change_current_allocator(allocator)
    except RuntimeError as error:
        logger.debug("Torch keeps its own memory pool: %s", error)
        return False
    return True
