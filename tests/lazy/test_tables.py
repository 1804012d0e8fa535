"""Parquet and JSON lines are read into the same frames, lazily."""

from __future__ import annotations

import json
import re
import zipfile
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_semdedup.errors import DataReadError, EmbeddingError, InvalidArgumentError, MissingColumnsError
from dask_semdedup.lazy.tables import find_rows, from_pandas, read_scores, read_table, table_token
from tests.data import LAYOUTS, RECORDS, ROWS, write_json


def test_files_in_hidden_folders_are_no_data(tmp_path: Path) -> None:
    for folder in ("", ".ipynb_checkpoints", "_temporary/0", "_lang=en"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / folder / "a.jsonl", RECORDS)
    frame = read_table(tmp_path).compute()
    assert len(frame) == 2 * len(RECORDS)
    assert frame["_lang"].dropna().tolist() == ["en"] * len(RECORDS)


@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?"])
def test_a_folder_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    for folder in (name, "run1", "a b", "whats"):
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder / "a.jsonl", RECORDS if folder == name else RECORDS[:1])
        pq.write_table(pa.table({"id": [1, 2]} if folder == name else {"id": [1]}), tmp_path / folder / "b.parquet")
    assert len(read_table(tmp_path / name / "a.jsonl")) == len(RECORDS)
    assert len(read_table(tmp_path / name / "b.parquet")) == 2


def test_keys_above_a_folder_are_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "[x]" / "lang=en" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": [1]}), folder / "a.parquet")
    assert list(read_table(folder).columns) == ["id"]
    with pytest.raises(MissingColumnsError, match="lang"):
        read_table(folder, ["id", "lang"])


def test_patterns_find_json_lines_too(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.txt", "_c.jsonl", ".d.jsonl"):
        write_json(tmp_path / name, RECORDS)
    assert len(read_table(tmp_path / "*.jsonl")) == 2 * len(RECORDS)
    (tmp_path / "c.txt").write_text("what these are")
    assert len(read_table(tmp_path / "*")) == 2 * len(RECORDS)


def test_only_wanted_columns_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    frame = read_table(tmp_path)[["id"]].optimize()
    assert frame.expr.columns == ["id"]
    assert "'text'" not in repr(frame.expr.operands)
    assert frame.compute()["id"].tolist() == [row["id"] for row in RECORDS]


def test_parquet_is_parted_by_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=10)
    assert read_table(tmp_path).npartitions == 1
    assert read_table(tmp_path, partition_size="100B").npartitions == 5
    assert len(read_table(tmp_path, partition_size="100B").compute()) == len(RECORDS)


def test_truncated_parquet_names_the_file(tmp_path: Path) -> None:
    for name in ("a", "bad"):
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / f"{name}.parquet")
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(DataReadError, match=r"bad\.parquet"):
        read_table(tmp_path)


def test_mixed_folders_and_missing_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(MissingColumnsError, match="'text'"):
        read_table(tmp_path, ["id", "text"])
    (tmp_path / "dataset_info.json").write_text('{"rows": 1}')
    assert len(read_table(tmp_path)) == 1
    write_json(tmp_path / "b.jsonl", RECORDS)
    with pytest.raises(DataReadError, match="both Parquet"):
        read_table(tmp_path)


@pytest.mark.parametrize("path", ["{}", "{}/", "{}/lang=*", "{}/*/*.parquet", "file://{}", "simplecache::file://{}"])
@pytest.mark.parametrize("years", [False, True], ids=["strings", "integers"])
def test_a_column_may_stand_in_the_names_of_folders(tmp_path: Path, path: str, years: bool) -> None:
    langs = pd.Series([2001, -5, 2001, 7] if years else ["en", "a=b/c", "en", "7"])
    frame = pd.DataFrame({"id": range(4), "lang": langs, "text": list("abcd")})
    frame.to_parquet(tmp_path, partition_cols=["lang"])
    read = read_table(path.format(tmp_path), ["lang", "id"])
    assert list(read.columns) == ["lang", "id"]
    assert read.compute().set_index("id")["lang"].to_dict() == frame.set_index("id")["lang"].to_dict()
    assert read[["lang"]].compute()["lang"].dtype == ("int64" if years else read["lang"].dtype)


def test_columns_in_the_names_of_folders_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [1, 2, 3], "lang": ["en", None, "de"], "year": [1, 2, None]})
    frame.to_parquet(tmp_path / "two", partition_cols=["lang", "year"])
    read = read_table(tmp_path / "two")
    rows = read.compute()
    assert read.dtypes.to_dict() == rows.dtypes.to_dict()
    assert read.dtypes.to_dict() == {"id": np.int64, "lang": read["lang"].dtype, "year": pd.ArrowDtype(pa.int64())}
    rows = rows.sort_values("id").astype(object)
    assert rows.where(rows.notna(), None).to_dict("list") == {
        "id": [1, 2, 3],
        "lang": ["en", None, "de"],
        "year": [1, 2, None],
    }
    # Not below the path, but the path itself.
    (below,) = (tmp_path / "two" / "lang=en").iterdir()
    assert list(read_table(below).columns) == ["id"]
    several = [tmp_path / "two" / f"lang={lang}" for lang in ("en", "de")]
    assert read_table(several)[["id", "year"]].compute()["id"].tolist() == [3, 1]
    assert list(read_table(tmp_path / "two", ["id"]).columns) == ["id"]


def test_what_files_hold_goes_before_the_names_of_folders(tmp_path: Path) -> None:
    folder = tmp_path / "lang=__HIVE_DEFAULT_PARTITION__" / "year=2"
    folder.mkdir(parents=True)
    pd.DataFrame({"lang": ["English"], "id": [1], "year": [1]}).to_parquet(folder / "a.parquet")
    for columns in (None, ["lang", "year"]):
        assert read_table(tmp_path, columns).compute()[["lang", "year"]].to_dict("list") == {
            "lang": ["English"],
            "year": [1],
        }


def test_missing_columns_of_folders_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"id": [1, 2], "lang": ["en", None]}).to_parquet(tmp_path, partition_cols=["lang"])
    with pytest.raises(MissingColumnsError, match=r"\['script'\] not found.*\['id', 'lang'\]"):
        read_table(tmp_path, ["script"])


def test_columns_are_a_list(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"columns must be a list of names, as \['id'\]"):
        read_table(tmp_path, "id")


def test_rows_are_found_by_id(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=10)
    found = find_rows(tmp_path / "a.parquet", ["d31", "d4", "nowhere"], ["text"])
    assert found["text"].to_dict() == {"d4": RECORDS[4]["text"], "d31": RECORDS[31]["text"]}
    assert find_rows(tmp_path / "a.parquet", ["d4"], ["id"])["id"].to_dict() == {"d4": "d4"}


def test_token_follows_the_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", RECORDS)
    token = table_token(tmp_path)
    assert table_token(tmp_path) == token
    write_json(tmp_path / "a.jsonl", RECORDS[:-1])
    assert table_token(tmp_path) != token


# --- Scores ----------------------------------------------------------------------------------------------------------

SCORES = pd.DataFrame({"id": [1, 2], "max_id": [1, 1], "cosine_sim_score": np.array([0, 0.5], np.float32)})


def test_clusters_come_from_the_names_of_the_stages_files(tmp_path: Path) -> None:
    for cluster in ("3", "10"):
        SCORES.to_parquet(tmp_path / f"cluster_{cluster}.parquet")
    assert sorted(read_scores(tmp_path).compute()["centroid"]) == [3, 3, 10, 10]
    SCORES.to_parquet(tmp_path / "cluster_a%2Fb.parquet")
    assert sorted(read_scores(tmp_path, cluster_field="topic").compute()["topic"]) == [
        "10",
        "10",
        "3",
        "3",
        "a/b",
        "a/b",
    ]


def test_clusters_may_be_unknown(tmp_path: Path) -> None:
    SCORES.to_parquet(tmp_path / "part.parquet")
    assert list(read_scores(tmp_path).columns) == ["id", "max_id", "cosine_sim_score"]


def test_files_that_are_no_scores_are_named(tmp_path: Path) -> None:
    SCORES.drop(columns="max_id").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(MissingColumnsError, match=r"max_id.*other\.parquet"):
        read_scores(tmp_path)


def test_tables_of_different_archives_are_different(tmp_path: Path) -> None:
    for name, ids in (("one", [1, 2]), ("two", [3, 4])):
        pd.DataFrame({"id": ids}).to_parquet(tmp_path / "a.parquet")
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.write(tmp_path / "a.parquet", "a.parquet", zipfile.ZIP_STORED)
    one, two = (read_table(f"zip://a.parquet::{tmp_path}/{name}.zip") for name in ("one", "two"))
    assert one._name != two._name
    assert (one["id"].compute().tolist(), two["id"].compute().tolist()) == ([1, 2], [3, 4])


@pytest.mark.parametrize("names", [("2024", "2025"), ("2025", "2024")])
def test_no_column_is_lost_because_the_first_file_lacks_it(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, columns in zip(names, (["id"], ["id", "url"]), strict=True):
        pd.DataFrame({column: [f"{name} {column}"] for column in columns}).to_parquet(tmp_path / f"{name}.parquet")
    read = read_table(tmp_path)
    rows = read.compute().set_index("id")["url"]
    assert rows.dropna().to_dict() == {f"{names[1]} id": f"{names[1]} url"}
    assert len(rows) == len(read_table(tmp_path, columns=["id"]).compute()) == 2


def test_several_paths_are_one_table(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pd.DataFrame({"id": [f"{name}{number}" for number in range(2)]}).to_parquet(tmp_path / f"{name}.parquet")
    table = read_table([tmp_path / "b.parquet", str(tmp_path / "a.parquet")])
    assert table["id"].compute().tolist() == ["a0", "a1", "b0", "b1"]


def test_what_folders_are_named_by_may_be_in_some_files(tmp_path: Path) -> None:
    for language, columns in (("de", {"id": [1]}), ("en", {"id": [2], "lang": ["en"]})):
        (tmp_path / f"lang={language}").mkdir()
        pd.DataFrame(columns).to_parquet(tmp_path / f"lang={language}" / "a.parquet")
    assert read_table(tmp_path).compute()["lang"].isna().tolist() == [True, False]


@pytest.mark.parametrize("column", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pandas_frame_of_any_layout_gives_float32_lists(column: pd.Series) -> None:
    frame = pd.DataFrame({"id": [3, 1, 2, 0], "vectors": column.to_numpy() if column.dtype == object else column.array})
    ddf = from_pandas(frame, 2, embedding_field="vectors")
    assert ddf.npartitions == 2
    assert ddf.dtypes["vectors"] == pd.ArrowDtype(pa.list_(pa.float32()))
    found = ddf.compute()
    np.testing.assert_array_equal(np.stack(found["vectors"].tolist()), ROWS.astype(np.float32))
    assert found["id"].tolist() == [3, 1, 2, 0]
    assert frame["vectors"].dtype == column.dtype  # The frame itself is left alone.


def test_a_pandas_frame_keeps_order_index_and_other_columns() -> None:
    frame = pd.DataFrame(
        {"embeddings": list(ROWS), "tags": [["a"], [], None, ["b", "c"]], "text": list("abcd")}, index=[2, 1, 1, 0]
    )
    ddf = from_pandas(frame)
    found = ddf.compute()
    assert found.index.tolist() == [2, 1, 1, 0]
    assert ddf.dtypes["tags"] == pd.ArrowDtype(pa.list_(pa.string()))
    assert list(found["tags"].iloc[3]) == ["b", "c"]
    assert found["text"].tolist() == list("abcd")
    assert ddf.npartitions == 1
    assert len(from_pandas(frame.iloc[:0])) == 0


@pytest.mark.parametrize(
    "values", [[b"\x89PNG", None], [Decimal("1.10")] * 2, [True, None], [date(2026, 1, 1)] * 2, [1, None], ["a", None]]
)
def test_objects_of_a_pandas_frame_are_written_as_what_they_are(values: list[object], tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [1, 2], "embeddings": [[1.0, 0.0], [0.0, 1.0]], "x": pd.Series(values, dtype=object)})
    kept = from_pandas(frame).semdedup.deduplicate()
    assert kept.compute()["x"].dropna().tolist() == [value for value in values if value is not None]
    kept.semdedup.to_parquet(tmp_path / "kept")
    assert pq.read_table(tmp_path / "kept")["x"].to_pylist() == values


@pytest.mark.parametrize("write", ["to_parquet", "to_clusters"])
def test_an_index_with_a_name_is_written_as_a_column(tmp_path: Path, write: str) -> None:
    names = pd.Index(["b", "a", "c"], name="docno")
    frame = pd.DataFrame({"id": [1, 2, 3], "embeddings": [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], "centroid": 7}, names)
    frames = {"named": frame, "both": frame.assign(docno=[4, 5, 6]), "none": frame.rename_axis(None)}
    for folder, written in frames.items():
        getattr(from_pandas(written, 2).semdedup, write)(tmp_path / folder)
    named, both, none = (pd.read_parquet(tmp_path / folder) for folder in ("named", "both", "none"))
    assert named.index.equals(pd.RangeIndex(3))
    assert named.set_index("docno")["id"].to_dict() == {"b": 1, "a": 2, "c": 3}
    assert both.set_index("docno")["id"].to_dict() == {4: 1, 5: 2, 6: 3}
    assert set(none.columns) == set(frame.columns)


@pytest.mark.parametrize("value", [2**70, Path("a"), UUID(int=1), np.zeros((2, 2)), object()])
def test_objects_that_arrow_does_not_hold_are_refused(value: object) -> None:
    frame = pd.DataFrame({"id": [1], "embeddings": [[1.0]], "x": pd.Series([value], dtype=object)})
    with pytest.raises(InvalidArgumentError, match=r"Column 'x' holds Python objects .*astype\(str\)") as caught:
        from_pandas(frame)
    assert caught.value.columns == ("x",)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        ([1, 2], InvalidArgumentError, "frame must be a pandas DataFrame, not list"),
        (pd.DataFrame({"id": [1]}), MissingColumnsError, r"\['embeddings'\] not found.*as embedding_field"),
        (pd.DataFrame({"embeddings": ["[1]"]}), EmbeddingError, r"frame\['embeddings'\].map\(json.loads\)"),
        (pd.DataFrame({"embeddings": [[1.0], [1.0, 2.0]]}), EmbeddingError, "1 row with width 2"),
        (pd.DataFrame({"embeddings": [[1.0]] * 2}, index=["a", None]), InvalidArgumentError, r"frame.reset_index\(\)"),
        (pd.DataFrame({"embeddings": [[1.0]]}, index=[[1], [2]]), InvalidArgumentError, r"frame.reset_index\(\)"),
    ],
)
def test_pandas_frames_that_hold_no_embeddings(frame: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_pandas(frame)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, [np.nan, 1.0], [1.0], "[1.0, 0.0]"], ids=str)
def test_bad_rows_of_a_shuffled_frame_can_be_dropped_by_the_labels_that_are_named(bad: object) -> None:
    rows: list[object] = [[1.0, float(number)] for number in range(20)]
    rows[7] = bad
    frame = pd.DataFrame({"embeddings": rows}).sample(frac=1, random_state=0)
    with pytest.raises(EmbeddingError, match=r"1 row .*\(index labels 7\)"):
        from_pandas(frame)
    assert len(from_pandas(frame.drop([7]))) == 19


def test_ids_that_are_only_an_index_of_pandas_become_a_column_as_shown(tmp_path: Path) -> None:
    frame = pd.DataFrame({"embeddings": [[1.0, 0.0], [0.0, 1.0]]}, pd.RangeIndex(5, 7, name="doc"))
    path = tmp_path / "a.parquet"
    frame.to_parquet(path)
    with pytest.raises(MissingColumnsError, match="'doc' is no column of the files: pandas has written") as error:
        read_table(path).semdedup.deduplicate(id_field="doc")
    with pytest.raises(MissingColumnsError, match="Name the column of ids as id_field"):
        read_table(path).semdedup.deduplicate(id_field="other")
    line = str(error.value).partition("each file: ")[2].removesuffix(".")
    eval(line, {"pandas": pd, "path": path})
    assert read_table(path).semdedup.deduplicate(id_field="doc")["doc"].compute().tolist() == [5, 6]


def test_paths_of_any_iterable(tmp_path: Path) -> None:
    for name, ids in (("a", [1]), ("b", [2])):
        pd.DataFrame({"id": ids}).to_parquet(tmp_path / f"{name}.parquet")
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for given in (iter(paths), np.array(list(map(str, paths))), dict.fromkeys(paths)):
        assert read_table(given)["id"].compute().tolist() == [1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (pd.DataFrame({"a": [1]}), r"not pandas.DataFrame. Pass a pandas DataFrame to dask_semdedup.from_pandas"),
        ([1, 2], "path must be a path, a URL or a list of them, not a list of int"),
        (b"/tmp", "path must be a path, a URL or a list of them, not bytes"),
        (None, "path must be a path, a URL or a list of them, not NoneType"),
    ],
)
def test_what_is_no_path_is_refused(path: object, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_table(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("read", ["from_pandas", "read_table"])
def test_the_line_that_parses_json_runs_as_shown(tmp_path: Path, read: str) -> None:
    frame = pd.DataFrame({"id": [1, 2, 3], "the vector": ["[1, 0]", "[0, 1]", "[1.0, 0.001]"]})
    frame.to_parquet(tmp_path / "a.parquet")
    ddf = dd.from_pandas(frame, npartitions=2) if read == "from_pandas" else read_table(tmp_path / "a.parquet")
    with pytest.raises(EmbeddingError, match="import json and parse them") as error:
        ddf.semdedup.deduplicate(embedding_field="the vector")
    line = str(error.value).partition("parse them: ")[2].removesuffix(".")
    exec(line, {"json": json, "ddf": ddf})
    assert len(ddf.semdedup.deduplicate(embedding_field="the vector")) == 2


@pytest.mark.parametrize("make", ["from_map", "from_delayed"])
def test_what_is_advised_for_frames_that_functions_make_works(make: str) -> None:
    def frames(dtype: object) -> dd.DataFrame:
        def rows(number: int) -> pd.DataFrame:
            vectors = pd.Series([np.array([1, number], np.float32), np.array([1, 9], np.float32)], dtype=dtype)
            return pd.DataFrame({"id": [2 * number, 2 * number + 1], "embeddings": vectors})

        if make == "from_map":
            return dd.from_map(rows, range(3))
        return dd.from_delayed([dask.delayed(rows)(number) for number in range(3)])

    with pytest.raises(EmbeddingError, match=r"dd\.from_map and dd\.from_delayed") as error:
        frames(object).semdedup.deduplicate()
    (dtype,) = re.findall(r"the dtype (\S+) in your function", str(error.value))
    dtype = eval(dtype, {"pd": pd, "pa": pa})
    assert frames(dtype).semdedup.deduplicate().compute()["id"].tolist() == [0, 2, 4, 5]
    (setting,) = re.findall(r"first call (.*?)\. If", str(error.value))
    with eval(setting, {"dask": dask}):
        assert frames(object).semdedup.deduplicate().compute()["id"].tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("prefix", ["", "the 'dim'_", None], ids=str)
@pytest.mark.parametrize("way", ["pandas", "dask"])
def test_the_line_that_joins_dimensions_runs_as_shown(prefix: str | None, way: str) -> None:
    frame = pd.DataFrame(np.eye(9)[:, 1:], columns=range(1, 9)).assign(id=range(9))
    if prefix is not None:
        frame = frame.rename(columns={number: f"{prefix}{number}" for number in range(1, 9)})
    ddf = dd.from_pandas(frame, npartitions=2)
    use = partial(from_pandas, frame) if way == "pandas" else ddf.semdedup.deduplicate
    with pytest.raises(MissingColumnsError, match=r"1 to .*8 are the dimensions of embeddings") as error:
        use(embedding_field="the vector")
    line = str(error.value).partition("join them: ")[2].removesuffix(".")
    exec(line, {"pd": pd, "pa": pa, "ddf": ddf} if way == "dask" else {"frame": frame})
    ddf = from_pandas(frame, embedding_field="the vector") if way == "pandas" else ddf
    np.testing.assert_array_equal(np.stack(list(ddf.compute()["the vector"])), np.eye(9)[:, 1:])


@pytest.mark.parametrize(("source", "output"), [("", "kept"), ("*", "kept"), ("", ""), ("a.parquet", "a.parquet/x")])
@pytest.mark.parametrize("write", ["to_parquet", "to_clusters"])
def test_nothing_is_written_into_what_is_read(tmp_path: Path, source: str, output: str, write: str) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1, 2], "centroid": [0, 1]}), folder / "a.parquet")
    ddf = read_table(folder / source)
    with pytest.raises(InvalidArgumentError, match=r"overlap. Choose a folder outside the input") as error:
        getattr(ddf[ddf["id"] > 1].semdedup, write)(folder / output, overwrite=True)
    assert error.value.parameters == ("path",)
    for beside in (folder.parent / "kept", folder / "kept"):
        getattr(read_table(folder / "a.parquet").semdedup, write)(beside)


@pytest.mark.parametrize("in_arrow", [False, True])
def test_uint16_in_memory_is_warned_of(in_arrow: bool) -> None:
    rows = np.ones((3, 4), np.float16).view(np.uint16)
    column = pd.Series(list(rows), dtype=pd.ArrowDtype(pa.list_(pa.uint16())) if in_arrow else object)
    with pytest.warns(
        UserWarning, match=r"'embeddings': uint16 values are read as the bits of float16.* int32"
    ) as warned:
        ddf = from_pandas(pd.DataFrame({"id": range(3), "embeddings": column}))
    assert warned[0].filename == __file__
    assert ddf["embeddings"].compute().tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize(
    ("frame", "advice"), [(pa.table({"id": [1]}), r"pyarrow\.Table\. Pass frame\.to_pandas"), ({"id": [1]}, "dict")]
)
def test_frames_of_other_libraries_are_refused(frame: Any, advice: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"must be a pandas DataFrame, not {advice}"):
        from_pandas(frame)
