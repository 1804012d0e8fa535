"""Streams of threads: what runs beside the default stream gives what runs in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dask_semdedup import read_clusters, streams
from dask_semdedup.streams import beside, catch_up, owned, thread_stream


def test_on_a_cpu_there_is_nothing_to_copy() -> None:
    with beside("cpu"):
        rows = torch.arange(3)
    assert owned(rows) is rows


def test_the_pool_is_shared_before_torch_first_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("share_memory_pool", "thread_stream", "catch_up"):
        monkeypatch.setattr(streams, name, lambda name=name: calls.append(name))
    with pytest.raises(ZeroDivisionError), streams.own_stream():
        raise ZeroDivisionError
    assert calls == ["share_memory_pool", "thread_stream", "catch_up"]


@pytest.mark.gpu
class TestCuda:
    @pytest.fixture(autouse=True)
    def libraries(self) -> None:
        pytest.importorskip("cudf")

    def test_each_thread_has_one_stream(self) -> None:
        with ThreadPoolExecutor(3) as pool:
            both = [future.result() for future in [pool.submit(lambda: (thread_stream(), thread_stream()))] * 3]
        assert all(first is second for first, second in both)
        assert thread_stream() is not both[0][0]

    def test_what_is_made_beside_is_complete_and_outlives_its_stream(self) -> None:
        with beside("cuda"):
            assert torch.cuda.current_stream() == thread_stream()
            square = torch.full((2048, 2048), 0.5, device="cuda") @ torch.full((2048, 2048), 2.0, device="cuda")
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        copy = owned(square)
        del square
        with beside("cuda"):
            torch.zeros((2048, 2048), device="cuda")  # It may get the memory of what was released.
        assert (copy == 2048).all()

    def test_what_the_default_stream_was_given_comes_first(self) -> None:
        rows = torch.ones((4096, 4096), device="cuda")
        for _ in range(20):
            rows = rows @ torch.full_like(rows, 1 / 4096)
        catch_up()
        with beside("cuda"):
            assert (rows == 1).all()

    def test_many_threads_find_what_one_finds(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for cluster in range(60):
            n = int(rng.integers(1, 3000))
            rows = rng.standard_normal((n, 96), dtype=np.float32)
            offsets = np.arange(n + 1, dtype=np.int32) * 96
            folder = tmp_path / f"centroid={cluster}"
            folder.mkdir()
            embeddings = pa.ListArray.from_arrays(offsets, pa.array(rows.ravel()))
            table = pa.table({"id": rng.permutation(n), "embeddings": embeddings, "cosine_dist_to_cent": rng.random(n)})
            pq.write_table(table, folder / "part.0.parquet")
        expected = read_clusters(tmp_path).semdedup.pairwise(device="cpu").compute()
        scores = read_clusters(tmp_path, backend="cudf", partition_size="1MiB").semdedup.pairwise()
        assert scores.npartitions > 8
        for workers in (1, 8, 8, 16):
            with dask.config.set(scheduler="threads", num_workers=workers):
                found = scores.compute().to_pandas()
            in_order = [frame.sort_values("centroid", kind="stable", ignore_index=True) for frame in (found, expected)]
            pd.testing.assert_frame_equal(*in_order, rtol=0, atol=2e-6)
