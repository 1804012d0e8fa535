"""Damaged and hostile inputs, seeded: what is read must be what Arrow or Python's json reads, or a clear error.

``python -m tests.fuzz --seconds 600 --seed 1`` prints what went wrong and how to repeat it. Each input is read in a
child process with little memory and little time, so that an abort, a hang and a request for much memory are noticed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_semdedup import read_clusters
from dask_semdedup.errors import SemDedupError
from dask_semdedup.io import thrift
from dask_semdedup.lazy.tables import read_table

# Inputs of one child, and seconds for one input.
BATCH = 250
PATIENCE = 20

# Bytes that a child may use, and may map, beyond what it began with. Arrow maps up to 16 GiB where a page says so, and
# uses none of it.
MOST_USED = 5 << 28
MOST_MAPPED = 40 << 30

# What libraries say that were refused memory.
NO_MEMORY = re.compile(r"alloc|out of memory", re.I)

# Numbers that are put where a file has others.
NUMBERS = (0, 1, 2, 3, 5, 15, 127, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**41, 2**63, 2**64 - 1)

# What compressed files begin with.
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

LINES = [
    {"id": "a/../b", "text": "<b>ä</b>\u2028", "embeddings": [0.5, -1], "n": 1, "of": {"x": [1], "y": "z"}},
    {"id": "b", "text": "", "embeddings": [1e-3, 2.5], "n": None, "of": None},
    {"id": "c", "text": "\x00\\", "embeddings": [], "n": 2**63 - 1, "of": {"x": [], "y": None}},
]

TABLE = pa.table(
    {
        "id": pa.array([7, 8, 9, 10, 11, 12, 13, 14]),
        "embeddings": pa.array([[1, 2], [0.5, 3], [], None, [7, 8], [9, 1], [2, 2], [1, None]], pa.list_(pa.float32())),
        "text": ["<script>", None, "../x", "é" * 40, "", "a", "b", "a"],
        "n": pa.array([1, None, 3, 4, 5, 6, 7, 8], pa.int32()),
        "kind": pa.array(["u", "v", "u", None, "u", "v", "v", "u"]).dictionary_encode(),
        "of": pa.array([{"x": [1, 2], "y": "s"}, None, {"x": None, "y": ""}, {"x": [], "y": None}] * 2),
        "deep": pa.array([[["a"], []], None, [], [None], [[]], [["b", None]], [["c"]], [["d"]]]),
        "fixed": pa.array([[1, 2]] * 8, pa.list_(pa.float32(), 2)),
    }
)

NUMBERED = TABLE.append_column("centroid", pa.array([0, 0, 0, 1, 1, 2, 2, 2]))


class Case(NamedTuple):
    """A file, and the function that reads it."""

    name: str
    data: bytes
    read: str


def parquet(table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, file := io.BytesIO(), **options)
    return file.getvalue()


def seeds() -> list[Case]:
    """Return sound files of each kind."""
    lines = "".join(json.dumps(row) + "\n" for row in LINES * 3).encode()
    constant = TABLE.take([0] * 500)
    return [
        Case("a.parquet", parquet(TABLE, row_group_size=3), "table"),
        Case(
            "a.parquet", parquet(TABLE, write_page_checksum=True, data_page_version="2.0", compression="zstd"), "table"
        ),
        Case("a.parquet", parquet(TABLE, compression="gzip", write_page_index=True, use_dictionary=False), "table"),
        Case("a.parquet", parquet(constant, write_page_checksum=True, data_page_size=64), "table"),
        Case("a.parquet", parquet(NUMBERED, row_group_size=3, compression="none"), "clusters"),
        Case("centroid=3/a.parquet", parquet(TABLE, store_schema=False), "clusters"),
        Case("centroid=3/a.parquet", parquet(constant, write_page_checksum=True), "clusters"),
        Case("a.jsonl", lines, "table"),
        Case("a.jsonl.gz", gzip.compress(lines, mtime=0), "table"),
        Case("a.jsonl.zst", pa.compress(lines, "zstd", asbytes=True), "table"),
    ]


def mutate(rng: random.Random, case: Case) -> Case:
    """Return a case with one or a few kinds of damage. Those that need a sound file come first."""
    anywhere = [flip, flip, cut, repeat, zero]
    inside = [lie, lie, lie_in_page] if case.name.endswith("parquet") else [spell]
    data = case.data
    for kind in [rng.choice(anywhere + inside * 2), *rng.choices(anywhere, k=rng.choice([0, 0, 0, 1, 2]))]:
        if data:
            data = kind(rng, data)
    return case._replace(data=data)


def flip(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    # Half of them in the last quarter, where the footer ends.
    start = rng.choice([0, 3 * len(data) // 4])
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(start, len(data))
        damaged[place] = rng.choice([damaged[place] ^ 1 << rng.randrange(8), rng.randrange(256)])
    return bytes(damaged)


def cut(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[rng.choice([len(data), start + rng.randrange(1, 50), rng.randrange(start, len(data))]) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop, place = start + rng.randrange(1, 200), rng.randrange(len(data))
    return data[:place] + data[start:stop] * rng.choice([1, 1, 2, 1000]) + data[place:]


def zero(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randrange(1, 64))
    return data[:start] + rng.choice([b"\0", b"\xff"]) * (stop - start) + data[stop:]


class Noting(thrift._One):
    """Notes where the integers and the lengths of a struct are, and what they are."""

    struct = thrift._Thrift.struct

    def __init__(self, data: bytes) -> None:
        super().__init__(data + bytes(thrift.TRAILER))
        self.places: list[tuple[int, int, int]] = []

    def unsigned(self) -> int:
        start, value = self.at, super().unsigned()
        self.places.append((start, self.at, value))
        return value


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def with_other_number(rng: random.Random, struct: bytes) -> bytes:
    """Return a struct in which an integer or a length is another. Integers are written twice as large, to be signed."""
    noting = Noting(struct)
    noting.struct({})
    start, stop, value = rng.choice(noting.places)
    near = [max(0, value + step) for step in (-2, -1, 1, 2)]
    other = rng.choice([2 * value, 1000 * value, rng.choice(near), rng.choice(NUMBERS), 2 * rng.choice(NUMBERS)])
    return struct[:start] + varint(other % 2**64) + struct[stop:]


def lie(rng: random.Random, data: bytes) -> bytes:
    """Put another number into the footer: a count, a size, an offset, a length."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    body = with_other_number(rng, data[start:-8])
    return data[:start] + body + len(body).to_bytes(4, "little") + b"PAR1"


def lie_in_page(rng: random.Random, data: bytes) -> bytes:
    """Put another number into the header of the last page of a file, or of another one, at the expense of its data."""
    metadata = pq.read_metadata(io.BytesIO(data))
    group = metadata.row_group(rng.randrange(metadata.num_row_groups))
    chunk = group.column(rng.randrange(group.num_columns))
    places = [place for place in (chunk.data_page_offset, chunk.dictionary_page_offset) if place]
    start = rng.choice(places)
    noting = Noting(data[start:])
    noting.struct({})
    header = with_other_number(rng, data[start : start + noting.at])
    grown = len(header) - noting.at
    end = start + noting.at
    # Offsets stay: the data after the header gives way where it grows.
    return data[:start] + header + (data[end + grown :] if grown >= 0 else bytes(-grown) + data[end:])


def unpacked(data: bytes) -> bytes:
    """Return lines without their compression."""
    if data.startswith(GZIP):
        return gzip.decompress(data)
    return pa.CompressedInputStream(pa.BufferReader(data), "zstd").read() if data.startswith(ZSTD) else data


SPELLINGS = [
    *("null", "1e999", "-0", "NaN", "Infinity", "9" * 400, "1" + "0" * 30, "0.1234567890123456789", '"\\ud800"', "{}"),
    *("[" * 3000, "[" * 150 + "]" * 150, "[" * 990 + "]" * 990, '{"a":[' * 480 + "]}" * 480, "[[[]]]", "[]", '"x"'),
    *("[" * 10**5 + "]" * 10**5, '{"a":' * 2000, "[" + "1," * 20000 + "1]", "true", "1", "0.1", "\\u0000"),
    *("\n", "\r", "\n\n", "\0", "\ufeff", "\u2028", ' "id": 3,', '"new": 1,', '{"id": null}', "{", "}", '"', ",", ":"),
]


def spell(rng: random.Random, data: bytes) -> bytes:
    """Put something that JSON may hold, or may not, into a file."""
    text = unpacked(data)
    values = list(re.finditer(rb"[^][{},: \n]+", text))
    place = rng.choice(values)
    start = rng.choice([place.start(), place.start(), rng.randrange(len(text))])
    stop = place.end() if start == place.start() else start
    text = text[:start] + rng.choice(SPELLINGS).encode("utf-8", "surrogatepass") + text[stop:]
    if data.startswith(GZIP):
        return gzip.compress(text, mtime=0)
    return pa.compress(text, "zstd", asbytes=True) if data.startswith(ZSTD) else text


def read_ours(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a file as this package reads them."""
    read = read_clusters if case.read == "clusters" else read_table
    frame = read(folder, backend="pandas").compute(scheduler="sync")
    return rows_of(pa.Table.from_pandas(frame, preserve_index=False))


def read_theirs(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a file as Arrow or Python's json reads them."""
    if case.name.endswith("parquet"):
        file = pq.ParquetFile(folder / case.name, page_checksum_verification=True)
        # Of a damaged file Arrow may read a row group otherwise than with the ones before it.
        groups = [range(file.num_row_groups)] if case.read == "clusters" else [[n] for n in range(file.num_row_groups)]
        table = pa.concat_tables([file.read_row_groups(group, use_threads=False) for group in groups])
        return rows_of(table.append_column("centroid", pa.array([3] * len(table))) if "=" in case.name else table)
    text = unpacked(case.data).removeprefix(b"\xef\xbb\xbf")
    return [json.loads(line) for line in text.split(b"\n") if line.strip()]


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows with text as bytes, since it may be no UTF-8."""
    columns = [column.cast(of_bytes(column.type)).to_pylist() for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def of_bytes(type_: pa.DataType) -> pa.DataType:
    """Return a type with bytes for text and its dictionaries, at any depth."""
    if pa.types.is_dictionary(type_):
        return of_bytes(type_.value_type)
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(of_bytes(field.type)) for field in type_])
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(of_bytes(type_.value_type), type_.list_size)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.large_list(of_bytes(type_.value_type))
    return pa.large_binary() if pa.types.is_string(type_) or pa.types.is_large_string(type_) else type_


def are_alike(ours: Any, theirs: Any) -> bool:
    """Return whether values are equal. JSON may lack a null, and its numbers may be float32 or text."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(are_alike(ours.get(name), theirs.get(name)) for name in {*ours, *theirs})
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(are_alike, ours, theirs))
    if isinstance(theirs, str):
        ours = ours.decode() if isinstance(ours, bytes) else ours
    if isinstance(theirs, float | int) and isinstance(ours, bytes | str):
        ours = json.loads(ours)
    if isinstance(theirs, float) or isinstance(ours, float):
        with np.errstate(over="ignore"):
            return ours == theirs or ours == np.float32(str(theirs)) or (ours != ours and theirs != theirs)
    return type(ours) is type(theirs) and ours == theirs


def attempt(case: Case, say: Callable[[str], None]) -> str:
    """Return what becomes of a case: "same", "refused", or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / case.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(case.data)
        try:
            ours = read_ours(case, folder)
        except SemDedupError as error:
            if NO_MEMORY.search(str(error)):
                return f"memory: {error}"
            return "refused" if path.name in str(error) else f"does not name the file: {error!r}"
        except MemoryError as error:
            return f"memory: {error!r}"
        except Exception:
            return f"error: {traceback.format_exc()}"
        say("theirs")
        try:
            theirs = read_theirs(case, folder)
        except Exception as error:
            return f"only ours: {error!r}"
        if len(ours) != len(theirs):
            return f"rows: {len(ours)}, not {len(theirs)}"
        if "centroid" in (ours[0] if ours else {}):
            ours, theirs = (sorted(rows, key=repr) for rows in (ours, theirs))
        wrong = [pair for pair in zip(ours, theirs, strict=True) if not are_alike(*pair)]
        return f"differs: {wrong[0]}" if wrong else "same"


def case_of(seed: int, number: int, sound: list[Case]) -> Case:
    """Return the case of a number: the same for the same seed."""
    rng = random.Random(f"{seed}:{number}")
    return mutate(rng, rng.choice(sound))


def _work(pipe: Connection, seed: int, numbers: range, sound: list[Case]) -> None:
    """Say what becomes of each case."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_MAPPED
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    most = peak() + MOST_USED
    for number in numbers:
        pipe.send((number, "begun"))
        outcome = attempt(case_of(seed, number, sound), lambda stage, n=number: pipe.send((n, stage)))
        pipe.send((number, outcome if peak() < most else f"memory: {peak()} bytes"))


def peak() -> int:
    """Return the most bytes that this process has used."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def results(seed: int, numbers: range) -> Iterator[tuple[int, str]]:
    """Yield what becomes of each case. A child that dies or hangs is followed by another one, at the next case."""
    sound = seeds()
    context = multiprocessing.get_context("fork")
    while numbers:
        pipe, other = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(other, seed, numbers[:BATCH], sound))
        child.start()
        other.close()
        number, state, is_hung = numbers[0] - 1, "", False
        try:
            while not (is_hung := not pipe.poll(PATIENCE)):
                number, state = pipe.recv()
                if state not in ("begun", "theirs"):
                    yield number, state
        except EOFError:
            pass
        finally:
            child.kill()
            child.join()
        if state == "theirs":
            yield number, "Arrow ends the process"
        elif state == "begun":
            yield number, "hang" if is_hung else f"abort: exit code {child.exitcode}"
        numbers = numbers[number - numbers[0] + 1 :]


GOOD = ("same", "refused")


def fuzz(seed: int, seconds: float, first: int = 0) -> tuple[Counter[str], dict[int, str]]:
    """Return how often each outcome was, and what went wrong by the case's number."""
    end = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    found = results(seed, range(first, 10**9))
    for number, outcome in found:
        counts[outcome.split(":")[0]] += 1
        if outcome not in GOOD:
            wrong[number] = outcome
        if time.monotonic() > end:
            break
    found.close()
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="one case, in this process, whose file is kept")
    options = parser.parse_args()
    if options.number is not None:
        case = case_of(options.seed, options.number, seeds())
        path = Path(tempfile.mkdtemp()) / case.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(case.data)
        print(path, len(case.data), case.read, flush=True)
        print(attempt(case, print))
        return
    counts, wrong = fuzz(options.seed, options.seconds)
    for number, outcome in wrong.items():
        print(f"--seed {options.seed} --number {number}: {outcome}")
    print(f"{sum(counts.values())} inputs: {dict(counts)}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
