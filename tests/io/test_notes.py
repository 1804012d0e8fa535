"""Notes are read back, and other programs find no rows in those next to tables."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_semdedup.errors import OutputError
from dask_semdedup.io.notes import NOTE_KEY, read_note, write_note

NOTE = {"step": "scores", "counts": {"rows": 2**40}, "words": "ä → b"}
LOCAL = fsspec.filesystem("file")


@pytest.mark.parametrize("name", ["_note.json", "_note.parquet"])
def test_a_note_is_read_back(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "part.0.parquet")
    write_note(LOCAL, str(tmp_path / name), NOTE)
    assert read_note(LOCAL, str(tmp_path / name)) == NOTE


def test_next_to_tables_it_is_one_of_them_without_rows(tmp_path: Path) -> None:
    schema = pa.schema({"id": pa.int32(), "x": pa.large_list(pa.float16()), "day": pa.date32()}, {"features": "none"})
    pq.write_table(schema.empty_table(), tmp_path / "part.0.parquet")
    # Neither another note nor what is no table tells the schema.
    pq.write_table(pa.table({"other": [1]}), tmp_path / "_other.parquet")
    (tmp_path / "a.txt").write_text("text")
    write_note(LOCAL, str(tmp_path / "_note.parquet"), NOTE)
    metadata = pq.read_metadata(tmp_path / "_note.parquet")
    assert (metadata.num_rows, metadata.num_row_groups) == (0, 0)
    found = pq.read_schema(tmp_path / "_note.parquet")
    assert found.remove_metadata() == schema.remove_metadata()
    assert found.metadata.keys() == {b"features", NOTE_KEY}


def test_a_note_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Cannot write .*/missing/_note.json"):
        write_note(LOCAL, str(tmp_path / "missing" / "_note.json"), NOTE)
