"""Frames whose partitions hold whole clusters are told from others, which are shuffled."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from dask_semdedup import ClusterError, MissingDependencyError, read_clusters
from dask_semdedup.lazy.alignment import align, is_aligned
from tests.data import clusters_are_whole, shuffles


def with_columns(ddf: dd.DataFrame, names: list[str]) -> dd.DataFrame:
    ddf = ddf.copy()
    ddf.columns = names
    return ddf


class TestAlignment:
    def test_layout_is_aligned_as_long_as_the_cluster_column_is_there(self, layout: tuple[Path, pd.DataFrame]) -> None:
        ddf = read_clusters(layout[0], partition_size=1)
        assert ddf.expr.unique_partition_mapping_columns_from_shuffle == {("centroid",)}
        assert is_aligned(ddf, "centroid")
        assert align(ddf, "centroid") is ddf
        assert is_aligned(ddf[["id", "centroid"]][ddf.id > 2], "centroid")
        assert not is_aligned(ddf[["id"]], "centroid")
        assert not is_aligned(ddf.assign(centroid=ddf.id), "centroid")

    def test_groupby_by_cluster_needs_no_shuffle(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, expected = layout
        query = read_clusters(path, partition_size=1).groupby("centroid").id.apply(list, meta=("id", object))
        assert not shuffles(query)
        assert query.compute().sort_index().to_dict() == expected.groupby("centroid").id.apply(list).to_dict()

    @pytest.mark.parametrize("how", ["inner", "left", "outer"])
    @pytest.mark.parametrize("npartitions", [2, 4, 5])
    def test_merge_by_cluster_is_right(self, layout: tuple[Path, pd.DataFrame], how: str, npartitions: int) -> None:
        """A merge takes frames with the same claim to be partitioned alike, which clusters in order are not."""
        path, expected = layout
        names = pd.DataFrame({"centroid": [0, 1, 2, 7, 10], "name": list("abcde")})
        left = read_clusters(path, columns=["id", "centroid"], partition_size=1)
        left = left[left.id >= 0].rename(columns={"id": "document"})
        right = dd.from_pandas(names, npartitions=npartitions).shuffle("centroid")
        merged = left.merge(right, on="centroid", how=how, broadcast=False)
        again = merged.compute().sort_values("document", ignore_index=True)
        wanted = expected[["id", "centroid"]].rename(columns={"id": "document"}).merge(names, on="centroid", how=how)
        assert again.name.to_list() == wanted.sort_values("document").name.to_list()

    @pytest.mark.skipif(find_spec("cudf") is not None, reason="cuDF is there")
    def test_cudf_is_asked_for_where_it_is_not(self, layout: tuple[Path, pd.DataFrame]) -> None:
        with pytest.raises(MissingDependencyError, match=r"No module named 'cudf'.*pip install '\.\[cu13\]'"):
            read_clusters(layout[0], backend="cudf")

    def test_unaligned_frames_are_shuffled(self, layout: tuple[Path, pd.DataFrame]) -> None:
        _, expected = layout
        ddf = dd.from_pandas(expected.sort_values("id", ignore_index=True), npartitions=4)
        assert not is_aligned(ddf, "centroid")
        aligned = align(ddf, "centroid")
        assert is_aligned(aligned, "centroid")
        assert align(aligned, "centroid") is aligned
        assert shuffles(aligned)
        assert clusters_are_whole(aligned)

    def test_one_partition_is_aligned(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"centroid": [1, 2]}), npartitions=1)
        assert align(ddf, "centroid") is ddf

    def test_a_shuffle_by_more_columns_is_not_enough(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"centroid": range(8), "lang": 1}), npartitions=2)
        assert not is_aligned(ddf.shuffle(["centroid", "lang"]), "centroid")
        assert is_aligned(ddf.shuffle("centroid"), "centroid")

    def test_what_had_empty_divisions_is_shuffled(self) -> None:
        """Dask merges partitions of a sorted frame as it lowers it, of which a shuffle above must not know yet."""
        frame = pd.DataFrame({"id": range(400), "lang": ["a", "b", "c", "d"] * 100, "centroid": np.arange(400) % 20})
        ddf = dd.from_pandas(frame, npartitions=7).set_index("lang").reset_index()
        aligned = align(ddf, "centroid")
        assert sorted(aligned.compute()["id"]) == list(range(400))
        assert clusters_are_whole(aligned)

    def test_broadcast_merges_are_not_believed(self) -> None:
        left = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 5, "id": range(80)}), npartitions=40)
        right = dd.from_pandas(pd.DataFrame({"centroid": range(5), "name": list("abcde")}), npartitions=2)
        merged = left.merge(right, on="centroid", broadcast=True)
        assert ("centroid",) in merged.expr.unique_partition_mapping_columns_from_shuffle or (
            "centroid" in merged.expr.unique_partition_mapping_columns_from_shuffle
        )
        assert not is_aligned(merged, "centroid")
        single = left.merge(right.shuffle("centroid").repartition(npartitions=1), on="centroid")
        assert not is_aligned(single, "centroid")

    @pytest.mark.parametrize(
        "change",
        [
            lambda ddf: ddf.assign(centroid=ddf.coarse),
            lambda ddf: ddf.rename(columns={"centroid": "fine", "coarse": "centroid"}),
            lambda ddf: ddf.drop(columns="centroid").rename(columns={"coarse": "centroid"}),
            lambda ddf: with_columns(ddf, ["fine", "id", "centroid"]),
        ],
        ids=["assigned", "renamed", "dropped and renamed", "columns set"],
    )
    @pytest.mark.parametrize("on", ["centroid", ["centroid"], None], ids=["merged", "merged on a list", "shuffled"])
    def test_another_column_under_the_name_is_aligned_anew(
        self, change: Callable[[dd.DataFrame], dd.DataFrame], on: str | list[str] | None
    ) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 12, "id": range(80)}), npartitions=4)
        coarse = dd.from_pandas(pd.DataFrame({"centroid": range(12), "coarse": np.arange(12) % 3}), npartitions=3)
        ddf = ddf.shuffle("centroid").assign(coarse=ddf.centroid % 3) if on is None else ddf.merge(coarse, on=on)
        assert clusters_are_whole(align(change(ddf), "centroid"))

    def test_the_column_of_the_other_side_is_not_what_was_merged_on(self) -> None:
        left = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 12, "id": range(80)}), npartitions=4)
        right = dd.from_pandas(pd.DataFrame({"fine": range(12), "centroid": np.arange(12) % 3}), npartitions=3)
        merged = left.merge(right, left_on=["centroid"], right_on=["fine"], suffixes=("_old", ""))
        assert not is_aligned(merged, "centroid")
        assert clusters_are_whole(align(merged, "centroid"))

    @pytest.mark.parametrize("on", ["centroid", ["centroid"]], ids=str)
    def test_what_was_merged_on_clusters_is_not_shuffled_again(self, on: str | list[str]) -> None:
        left = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 12, "id": range(80)}), npartitions=4)
        right = dd.from_pandas(pd.DataFrame({"centroid": range(12), "name": list("abcdefghijkl")}), npartitions=3)
        merged = left.merge(right, on=on, broadcast=False)
        few = merged[merged["id"] > 3][["id", "centroid"]]
        assert align(few, "centroid") is few
        assert clusters_are_whole(few)
        # Nor is what was shuffled after a merge on something else.
        shuffled = align(left.merge(right.rename(columns={"centroid": "id"}), on="id", broadcast=False), "centroid")
        assert align(shuffled, "centroid") is shuffled

    def test_no_cluster_column(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"id": [1]}), npartitions=1)
        with pytest.raises(ClusterError, match=r"No cluster column 'centroid' in the frame.*\['id'\].*kmeans"):
            align(ddf, "centroid")
