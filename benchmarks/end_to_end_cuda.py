"""From files to scores on one GPU, or several: what `end_to_end.py --device cuda` runs.

    python benchmarks/end_to_end.py --device cuda --breakdown --json results.json --trace trace.json
    python benchmarks/end_to_end.py --device cuda --case large --limit-clusters 6 --repeats 1
    python benchmarks/end_to_end.py --device cuda --gpus 2                              # see end_to_end_gpus.py
    python benchmarks/end_to_end.py --device cpu --case small --limit-clusters 100      # the same code without a GPU

All methods take turns in one process, from a warm page cache; the table gives medians in milliseconds a cluster:

- only reading the same files, with pylibcudf (on a CPU: pyarrow), many files in a call and several calls at once: of a
  few settings the one that was fastest while warming up;
- ours: `read_clusters`, `pairwise`, `to_parquet`, by Dask's threads, with the defaults;
- one cluster at a time, as the reference system's stage does it, in the same library's functions: read, score, write.

`--breakdown` says where the time of a run goes, twice. As it really runs, with all threads and nothing waited for: the
time that threads spend in each part together, and the time in which at least one of them is in it. A thread that waits
for the GPU, or for another to read, is in its part; idle is the time in which no thread is in any part. And in one
thread that waits for the GPU before and after each part, which gives the work of each. `--trace` writes the first of
these as a timeline for https://ui.perfetto.dev. The peak of device memory is what RMM handed out in one more run.

Each stage is announced before it begins, with the seconds since the start. One that hangs prints the stacks of all
threads; the run gives up after `--time-limit`, and what was measured by then is in the file of `--json`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dask
import pyarrow.dataset as ds
from dask.system import CPU_COUNT
from end_to_end_cases import BACKENDS, CASES, Case, Log, Options, limited_to, make_case
from rich.table import Table
from timeline import Timeline, as_trace, recorded

import dask_semdedup
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.io.cudf_reader import import_cudf
from dask_semdedup.stages import FileGroupTask, PairwiseCosineSimilarityStage
from dask_semdedup.steps.ranking import make_strategy

ONE_BY_ONE = 20
# A method that has taken so many seconds gets no further turn.
LONGEST = 30
READING, OURS = "only reading", "ours, files to scores"
# The functions that do the parts. "In cuDF" is within "read", which also waits for its turn.
PARTS = {
    "plan": "dask_semdedup:read_clusters",
    "read": "dask_semdedup.io.reader:Reader.read",
    "rank": "dask_semdedup.steps.ranking:RankingStrategy.order",
    "gather": "dask_semdedup.steps.pairwise:to_tensor",
    "search": "dask_semdedup.steps.pairwise:search_segments",
    "assemble": "dask_semdedup.steps.pairwise:score_frame",
}
PARTS_OF = {
    "cpu": {
        **PARTS,
        "read": "dask_semdedup.io.reader:read_fragment",
        "write": "dask.dataframe.io.parquet.arrow:ArrowDatasetEngine.write_partition",
    },
    "cuda": {
        **PARTS,
        "in cuDF": "dask_semdedup.io.cudf_reader:_read_with_libcudf",
        "write": "dask_cudf.io.parquet:CudfEngine.write_partition",
    },
}


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def read_only(files: Sequence[str], device: str, files_a_call: int, calls: int) -> None:
    """Read all files, some in each call and several calls at once."""
    read = {"cpu": _read_with_arrow, "cuda": _read_with_pylibcudf}[device]
    step = max(1, min(files_a_call, math.ceil(len(files) / calls)))
    with ThreadPoolExecutor(calls) as pool:
        list(pool.map(read, [files[start : start + step] for start in range(0, len(files), step)]))


def _read_with_arrow(files: Sequence[str]) -> None:
    ds.dataset(files, format="parquet").to_table()


def _read_with_pylibcudf(files: Sequence[str]) -> None:
    import pylibcudf as plc

    options = plc.io.parquet.ParquetReaderOptions.builder(plc.io.SourceInfo(list(files))).build()
    plc.io.parquet.read_parquet(options)


def ours(layout: Path, device: str, partition_size: str | None, workers: int | None = None) -> None:
    """Files to scores in files, by Dask's threads."""
    settings: dict[str, Any] = {"scheduler": "threads", **({} if workers is None else {"num_workers": workers})}
    with tempfile.TemporaryDirectory() as output, dask.config.set(settings):
        ddf = dask_semdedup.read_clusters(layout, backend=BACKENDS[device], partition_size=partition_size)
        ddf.semdedup.pairwise().to_parquet(output)


def one_by_one(files: Sequence[str], device: str) -> None:
    """The clusters of a file each, one at a time."""
    with tempfile.TemporaryDirectory() as output, dask.config.set({"dataframe.backend": BACKENDS[device]}):
        stage = PairwiseCosineSimilarityStage("id", "embeddings", output, make_strategy("hard"))
        for number, file in enumerate(files):
            metadata = {"centroid_id": number, "filetype": "parquet"}
            stage.process(FileGroupTask("benchmark", [file], _metadata=metadata))


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    finish(device)
    start = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - start


def choose_setting(case: Case, files: Sequence[str], device: str, log: Log) -> tuple[tuple[int, int], dict[str, float]]:
    """The fastest setting of only reading, of those that the limit of open files allows, and seconds of each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A file takes two descriptors while it is read.
    possible = [(each, calls) for each, calls in case.settings if 2 * min(each * calls, len(files)) < 0.8 * soft]
    with log.stage(f"{case.name}: first read of a few files"):
        read_only(files[: 2 * case.distinct], device, 1, 1)
    seconds = {}
    for each, calls in possible or [(64, 1)]:
        with log.stage(f"{case.name}: reading {each} files a call, {calls} calls at once"):
            seconds[each, calls] = seconds_of(partial(read_only, files, device, each, calls), device)
    best = min(seconds, key=seconds.__getitem__)
    return best, {f"{each} files a call, {calls} at once": taken for (each, calls), taken in seconds.items()}


def in_turns(
    case: Case, methods: Mapping[str, Callable[[], object]], device: str, repeats: int, log: Log
) -> dict[str, list[float]]:
    """Seconds of each method's runs, the methods taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name, method in methods.items():
            if sum(seconds[name]) > LONGEST:
                continue
            with log.stage(f"{case.name}: {name}, {f'repeat {turn}' if turn else 'warm-up'}"):
                taken = seconds_of(method, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def timelines(case: Case, layout: Path, options: Options, log: Log) -> dict[str, Timeline]:
    """A run as it really is, and one in a single thread that waits for the device around each part."""
    device, size = options.device, options.partition_size
    with log.stage(f"{case.name}: timeline of one run"), recorded(PARTS_OF[device]) as real:
        ours(layout, device, size)
        finish(device)
    with (
        log.stage(f"{case.name}: one thread, part by part"),
        recorded(PARTS_OF[device], partial(finish, device)) as single,
    ):
        ours(layout, device, size, workers=1)
        finish(device)
    if real.missing:
        log.say(f"not found, so not measured: {', '.join(real.missing)}")
    return {"timeline": real, "one_thread": single}


def memory(case: Case, layout: Path, options: Options, log: Log) -> dict[str, int]:
    """Peak of the device memory that RMM handed out in a run."""
    import rmm.statistics

    with log.stage(f"{case.name}: memory of one run"), rmm.statistics.statistics():
        ours(layout, options.device, options.partition_size)
        return {"peak_bytes": int(rmm.statistics.get_statistics().peak_bytes)}


def measure(case: Case, layout: Path, options: Options, log: Log) -> dict[str, Any]:
    """Time all methods on one case."""
    device = options.device
    files = sorted(map(str, layout.glob("*/*.parquet")))
    few = files[:ONE_BY_ONE]
    setting, tried = choose_setting(case, files, device, log)
    loop = f"one cluster at a time ({len(few)} of them)"
    methods = {
        READING: partial(read_only, files, device, *setting),
        OURS: partial(ours, layout, device, options.partition_size),
        loop: partial(one_by_one, few, device),
    }
    counts = {READING: len(files), OURS: len(files), loop: len(few)}
    seconds = in_turns(case, methods, device, options.repeats, log)
    milliseconds = {name: 1e3 * statistics.median(times) / counts[name] for name, times in seconds.items()}
    return {
        "reading": tried,
        "setting": setting,
        "seconds": seconds,
        "milliseconds": milliseconds,
        "ratios": {name: value / milliseconds[READING] for name, value in milliseconds.items()},
    }


def as_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """All cases, a few lines each."""
    table = Table(title="milliseconds a cluster, medians", title_justify="left")
    for column in ("case", "method"):
        table.add_column(column)
    for column in ("ms", "min", "max", "times reading", "bar"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_section()
        title = result["title"]
        for name, value in result.get("milliseconds", {}).items():
            times = result["seconds"][name]
            scale = value / statistics.median(times)
            bar = f"{result['bar']:g}" if name == OURS and result["bar"] else ""
            label = f"{name}, {result['setting'][0]} x {result['setting'][1]}" if name == READING else name
            numbers = [f"{number:.3f}" for number in (value, scale * min(times), scale * max(times))]
            table.add_row(title, label, *numbers, f"{result['ratios'][name]:.2f}", bar)
            title = ""
        if "peak_bytes" in result:
            table.add_row("", f"peak device memory of ours {result['peak_bytes'] / 1e9:.2f} GB", "", "", "", "", "")
    return table


def as_breakdown_table(result: Mapping[str, Any]) -> Table:
    """Milliseconds a cluster of each part of a run."""
    real, single, scale = result["timeline"], result["one_thread"], 1e3 / result["clusters"]
    table = Table(title=f"{result['title']}: one run, milliseconds a cluster", title_justify="left")
    table.add_column("part")
    for column in ("calls", "all threads", "at least one thread", "of the time", "one thread, waiting for the device"):
        table.add_column(column, justify="right")
    for part, alone in zip(real.summary(), single.summary(), strict=True):
        numbers = [f"{scale * part.total:.3f}", f"{scale * part.union:.3f}", f"{part.union / real.seconds:.0%}"]
        table.add_row(part.name, str(part.calls), *numbers, f"{scale * alone.total:.3f}")
    table.add_section()
    idle = [f"{scale * real.idle:.3f}", f"{real.idle / real.seconds:.0%}", f"{scale * single.idle:.3f}"]
    table.add_row("idle, in no part", "", "", *idle)
    table.add_row("the whole run", "", "", f"{scale * real.seconds:.3f}", "", f"{scale * single.seconds:.3f}")
    return table


def machine(device: str) -> str:
    """The machine and the versions. Installs the pool first: torch can share it only before it uses CUDA."""
    import torch

    if device == "cpu":
        return f"CPU, {CPU_COUNT} cores, torch {torch.__version__}"
    cudf, shared = import_cudf(), share_memory_pool()
    versions = f"torch {torch.__version__}, cuDF {cudf.__version__}, KvikIO threads {os.environ['KVIKIO_NTHREADS']}"
    return f"{torch.cuda.get_device_name()}, {CPU_COUNT} cores, {versions}, one memory pool: {shared}"


def save(title: str, results: Sequence[Mapping[str, Any]], options: Options) -> None:
    """Write the results so far."""
    if options.json_path:
        everything = {"machine": title, "cases": results}
        options.json_path.write_text(json.dumps(everything, indent=1, default=Timeline.as_json))
    if options.trace:
        runs = {
            f"{result['case']}: {result['title']}": result["timeline"].intervals
            for result in results
            if "timeline" in result
        }
        options.trace.write_text(json.dumps(as_trace(runs)))


def run(options: Options, show: Callable[[Any], None]) -> int:
    """Run the cases and print them; the number of those that failed."""
    log = Log()
    results: list[dict[str, Any]] = []
    failed = 0
    steps = [measure, *([timelines] if options.breakdown else []), *([memory] if options.device == "cuda" else [])]
    with limited_to(options.time_limit):
        with log.stage("importing and starting"):
            title = machine(options.device)
        log.say(title)
        for name in options.names(CASES):
            case = CASES[name].limited(options.limit_clusters, options.limit_rows)
            results.append({"case": name, "title": str(case), "clusters": case.clusters, "bar": case.bar})
            try:
                layout = make_case(case, options.data, log)
                for step in steps:
                    results[-1].update(step(case, layout, options, log))
                    save(title, results, options)
            except Exception:
                traceback.print_exc()
                failed += 1
    show(title)
    for result in results:
        if "timeline" in result:
            show(as_breakdown_table(result))
    show(as_table(results))
    return failed
