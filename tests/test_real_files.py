"""Files as others write them: what agrees is one table, what is carried stays as it was, what disagrees is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_semdedup
from dask_semdedup import InvalidArgumentError, RankingStrategy, read_clusters, read_table
from dask_semdedup.errors import DataReadError
from dask_semdedup.io import fragments
from dask_semdedup.io.fragments import Fragment
from dask_semdedup.io.reader import Reader
from dask_semdedup.io.schemas import in_frames
from dask_semdedup.stages import PairwiseStage

VECTORS = pa.array([[1.0, 0.0], [1.0, 0.001], [0.0, 1.0]], pa.list_(pa.float32()))
ORDER = ["low", "mid", "high"]
BEST_FIRST = RankingStrategy(["quality"], ascending=False)


def ordered(codes: list[int | None], categories: list[str] = ORDER) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(categories), ordered=True)


def documents(**columns: Any) -> pa.Table:
    """Three rows, of which the second is a near copy of the first."""
    return pa.table({"id": pa.array([1, 2, 3]), "embeddings": VECTORS, **columns})


def write_parts(folder: Path, *tables: pa.Table, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", **options)
    return folder


def kept_ids(ddf: dd.DataFrame, ranking: RankingStrategy) -> list[int]:
    return sorted(ddf.semdedup.deduplicate(0.01, 1, ranking_strategy=ranking).compute()["id"])


class TestOrderOfCategories:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """By the alphabet 'mid' is the best; of row 1 and its copy the second is, by the order of the categories."""
        return write_parts(tmp_path / "in", documents(quality=ordered([1, 2, 0])))

    @pytest.mark.parametrize("how", ["table", "dask", "arrow", "memory", "clusters"])
    def test_is_what_ranks(self, path: Path, tmp_path: Path, how: str) -> None:
        ways = {
            "table": lambda: read_table(path),
            "dask": lambda: dd.read_parquet(path),
            "arrow": lambda: dd.read_parquet(path, dtype_backend="pyarrow"),
            "memory": lambda: dd.from_pandas(read_table(path).compute(), npartitions=2),
            "clusters": lambda: self.by_way_of_clusters(path, tmp_path),
        }
        assert kept_ids(ways[how](), BEST_FIRST) == [2, 3]

    def by_way_of_clusters(self, path: Path, tmp_path: Path) -> dd.DataFrame:
        clustered = read_table(path).semdedup.kmeans(1)
        clustered.semdedup.to_clusters(tmp_path / "clusters")
        ddf = read_clusters(tmp_path / "clusters")
        scores = ddf.semdedup.pairwise(ranking_strategy=BEST_FIRST).compute()
        assert scores["id"].tolist() == [2, 1, 3]
        return ddf

    def test_of_stages_too(self, path: Path, tmp_path: Path) -> None:
        read_table(path).semdedup.kmeans(1).semdedup.to_clusters(tmp_path / "clusters")
        (task,) = PairwiseStage(
            "id", "embeddings", str(tmp_path / "clusters"), str(tmp_path / "out"), ranking_strategy=BEST_FIRST
        ).run()
        assert pd.read_parquet(task.data[0])["id"].tolist() == [2, 1, 3]

    def test_is_that_of_all_files_together(self, tmp_path: Path) -> None:
        one = documents(quality=ordered([1, 2, 0]))
        two = documents(quality=ordered([1, 1, None], ["mid", "high"])).set_column(0, "id", pa.array([4, 5, 6]))
        ddf = read_table(write_parts(tmp_path, one, two, row_group_size=1))
        assert read_table(tmp_path)["quality"].compute().tolist()[:3] == ["mid", "high", "low"]
        rows = ddf.compute()
        order = BEST_FIRST.order(rows, cluster_field=None, id_field="id")
        assert rows["id"].iloc[order].tolist() == [2, 4, 5, 1, 3, 6]

    @pytest.mark.parametrize("partition_size", ["128MiB", "1B"])
    def test_does_not_depend_on_which_file_comes_first(self, tmp_path: Path, partition_size: str) -> None:
        """Put together as they come, categories would be in the order in which files show them."""
        one = documents(quality=ordered([1, 1, 0], ["mid", "high"]))
        two = documents(quality=ordered([0, 1, 1], ["low", "mid"])).set_column(0, "id", pa.array([4, 5, 6]))
        write_parts(tmp_path, one, two)
        ddf = read_table(tmp_path, partition_size=partition_size)
        dictionary = ddf["quality"].compute().array.__arrow_array__().unify_dictionaries().chunk(0).dictionary
        assert dictionary.to_pylist() == ORDER
        scores = ddf.semdedup.kmeans(1).semdedup.pairwise(ranking_strategy=BEST_FIRST).compute()
        assert scores["id"].tolist() == [1, 2, 3, 5, 6, 4]

    @pytest.mark.parametrize("other", [["high", "low"], ["awful", "high"]], ids=["turned", "not all together"])
    def test_that_is_not_one_is_refused(self, tmp_path: Path, other: list[str]) -> None:
        write_parts(tmp_path, documents(quality=ordered([1, 2, 0])), documents(quality=ordered([0, 0, 1], other)))
        ddf = read_table(tmp_path)
        with pytest.raises(InvalidArgumentError, match="'quality' holds ordered categories whose order is lost"):
            ddf.semdedup.deduplicate(ranking_strategy=BEST_FIRST)
        assert ddf["quality"].compute().tolist()[:3] == ["mid", "high", "low"]
        # Frames that others have read hold a dictionary for each file.
        column = pq.read_table(tmp_path)["quality"]
        rows = pd.DataFrame({"quality": pd.array(column, dtype=pd.ArrowDtype(column.type)), "id": range(6)})
        with pytest.raises(InvalidArgumentError, match="'quality' holds ordered categories whose order is lost"):
            BEST_FIRST.order(rows, cluster_field=None, id_field="id")

    def test_of_more_categories_than_the_codes_of_a_file_count(self, tmp_path: Path) -> None:
        names = [f"{number:03}" for number in range(200)]
        write_parts(tmp_path, *(pa.table({"q": ordered([0, 99], part)}) for part in (names[100:], names[:101])))
        assert read_table(tmp_path)["q"].compute().tolist() == ["100", "199", "000", "099"]

    def test_that_changes_within_a_file_is_an_error(self, tmp_path: Path) -> None:
        one, two = (documents(quality=ordered([0, 1, 1], order)) for order in (["low", "mid"], ["mid", "low"]))
        with pq.ParquetWriter(tmp_path / "0.parquet", one.schema) as writer:
            writer.write_table(one)
            writer.write_table(two)
        with pytest.raises(
            DataReadError, match=r"0.parquet: Column 'quality' holds ordered categories \['mid', 'low'\]"
        ):
            read_table(tmp_path).compute()

    @pytest.mark.parametrize("how", ["no dictionary", "strings", "not ordered"])
    def test_that_files_do_not_tell_is_refused_before_anything_runs(self, tmp_path: Path, how: str) -> None:
        table = documents(quality=ordered([1, 2, 0]), group=[0, 0, 0])
        if how == "no dictionary":
            write_parts(tmp_path, table, use_dictionary=False)
        else:
            strings = pa.array(["low", "mid", "high"])
            quality = strings if how == "strings" else strings.dictionary_encode()
            write_parts(tmp_path, table, documents(quality=quality, group=[1, 1, 1]))
        ddf = read_table(tmp_path)
        with pytest.raises(InvalidArgumentError, match="'quality' holds ordered categories whose order is lost"):
            ddf.semdedup.deduplicate(ranking_strategy=BEST_FIRST)
        clusters = read_clusters([tmp_path / name for name in os.listdir(tmp_path)], cluster_field="group")
        with pytest.raises(InvalidArgumentError, match="'quality' holds ordered categories whose order is lost"):
            clusters.semdedup.pairwise(cluster_field="group", ranking_strategy=BEST_FIRST)
        # Nor does it come back by writing them.
        again = tmp_path.with_name(f"{tmp_path.name}-again")
        ddf.semdedup.to_parquet(again)
        type_ = pq.read_schema(again / "part.000000.parquet").field("quality").type
        assert not getattr(type_, "ordered", False)


class TestFilesThatAgree:
    @pytest.mark.parametrize(
        ("one", "other", "type_"),
        [
            (pa.array([1, 2, 3], pa.int8()), pa.array([1, 2, 3], pa.int64()), "int64"),
            (pa.array([1, 2, 3], pa.int8()), pa.nulls(3), "int8[pyarrow]"),
            (pa.nulls(3), pa.array(["a", "b", None]), "string"),
            (pa.nulls(3), ordered([0, 1, 2]), "dictionary<values=string, indices=int8, ordered=1>[pyarrow]"),
            (pa.array([1, 2, 3]), pa.array([0.5, None, float("nan")]), "double[pyarrow]"),
            (pa.array(["a", "b", "c"]), pa.array(["a", "b", "c"]).dictionary_encode(), "string"),
            (pa.array(["a", "b", "c"]), pa.array(["a", "b", "c"], pa.string_view()), "string"),
            (VECTORS, VECTORS.cast(pa.list_(pa.float64())), "list<element: double>[pyarrow]"),
            (VECTORS, VECTORS.cast(pa.list_(pa.float32(), 2)), "list<element: float>[pyarrow]"),
            (VECTORS, VECTORS.cast(pa.list_(pa.field("x", pa.float32(), False))), "list<element: float>[pyarrow]"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("turned", [False, True])
    def test_are_one_table(self, tmp_path: Path, one: pa.Array, other: pa.Array, type_: str, turned: bool) -> None:
        columns = [other, one] if turned else [one, other]
        ddf = read_table(write_parts(tmp_path, *(pa.table({"x": column}) for column in columns)))
        rows = ddf.compute()
        assert str(ddf.dtypes["x"]) == str(rows.dtypes["x"]) == type_
        values = [value for column in columns for value in column.to_pylist()]
        for found, value in zip(rows["x"], values, strict=True):
            if isinstance(value, list):
                assert list(found) == value
            else:
                assert pd.isna(found) if value is None or value != value else found == value

    def test_clusters_and_stages_take_them_too(self, tmp_path: Path) -> None:
        empty = pa.table({name: pa.nulls(0) for name in ("id", "embeddings", "extra")})
        double = documents().set_column(1, "embeddings", VECTORS.cast(pa.list_(pa.float64())))
        double = double.set_column(0, "id", pa.array([4, 5, 6], pa.int16()))
        write_parts(tmp_path / "in" / "centroid=0", empty, documents(text=["a", "b", "c"]), double)
        which = {"which_to_keep": "random"}
        scores = read_clusters(tmp_path / "in").semdedup.pairwise(**which).compute()
        assert scores["id"].dtype == np.int64
        (task,) = PairwiseStage("id", "embeddings", str(tmp_path / "in"), str(tmp_path / "out"), **which).run()
        assert sorted(scores["id"]) == sorted(pd.read_parquet(task.data[0])["id"]) == [1, 2, 3, 4, 5, 6]
        assert sorted(scores["cosine_sim_score"].round(3)) == sorted(
            pd.read_parquet(task.data[0])["cosine_sim_score"].round(3)
        )
        assert (scores["cosine_sim_score"] > 0.99).sum() == 4

    def test_bits_of_halves_are_no_numbers(self, tmp_path: Path) -> None:
        bits = pa.array([[15360, 0]] * 3, pa.list_(pa.uint16()))
        write_parts(tmp_path, documents(), documents().set_column(1, "embeddings", bits))
        with pytest.raises(DataReadError, match=r"'embeddings' is list<.*uint16> in .*1.parquet but list<.*float> in"):
            read_table(tmp_path).semdedup.deduplicate()

    def test_values_that_do_not_fit_name_the_file(self, tmp_path: Path) -> None:
        write_parts(tmp_path, pa.table({"x": pa.array([2**63], pa.uint64())}), pa.table({"x": pa.array([1])}))
        with pytest.raises(DataReadError, match=r"0.parquet: Column 'x' is uint64, and cannot be read as int64"):
            read_table(tmp_path).compute()


class TestColumnsThatNobodyNeeds:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        one, two = documents(text=["a", "b", "c"]), documents(text=[1, 2, 3])
        two = two.set_column(0, "id", pa.array([4, 5, 6]))
        write_parts(tmp_path / "centroid=0", one, two)
        return tmp_path

    def test_are_no_reason_to_fail(self, path: Path, tmp_path: Path) -> None:
        assert len(read_clusters(path).semdedup.pairwise(which_to_keep="random").compute()) == 6
        assert len(read_table(path, ["id", "embeddings"]).semdedup.deduplicate().compute()) == 2
        PairwiseStage("id", "embeddings", str(path), f"{tmp_path}-out", which_to_keep="random").run()
        assert len(read_table(path)[["id"]].compute()) == 6

    def test_that_are_needed_name_both_files_and_types(self, path: Path) -> None:
        message = r"Column 'text' is int64 in .*1.parquet but string in .*0.parquet. Give it one type in all files"
        with pytest.raises(DataReadError, match=message):
            read_table(path)["text"].compute()
        with pytest.raises(DataReadError, match=message):
            read_table(path, ["id", "text"])
        with pytest.raises(DataReadError, match=message):
            read_clusters(path).semdedup.pairwise(which_to_keep="random", id_field="text")

    def test_of_one_name_are_refused(self, tmp_path: Path) -> None:
        table = pa.table(
            [pa.array([1, 2, 3]), VECTORS, pa.array(list("abc")), pa.array(list("def"))], ["id", "embeddings", "x", "x"]
        )
        write_parts(tmp_path, table)
        assert len(read_table(tmp_path, ["id", "embeddings"]).semdedup.deduplicate(n_clusters=1).compute()) == 2
        with pytest.raises(DataReadError, match=r"0.parquet has several columns named 'x'"):
            read_table(tmp_path).compute()


class TestFilesThatChange:
    """What is read must be what was planned."""

    def change(self, path: Path, how: str) -> None:
        table = pq.read_table(path)
        if how == "two groups":
            pq.write_table(table, path, row_group_size=len(table) // 2)
        elif how == "doubled":
            pq.write_table(pa.concat_tables([table, table]), path, row_group_size=len(table))
        elif how == "other rows":
            # Of the same size, by chance.
            size = path.stat().st_size
            pq.write_table(table.slice(1), path)
            path.write_bytes(path.read_bytes()[:-8].ljust(size - 8, b"\0") + b"\0" * 4 + b"PAR1")
        elif how == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.unlink()

    @pytest.mark.parametrize("how", ["two groups", "doubled", "other rows", "cut", "gone"])
    @pytest.mark.parametrize("read", [read_table, read_clusters], ids=["table", "clusters"])
    def test_are_named(self, tmp_path: Path, how: str, read: Any) -> None:
        table = pa.concat_tables([documents()] * 100)
        write_parts(tmp_path / "centroid=0", table)
        ddf = read(tmp_path)
        self.change(tmp_path / "centroid=0" / "0.parquet", how)
        with pytest.raises(DataReadError, match=r"0.parquet"):
            ddf[["id"]].compute()

    def test_rows_that_are_not_there_are_missed(self, tmp_path: Path) -> None:
        """Where the size says nothing, as of remote files."""
        write_parts(tmp_path, documents())
        fs, schema = LocalFileSystem(), pa.schema({"id": pa.int64()})
        fragment = Fragment(str(tmp_path / "0.parquet"), 4)
        with pytest.raises(DataReadError, match=r"0.parquet changed since the footers were read"):
            Reader(fs, schema).read([fragment], ["id"])


@pytest.mark.parametrize("pattern", ["centroid=*/*.parquet", "**/*.parquet", "*/0.parquet", "centroid=[0-1]/*"])
def test_patterns_raise_for_folders_that_cannot_be_listed(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cluster in range(2):
        write_parts(tmp_path / f"centroid={cluster}", documents())
    assert len(read_clusters(tmp_path / pattern)) == 6
    scan = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("centroid=1"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="centroid=1"):
        read_clusters(tmp_path / pattern)


# --- What is carried -------------------------------------------------------------------------------------------------

LEAVES = [
    *(pa.null(), pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary(3)),
    *(pa.date32(), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.duration("s"), pa.duration("ns")),
    *(pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("us", "UTC")),
    *(pa.timestamp("ns", "Europe/Berlin"), pa.timestamp("ms", "+01:00"), pa.decimal128(20, 3), pa.decimal256(50, 7)),
    *(pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string(), ordered=True)),
    *(pa.dictionary(pa.int32(), pa.int64()), pa.uuid(), pa.fixed_shape_tensor(pa.float32(), [2, 2])),
]


def leaf_values(type_: pa.DataType) -> st.SearchStrategy[Any]:
    """Values of a type."""
    types = pa.types
    if types.is_integer(type_):
        signed = types.is_signed_integer(type_)
        bits = type_.bit_width - signed
        return st.integers(-(2**bits) if signed else 0, 2**bits - 1)
    if types.is_floating(type_):
        return st.floats(width=type_.bit_width)
    if types.is_fixed_size_binary(type_):
        return st.binary(min_size=type_.byte_width, max_size=type_.byte_width)
    if types.is_binary(type_) or types.is_large_binary(type_):
        return st.binary(max_size=5)
    if types.is_null(type_):
        return st.none()
    return st.booleans() if types.is_boolean(type_) else st.text(st.characters(codec="utf-8"), max_size=5)


@st.composite
def columns_of(draw: st.DrawFn, type_: pa.DataType, rows: int) -> pa.Array:
    """A column of a type, with nulls."""
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(type_, draw(columns_of(type_.storage_type, rows)))
    if types.is_dictionary(type_):
        values = draw(st.lists(leaf_values(type_.value_type), min_size=1, max_size=5, unique=True))
        codes = draw(st.lists(st.none() | st.integers(0, len(values) - 1), min_size=rows, max_size=rows))
        codes = pa.array(codes, type_.index_type)
        return pa.DictionaryArray.from_arrays(codes, pa.array(values, type_.value_type), ordered=type_.ordered)
    if types.is_temporal(type_):
        # Times of a day, and days and moments that Python's calendar has.
        most = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}.get(getattr(type_, "unit", "s"), 1) * 86_399
        numbers = st.none() | st.integers(0 if types.is_time(type_) else -most, most)
        integers = pa.int32() if type_.bit_width == 32 else pa.int64()
        return pa.array(draw(st.lists(numbers, min_size=rows, max_size=rows)), integers).view(type_)
    if types.is_decimal(type_):
        numbers = draw(st.lists(st.none() | st.integers(-(10**15), 10**15), min_size=rows, max_size=rows))
        return pa.array(numbers, pa.int64()).cast(pa.decimal128(19, 0)).cast(type_)
    if types.is_list(type_) or types.is_fixed_size_list(type_):
        size = type_.list_size if types.is_fixed_size_list(type_) else None
        sizes = [size if size is not None else draw(st.integers(0, 3)) for _ in range(rows)]
        flat = draw(columns_of(type_.value_type, sum(sizes)))
        if size is not None:
            return pa.FixedSizeListArray.from_arrays(flat, type=type_)
        return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *sizes]), pa.int32()), flat, type=type_)
    if types.is_struct(type_):
        return pa.StructArray.from_arrays([draw(columns_of(field.type, rows)) for field in type_], fields=list(type_))
    return pa.array(draw(st.lists(st.none() | leaf_values(type_), min_size=rows, max_size=rows)), type_)


def any_type() -> st.SearchStrategy[pa.DataType]:
    inner = st.sampled_from(
        [type_ for type_ in LEAVES if not (pa.types.is_null(type_) or isinstance(type_, pa.BaseExtensionType))]
    )
    structs = inner.map(lambda type_: pa.struct({"a": pa.int32(), "b": type_}))
    return st.sampled_from(LEAVES) | inner.map(pa.list_) | structs


@settings(max_examples=20)
@given(st.data())
def test_columns_come_out_as_they_went_in(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The Arrow type, the metadata, and the values to the last bit, of every type that Parquet holds."""
    folder = tmp_path_factory.mktemp("carried")
    table = documents().replace_schema_metadata({"huggingface": '{"info": 1}', "geo": "{}"})
    columns = any_type().flatmap(lambda type_: columns_of(type_, 3))
    for number, column in enumerate(data.draw(st.lists(columns, min_size=1, max_size=10))):
        field = pa.field(f"x{number}", column.type, metadata={"label": "of the field"})
        table = table.append_column(field, column)
    write_parts(folder / "in", table)
    before = pq.read_table(folder / "in" / "0.parquet")
    read_table(folder / "in").semdedup.deduplicate(0.01, 1).semdedup.to_parquet(folder / "out")
    after = pq.read_table(folder / "out" / "part.000000.parquet")
    assert after.schema.equals(before.schema, check_metadata=True)
    assert bits_of(after) in ([bits_of(before)[row] for row in rows] for rows in ([0, 2], [1, 2]))


def bits_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as Arrow shows them: unlike values of Python, NaN equals itself here."""
    return [{name: repr(table[name][row]) for name in table.column_names} for row in range(len(table))]


def test_the_command_keeps_types_and_metadata(tmp_path: Path, run: Any) -> None:
    x = pa.array([float("nan"), None, 1.5])
    table = documents(x=x, q=ordered([1, 2, 0]), lang=pa.array(["en", "de", "en"]).dictionary_encode())
    table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {}}}'})
    path = write_parts(tmp_path / "in", table)
    run(path, tmp_path / "out", "--rank-by", "q:desc")
    kept = pq.read_table(tmp_path / "out" / "deduplicated" / "part.000000.parquet")
    assert kept.schema.equals(pq.read_schema(path / "0.parquet"), check_metadata=True)
    assert kept["id"].to_pylist() == [2, 3]
    assert kept["x"].to_pylist() == [None, 1.5]


def test_notes_of_pandas_survive(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"id": [1, 2, 3], "n": pd.array([1, None, 3], "Int32"), "when": pd.to_datetime(["2020-01-01"] * 3, utc=True)},
        index=[7, 8, 9],
    )
    frame.to_parquet(tmp_path / "a.parquet")
    read_table(tmp_path / "a.parquet").semdedup.to_parquet(tmp_path / "out")
    back = pd.read_parquet(tmp_path / "out")
    pd.testing.assert_frame_equal(back, pd.read_parquet(tmp_path / "a.parquet").reset_index(drop=True))
    assert back["n"].dtype == "Int32"


@pytest.fixture
def run() -> Any:
    from click.testing import CliRunner

    from dask_semdedup import cli

    def invoke(path: Path, output: Path, *options: object, code: int = 0) -> Any:
        result = CliRunner().invoke(cli.main, ["run", *map(str, [path, output, *options]), "--n-clusters", "1", "-q"])
        assert result.exit_code == code, result.stderr
        return result

    return invoke


# --- The command -----------------------------------------------------------------------------------------------------


def test_run_copies_no_other_columns_than_it_needs(tmp_path: Path, run: Any) -> None:
    table = documents(picture=[b"x" * 10_000] * 3, quality=[1, 2, 3])
    run(write_parts(tmp_path / "in", table), tmp_path / "out", "--rank-by", "quality:desc")
    (file,) = (tmp_path / "out" / "clusters" / "centroid=0").iterdir()
    distances = ["l2_dist_to_cent", "cosine_dist_to_cent"]
    assert pq.read_schema(file).names == ["id", "embeddings", "quality", *distances]
    assert file.stat().st_size < 10_000
    kept = pq.read_table(tmp_path / "out" / "deduplicated" / "part.000000.parquet")
    assert kept.column_names == table.column_names


def test_run_keeps_columns_of_folders_and_ranks_by_them(tmp_path: Path, run: Any) -> None:
    for year in (2023, 2024):
        folder = tmp_path / "in" / "lang=en" / f"year={year}"
        write_parts(folder, documents().set_column(0, "id", pa.array([year, year + 10, year + 20])))
    run(tmp_path / "in", tmp_path / "out", "--rank-by", "year:desc")
    kept = pq.read_table(tmp_path / "out" / "deduplicated")
    assert sorted(kept["year"].to_pylist()) == [2024, 2024]
    assert kept["lang"].to_pylist() == ["en", "en"]


def test_run_names_a_way_round_files_that_disagree(tmp_path: Path, run: Any) -> None:
    two = documents(text=[1, 2, 3]).set_column(0, "id", pa.array([4, 5, 6]))
    path = write_parts(tmp_path / "in", documents(text=["a", "b", "c"], n=[1, 2, 3]), two)
    result = run(path, tmp_path / "out", code=2)
    assert "Column 'text' is int64 in" in result.stderr
    assert "name columns that agree. (--column)" in result.stderr
    run(path, tmp_path / "out", "--column", "n")
    assert pq.read_schema(tmp_path / "out" / "deduplicated" / "part.000000.parquet").names == ["id", "n", "embeddings"]


def test_run_looks_at_ids_first_and_makes_them(tmp_path: Path, run: Any) -> None:
    path = write_parts(tmp_path / "in", documents(text=["a", "b", "c"]), documents(text=["d", "e", "f"]))
    result = run(path, tmp_path / "out", code=2)
    assert "Column 'id': 3 ids occur in several rows (1, 2, 3)." in result.stderr
    assert "--make-ids" in result.stderr
    assert not (tmp_path / "out").exists()
    assert "ids are to be made of that name" in run(path, tmp_path / "out", "--make-ids", code=2).stderr
    run(path, tmp_path / "out", "--make-ids", "--id-field", "row", "--text-field", "text")
    kept = pq.read_table(tmp_path / "out" / "deduplicated").to_pylist()
    assert len(kept) == 2
    names = {f"{number}.parquet:{row}": "abcdef"[3 * number + row] for number in range(2) for row in range(3)}
    assert all(names[document["row"]] == document["text"] for document in kept)
    manifest = json.loads((tmp_path / "out" / "clusters" / "_manifest.json").read_text())
    assert manifest["parameters"]["make_ids"] is True


@pytest.mark.parametrize("partition_size", ["128MiB", "1B"])
def test_made_ids_do_not_depend_on_partitions(tmp_path: Path, partition_size: str) -> None:
    write_parts(tmp_path / "lang=en", pa.concat_tables([documents()] * 2), row_group_size=2)
    ddf = read_table(tmp_path, id_field="row", make_ids=True, partition_size=partition_size)
    assert ddf.columns.tolist() == ["row", "id", "embeddings", "lang"]
    assert ddf["row"].compute().tolist() == [f"lang=en/0.parquet:{row}" for row in range(6)]
    one = dask_semdedup.lazy.tables.find_rows(tmp_path, ["lang=en/0.parquet:4"], ["id"], id_field="row", make_ids=True)
    assert one["id"].to_dict() == {"lang=en/0.parquet:4": 2}


# --- Embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[100, 0], [100, 1], [0, 100]], pa.list_(pa.uint8())),
        pa.array([[100, 0], [100, 1], [0, 100]], pa.list_(pa.int8())),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2]), VECTORS.cast(pa.list_(pa.float32(), 2))
        ),
    ],
    ids=["uint8", "int8", "tensors"],
)
def test_lists_of_bytes_and_tensors_are_embeddings(tmp_path: Path, column: pa.Array) -> None:
    path = write_parts(tmp_path, documents().set_column(1, "embeddings", column))
    assert len(read_table(path).semdedup.deduplicate(0.01, 1).compute()) == 2


def test_what_embeddings_are_not_shows_how_they_become_them(tmp_path: Path) -> None:
    spark = {"type": pa.int8(), "size": pa.int32(), "indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())}
    vectors = [{"type": 1, "size": None, "indices": None, "values": [float(row), 1.0]} for row in range(3)]
    texts = ["[1, 0]", "[1, 0.001]", "[0, 1]"]
    for column, advice in [(pa.array(vectors, pa.struct(spark)), "vector_to_array"), (pa.array(texts), "json.loads")]:
        ddf = read_table(write_parts(tmp_path, documents().set_column(1, "embeddings", column)))
        with pytest.raises(dask_semdedup.EmbeddingError, match=advice):
            ddf.semdedup.deduplicate()
    wide = pa.table({"id": [1, 2], **{f"dim_{number}": [0.5, float(number)] for number in range(16)}})
    ddf = read_table(write_parts(tmp_path, wide))
    with pytest.raises(dask_semdedup.MissingColumnsError, match="dim_0 to dim_15 are the dimensions") as error:
        ddf.semdedup.deduplicate()
    line = str(error.value).partition("join them: ")[2].rstrip(".")
    exec(line, {"ddf": ddf, "pd": pd, "pa": pa})
    assert list(ddf.compute()["embeddings"][1]) == list(range(16))


@pytest.mark.parametrize("type_", [np.float32, np.float64])
def test_frames_with_dasks_defaults_can_be_written(tmp_path: Path, type_: type) -> None:
    table = documents().set_column(1, "embeddings", VECTORS.cast(pa.list_(pa.from_numpy_dtype(type_))))
    ddf = dd.read_parquet(write_parts(tmp_path / "in", table))
    assert ddf.dtypes["embeddings"] == np.dtype(object)
    ddf.semdedup.deduplicate(0.01, 1).to_parquet(tmp_path / "out")
    kept = pq.read_table(tmp_path / "out")
    assert kept["embeddings"].type.value_type == pa.from_numpy_dtype(type_)
    assert len(kept) == 2


def test_of_what_dask_cannot_write_there_is_a_warning_first(tmp_path: Path) -> None:
    ddf = dd.read_parquet(write_parts(tmp_path / "in", documents(tags=[["a"], ["b"], []])))
    with pytest.warns(UserWarning, match=r"cannot write columns of Python objects .*\(tags\).*semdedup.to_parquet"):
        kept = ddf.semdedup.deduplicate(0.01, 1)
    kept.semdedup.to_parquet(tmp_path / "out")
    assert pq.read_table(tmp_path / "out")["tags"].to_pylist()[1] == []


# --- Size and kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_offsets_count_beyond_what_32_bits_hold(tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types with 64-bit offsets, and batches of rows: 2 GiB themselves would take too long."""
    binary = pa.array([b"x", None, b"yy"])
    column = pa.StructArray.from_arrays([binary], ["bytes"]) if nested else binary
    write_parts(tmp_path, documents(picture=column))
    monkeypatch.setattr(fragments, "BATCH_ROWS", 2)
    rows = read_table(tmp_path).compute()
    assert rows.dtypes["picture"].pyarrow_dtype == in_frames(column.type)
    assert "large_binary" in str(rows.dtypes["picture"])
    assert pa.array(rows["picture"]).to_pylist() == column.to_pylist()


def test_reading_takes_little_more_than_the_rows(tmp_path: Path) -> None:
    """Arrow decodes lists in several times their bytes: as many of them as are decoded at once."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(1 << 23, np.float32)), 512).cast(pa.list_(pa.float32()))
    pq.write_table(pa.table({"embeddings": lists}), tmp_path / "a.parquet", use_dictionary=False)
    program = (
        "import sys, pyarrow, dask_semdedup\n"
        "rows = dask_semdedup.read_table(sys.argv[1], backend='pandas').compute(scheduler='sync')\n"
        "print(len(rows), pyarrow.default_memory_pool().max_memory())"
    )
    out = subprocess.run([sys.executable, "-c", program, tmp_path], check=True, capture_output=True, text=True).stdout
    rows, peak = map(int, out.split())
    assert rows == 1 << 14
    assert 4 << 23 <= peak < 2 * (4 << 23)


def test_arrays_pickles_and_texts_are_refused_with_the_line_that_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.eye(4, dtype=np.float32)
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "a.npz", rows)
    pd.DataFrame({"id": range(4), "embeddings": list(rows)}).to_pickle(tmp_path / "a.pkl")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    for suffix in ("npy", "npz", "pkl", "txt"):
        path = tmp_path / f"a.{suffix}"
        with pytest.raises(DataReadError, match=rf"a\.{suffix} is an? .*, which is not supported") as error:
            read_table(path)
        line = str(error.value).partition("Convert it first: ")[2].partition("; or")[0].removesuffix(".")
        eval(line, {"pandas": pd, "numpy": np, "path": path})
        read = read_table("documents.parquet")
        if suffix == "txt":
            assert read["text"].compute().tolist() == ["one", "two"]
        else:
            assert len(read.semdedup.deduplicate()) == 4
    # In a folder, they are no data.
    (tmp_path / "documents.parquet").unlink()
    (tmp_path / "a.json").write_text('{"id": 1}\n')
    assert len(read_table(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        ("data-00000.arrow", "load_from_disk"),
        ("a.feather", "read_feather"),
        ("a.csv", "read_csv"),
        ("a.csv.gz", "read_csv"),
    ],
)
def test_other_formats_are_refused_with_the_line_that_converts_them(tmp_path: Path, name: str, conversion: str) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    (tmp_path / "dataset_info.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(
            DataReadError, match=f"{name} is an? .*, which is not supported. Convert it first: .*{conversion}"
        ):
            read_table(path)
    # Beside Parquet they are no data.
    write_parts(tmp_path, documents())
    assert len(read_table(tmp_path)) == 3


@pytest.mark.parametrize(("make", "reads"), [(pa.ipc.new_stream, "open_stream"), (pa.ipc.new_file, "open_file")])
def test_the_line_that_converts_arrow_files_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], reads: str
) -> None:
    table = pa.table({"id": [1, 2], "embeddings": [[1.0, 0.0], [0.0, 1.0]]})
    path = str(tmp_path / "a.arrow")
    with make(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataReadError, match=r"with open_file in place of open_stream if .* ARROW1") as e:
        read_table(path)
    assert Path(path).read_bytes().startswith(b"ARROW1") == (reads == "open_file")
    line = re.search(r"Convert it first: (.*?\)), with", str(e.value))[1]  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    exec(line.replace("open_stream", reads), {"pyarrow": pa, "path": path})
    assert pq.read_table("documents.parquet").equals(table)


@pytest.mark.gpu
class TestOnAGpu:
    """Frames of cuDF are read from the same files, to the same scores and in the same order."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        pytest.importorskip("cudf")
        double = documents(quality=ordered([1, 2, 0])).set_column(1, "embeddings", VECTORS.cast(pa.list_(pa.float64())))
        double = double.set_column(0, "id", pa.array([4, 5, 6], pa.int16()))
        fixed = documents(quality=ordered([0, 0, 1], ["low", "mid"]), text=[b"a", b"b", b"c"])
        fixed = fixed.set_column(1, "embeddings", VECTORS.cast(pa.list_(pa.float32(), 2)))
        fixed = fixed.set_column(0, "id", pa.array([7, 8, 9]))
        empty = pa.table({name: pa.nulls(0) for name in ("id", "embeddings")})
        write_parts(tmp_path / "centroid=0", empty, documents(quality=ordered([1, 2, 0])), double)
        write_parts(tmp_path / "centroid=1", fixed)
        return tmp_path

    def scores(self, path: Path, backend: str, **options: Any) -> pd.DataFrame:
        scores = read_clusters(path, backend=backend).semdedup.pairwise(**options).compute()
        return scores.to_pandas() if backend == "cudf" else scores

    @pytest.mark.parametrize(
        "options", [{"which_to_keep": "random"}, {"ranking_strategy": BEST_FIRST}], ids=["any", "best"]
    )
    def test_files_that_agree_are_one_table(self, path: Path, options: dict[str, Any]) -> None:
        expected, found = (self.scores(path, backend, **options) for backend in ("pandas", "cudf"))
        assert found["id"].tolist() == expected["id"].tolist()
        assert found["max_id"].tolist() == expected["max_id"].tolist()
        np.testing.assert_allclose(found["cosine_sim_score"], expected["cosine_sim_score"], atol=2e-6)

    def test_meta_is_what_partitions_are(self, path: Path) -> None:
        ddf = read_clusters(path, backend="cudf", columns=["id", "embeddings", "quality", "centroid"])
        rows = ddf.compute()
        assert ddf.dtypes.astype(str).to_dict() == rows.dtypes.astype(str).to_dict()
        assert rows["quality"].to_pandas().tolist()[:3] == ["mid", "high", "low"]

    @pytest.mark.parametrize("how", ["doubled", "cut"])
    def test_files_that_change_are_named(self, path: Path, how: str) -> None:
        ddf = read_clusters(path, backend="cudf")
        TestFilesThatChange().change(path / "centroid=1" / "0.parquet", how)
        with pytest.raises(DataReadError, match=r"0.parquet"):
            ddf[["id"]].compute()

    def test_stages_too(self, path: Path, tmp_path: Path) -> None:
        import dask

        with dask.config.set({"dataframe.backend": "cudf"}):
            tasks = PairwiseStage("id", "embeddings", str(path), f"{path}-out", ranking_strategy=BEST_FIRST).run()
        expected = self.scores(path, "pandas", ranking_strategy=BEST_FIRST)
        found = [id_ for task in tasks for id_ in pd.read_parquet(task.data[0])["id"]]
        assert found == expected["id"].tolist()
