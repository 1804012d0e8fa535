"""Streams of threads: what runs beside the default stream gives what runs in it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dask_semdedup import read_clusters
from dask_semdedup.device.streams import current_stream, default_stream, finish, owned, reading_stream, search_stream


def test_on_a_cpu_there_is_but_one_place() -> None:
    with reading_stream("cpu"), search_stream("cpu"), default_stream("cpu"):
        rows = torch.arange(3)
    assert owned(rows) is rows


def test_nobody_asks_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("asked for CUDA"))
    with default_stream("cuda"):
        assert current_stream() is None
        finish()


def slow(value: float) -> torch.Tensor:
    """A matrix of a value, for which a GPU works after the call has returned."""
    rows = torch.full((4096, 4096), float(value), device="cuda")
    for _ in range(20):
        rows = rows @ torch.full_like(rows, 1 / 4096)
    return rows


def cupy_of(tensor: torch.Tensor) -> Any:
    import cupy

    return cupy.from_dlpack(tensor)


@pytest.mark.gpu
class TestCuda:
    @pytest.fixture(autouse=True)
    def libraries(self) -> None:
        pytest.importorskip("cudf")

    def test_each_thread_has_one_stream_for_reading_and_one_for_the_search(self) -> None:
        def used(_: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
            with reading_stream("cuda"):
                reading = torch.cuda.current_stream()
                with search_stream("cuda"):
                    return reading, torch.cuda.current_stream()

        with ThreadPoolExecutor(1) as pool:
            first, second = pool.map(used, range(2))
        assert first == second
        assert len({torch.cuda.default_stream(), *first, *used(0)}) == 5
        reading, search = first
        assert reading.priority < search.priority == torch.cuda.default_stream().priority

    def test_the_stream_is_that_of_all_libraries_and_is_entered_once(self) -> None:
        import cupy

        assert current_stream() is None
        with reading_stream("cuda"):
            stream = torch.cuda.current_stream()
            assert current_stream() == stream
            assert cupy.cuda.get_current_stream().ptr == stream.cuda_stream
            with reading_stream("cuda"):
                assert torch.cuda.current_stream() == stream
            with default_stream("cuda"):
                assert current_stream() is None
                assert cupy.cuda.get_current_stream().ptr == 0
            assert current_stream() == stream
            finish()
            assert stream.query()
        assert current_stream() is None

    def test_what_is_made_behind_is_complete_and_outlives_its_stream(self) -> None:
        with search_stream("cuda"):
            square = torch.full((2048, 2048), 0.5, device="cuda") @ torch.full((2048, 2048), 2.0, device="cuda")
        slow(1)  # What is copied now, is copied late.
        copy = owned(square)
        del square
        with torch.cuda.stream(torch.cuda.Stream()), search_stream("cuda"):
            torch.zeros((2048, 2048), device="cuda")  # It may get the memory of what was released.
        assert (copy == 2048).all()

    @pytest.mark.parametrize(("place", "value"), [(reading_stream, 2), (search_stream, 3)])
    def test_what_the_default_stream_was_given_comes_first(self, place: Callable[[str], Any], value: int) -> None:
        rows = slow(value)  # No other test's: memory that is used again might hold it already.
        with place("cuda"):
            assert (rows == value).all()

    def test_cudf_comes_after_the_stream_and_the_stream_after_cudf(self) -> None:
        import cudf

        with reading_stream("cuda"):
            rows = slow(4)
            with default_stream("cuda"):
                frame = cudf.DataFrame({"x": cupy_of(rows[0])})
                total = frame["x"].sum()
                later = slow(5)
            assert total == 4 * rows.shape[1]
            assert (later == 5).all()

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
