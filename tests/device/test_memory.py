"""One pool for cuDF, CuPy and torch: from which resource each of them allocates, and when nothing changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock, patch

import dask
import pandas as pd
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from dask_semdedup.device import memory
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.errors import DataReadError
from dask_semdedup.io import cudf_reader, fragments, reader
from dask_semdedup.steps import pairwise
from tests.data import GOLDEN, run

GIB = 1 << 30


class CudaMemoryResource:
    """RMM's default: no pool."""


class PoolMemoryResource(CudaMemoryResource):
    """What a user may have chosen."""


class CudaAsyncMemoryResource:
    """A pool of the driver's."""

    def __init__(self, initial_pool_size: int, release_threshold: int) -> None:
        self.initial_pool_size, self.release_threshold = initial_pool_size, release_threshold


class Gpu:
    """RMM, CuPy and a torch that see a device of 80 GiB.

    Attributes
    ----------
    resource
        RMM's current one.
    cupy, torch
        The allocator of each and the resource that it first allocates from; None for their own pools.
    """

    def __init__(self) -> None:
        self.resource: object = CudaMemoryResource()
        self.cupy: tuple[str, object] | None = None
        self.torch: tuple[str, object] | None = None

    def set_resource(self, resource: object) -> None:
        self.resource = resource

    def set_cupy(self, allocator: str) -> None:
        assert self.cupy is None
        self.cupy = allocator, self.resource

    def set_torch(self, allocator: str) -> None:
        assert self.torch is None
        self.torch = allocator, self.resource

    def shares(self, resource: object) -> bool:
        """Whether all three allocate from a resource, and have from the beginning."""
        return (self.resource, self.cupy, self.torch) == (resource, ("for cupy", resource), ("for torch", resource))

    def is_untouched(self) -> bool:
        return type(self.resource) is CudaMemoryResource and self.cupy is None and self.torch is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    rmm, allocators, for_cupy, for_torch = map(
        ModuleType, ("rmm", "rmm.allocators", "rmm.allocators.cupy", "rmm.allocators.torch")
    )
    rmm.mr = SimpleNamespace(
        CudaMemoryResource=CudaMemoryResource,
        CudaAsyncMemoryResource=CudaAsyncMemoryResource,
        get_current_device_resource=lambda: gpu.resource,
        set_current_device_resource=gpu.set_resource,
        available_device_memory=lambda: (70 * GIB, 80 * GIB),
    )
    for_cupy.rmm_cupy_allocator, for_torch.rmm_torch_allocator = "for cupy", "for torch"
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(set_allocator=gpu.set_cupy)
    for module in (rmm, allocators, for_cupy, for_torch, cupy):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "change_current_allocator", gpu.set_torch)
    monkeypatch.setattr(memory, "_torch_shares", None)
    return gpu


def test_all_three_allocate_from_the_pool_from_the_beginning(gpu: Gpu) -> None:
    assert share_memory_pool() is True
    assert isinstance(gpu.resource, CudaAsyncMemoryResource)
    assert gpu.shares(gpu.resource)
    assert gpu.resource.initial_pool_size < GIB
    assert gpu.resource.release_threshold == 20 * GIB


def test_again_changes_nothing(gpu: Gpu) -> None:
    assert share_memory_pool() is True
    pool = gpu.resource
    assert share_memory_pool() is True
    assert gpu.shares(pool)


def test_another_device_gets_a_pool_of_its_own(gpu: Gpu) -> None:
    share_memory_pool()
    first, gpu.resource = gpu.resource, CudaMemoryResource()
    assert share_memory_pool() is True
    assert isinstance(gpu.resource, CudaAsyncMemoryResource)
    assert gpu.resource is not first


def test_threads_share_one_pool(gpu: Gpu) -> None:
    assert dask.compute(*[dask.delayed(share_memory_pool, pure=False)() for _ in range(20)], scheduler="threads") == (
        (True,) * 20
    )
    assert gpu.shares(gpu.resource)


def test_a_resource_that_the_user_has_set_is_the_pool(gpu: Gpu) -> None:
    gpu.resource = pool = PoolMemoryResource()
    assert share_memory_pool() is True
    assert gpu.shares(pool)


@pytest.mark.parametrize("name", ["semdedup.share-memory-pool", "semdedup.share_memory_pool"])
def test_opting_out(gpu: Gpu, name: str) -> None:
    with dask.config.set({name: False}):
        assert share_memory_pool() is False
    assert gpu.is_untouched()


def test_opting_out_by_the_environment() -> None:
    code = "import dask; print(dask.config.get('semdedup.share-memory-pool', True))"
    environment = {**os.environ, "DASK_SEMDEDUP__SHARE_MEMORY_POOL": "False"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == "False"


def test_torch_that_has_used_cuda_keeps_its_own(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    late = Mock(side_effect=RuntimeError("Can't swap an already initialized allocator"))
    monkeypatch.setattr(torch.cuda.memory, "change_current_allocator", late)
    with caplog.at_level("DEBUG", "dask_semdedup.device.memory"):
        assert share_memory_pool() is share_memory_pool() is False
    assert isinstance(gpu.resource, CudaAsyncMemoryResource)
    assert gpu.cupy == ("for cupy", gpu.resource)
    assert "Torch keeps its own memory pool: Can't swap" in caplog.text


def test_a_driver_without_pools_changes_nothing(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    sys.modules["rmm"].mr.CudaAsyncMemoryResource = Mock(side_effect=RuntimeError("cudaMallocAsync not supported"))
    with caplog.at_level("DEBUG", "dask_semdedup.device.memory"):
        assert share_memory_pool() is False
    assert gpu.is_untouched()
    assert "cudaMallocAsync not supported" in caplog.text


@pytest.mark.parametrize("missing", ["rmm", "cupy"])
def test_without_rapids_nothing_happens(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert share_memory_pool() is False
    assert gpu.is_untouched()


def test_without_a_device_nothing_happens(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert share_memory_pool() is False
    assert gpu.is_untouched()


def test_pandas_frames_install_none(gpu: Gpu) -> None:
    assert isinstance(run(GOLDEN, device="cpu"), pd.DataFrame)
    assert gpu.is_untouched()


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file that is there: whether it has changed is looked at before cuDF reads."""
    (tmp_path / "a.parquet").touch()
    return str(tmp_path / "a.parquet")


def test_it_is_there_before_cudf_reads(gpu: Gpu, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **options: object) -> pd.DataFrame:
        assert gpu.shares(gpu.resource)
        return pd.DataFrame({"id": range(3)})

    keys = Mock(side_effect=lambda *_: gpu.shares(gpu.resource) or pytest.fail("keys are made before the pool"))
    monkeypatch.setattr(reader.Reader, "_cudf_keys", keys)
    monkeypatch.setattr(cudf_reader, "import_cudf", Mock())
    monkeypatch.setattr(cudf_reader, "_read_with_libcudf", read)
    schema = pa.schema({"id": pa.int64()})
    folders = pa.schema({"centroid": pa.int64()})
    clusters = reader.Reader(LocalFileSystem(), schema, folders=folders, backend="cudf")
    assert len(clusters.read([fragments.Fragment(file, 3, keys=(0,))], ["id", "centroid"])) == 3


@pytest.mark.parametrize(
    ("message", "error"),
    [("CUDA error: an illegal memory access", RuntimeError), ("Encountered invalid footer", DataReadError)],
    ids=["of the GPU", "of the file"],
)
def test_files_are_not_blamed_for_the_gpu(
    file: str, monkeypatch: pytest.MonkeyPatch, message: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(cudf_reader, "import_cudf", Mock())
    monkeypatch.setattr(cudf_reader, "_read_with_libcudf", Mock(side_effect=RuntimeError(message)))
    with pytest.raises(error, match=message) as raised:
        cudf_reader.read_fragments_cudf(LocalFileSystem(), [fragments.Fragment(file, 3)], ["id"])
    assert ("a.parquet" in str(raised.value)) == (error is DataReadError)


@pytest.mark.parametrize(("cores", "threads", "pages"), [(6, "6", "384"), (32, "10", "2048")])
def test_cudf_gets_its_share_of_the_cores_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: str, pages: str
) -> None:
    monkeypatch.setitem(sys.modules, "cudf", ModuleType("cudf"))
    monkeypatch.setattr(cudf_reader, "cores_per_gpu", lambda: cores)
    compression = {"LIBCUDF_HOST_COMPRESSION": "AUTO", "LIBCUDF_HOST_COMPRESSION_THRESHOLD": pages}
    settings = {"KVIKIO_NTHREADS": threads, **compression}
    with patch.dict(os.environ):
        for name in settings:
            os.environ.pop(name, None)
        cudf_reader.import_cudf.__wrapped__()
        assert {name: os.environ[name] for name in settings} == settings
        os.environ["KVIKIO_NTHREADS"] = "3"
        cudf_reader.import_cudf.__wrapped__()
        assert os.environ["KVIKIO_NTHREADS"] == "3"


def test_it_is_there_before_a_cudf_partition_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(pairwise, "share_memory_pool", share)
    monkeypatch.setattr(pairwise, "is_cudf", lambda frame: True)
    with pytest.raises(InterruptedError):
        run(GOLDEN)


SCORE = """
    import json
    import cudf, numpy, torch
    from dask_semdedup.device.memory import share_memory_pool
    from dask_semdedup.frames.columns import Columns
    from dask_semdedup.steps.pairwise import pairwise_partition
    from dask_semdedup.steps.ranking import RankingStrategy

    shares, grown, kind = share_memory_pool(), [], None
    if shares:
        import cupy, rmm
        kind = type(rmm.mr.get_current_device_resource()).__name__
        counted = rmm.mr.StatisticsResourceAdaptor(rmm.mr.get_current_device_resource())
        rmm.mr.set_current_device_resource(counted)
        for allocate in (
            lambda: torch.empty(1 << 20, device="cuda"),
            lambda: cupy.empty(1 << 20, cupy.float32),
            lambda: cudf.Series(numpy.zeros(1 << 20, numpy.float32)),
        ):
            before = counted.allocation_counts.current_bytes
            kept = allocate()
            grown.append(counted.allocation_counts.current_bytes - before)
            del kept
    rows = numpy.random.default_rng(0).standard_normal((4000, 32)).astype(numpy.float32)
    frame = cudf.DataFrame({"id": range(4000), "centroid": numpy.arange(4000) // 1500})
    frame["embeddings"] = cudf.Series(rows.tolist())
    scores = pairwise_partition(frame, Columns(), RankingStrategy(["id"])).to_pandas()
    backend = torch.cuda.memory.get_allocator_backend()
    print(json.dumps([shares, grown, kind, backend, scores.max_id.tolist(), scores.cosine_sim_score.tolist()]))
"""


@pytest.mark.gpu
def test_torch_cupy_and_cudf_allocate_from_the_pool_and_scores_stay_the_same() -> None:
    pytest.importorskip("cudf")

    def score(share: bool) -> list:
        environment = {**os.environ, "DASK_SEMDEDUP__SHARE_MEMORY_POOL": str(share)}
        command = [sys.executable, "-c", textwrap.dedent(SCORE)]
        finished = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    shares, grown, kind, backend, *pooled = score(True)
    assert shares is True
    assert kind == "CudaAsyncMemoryResource"
    assert backend == "pluggable"
    assert all(nbytes >= 4 << 20 for nbytes in grown), grown
    shares, _, _, backend, *plain = score(False)
    assert shares is False
    assert backend == "native"
    assert pooled == plain
