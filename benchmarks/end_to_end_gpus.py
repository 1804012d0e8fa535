"""From files to scores on several GPUs, a worker each: what `end_to_end.py --device cuda --gpus N` runs.

    python benchmarks/end_to_end.py --device cuda --gpus 2 --case large --case skew --json results.json
    python benchmarks/end_to_end.py --device cuda --gpus 2 --case large --scheduler separate
    python benchmarks/end_to_end.py --device cpu --gpus 2 --case all --limit-rows 40 --limit-clusters 24

`--scheduler local` starts a `dask_cuda.LocalCUDACluster`; `separate` starts a `dask scheduler` process and a `dask cuda
worker` process for each GPU. On the CPU the workers are plain ones.

- A case has four times the clusters that it has on one GPU. One worker alone and all of them take turns on the same
  partitions, in the same cluster, and what they wrote is compared: ids, neighbours and scores, bit for bit. The table
  says for how much of the time the workers were busy, and how much earlier than the last one the first had nothing more
  to do. *Fused* is the same with `to_parquet(..., compute=False).optimize()`. Only reading the same files, by one
  worker and by all at once, shows how far the machine itself scales.
- `skew` is an oversized cluster among many small ones, against that cluster alone on the same workers. The total can be
  less neither than that, nor than the time of one worker divided by their number.

Times begin before `read_clusters` and end when all scores are written. By default the cases are `large` and `skew`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from dask.system import CPU_COUNT
from dask.utils import key_split
from distributed import Client, LocalCluster, get_task_stream
from end_to_end_cases import BACKENDS, CASES, SKEW, Case, Log, Options, Skew, limited_to, make_case, make_skew
from end_to_end_cuda import read_only, seconds_of
from rich.table import Table
from timeline import Interval, as_trace, union

import dask_semdedup

TIMES = 4
SPEEDUP_BARS = {2: 1.85, 4: 3.5}
SKEW_BAR = 1.2
# Seconds that workers may take to come, and one run to end.
STARTING, RUNNING = 120, 120


def devices(gpus: int) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return visible.split(",")[:gpus]


@contextmanager
def local_workers(options: Options, folder: Path) -> Iterator[Client]:
    """Workers of a cluster object in this process."""
    threads = {"threads_per_worker": options.threads_per_gpu}
    common: dict[str, Any] = {**threads, "dashboard_address": None, "local_directory": str(folder)}
    if options.device == "cuda":
        from dask_cuda import LocalCUDACluster

        cluster = LocalCUDACluster(CUDA_VISIBLE_DEVICES=devices(options.gpus), **common)
    else:
        cluster = LocalCluster(n_workers=options.gpus, **common)
    with cluster, Client(cluster) as client:
        client.wait_for_workers(options.gpus, timeout=STARTING)
        yield client


@contextmanager
def separate_workers(options: Options, folder: Path) -> Iterator[Client]:
    """A scheduler, and a worker for each GPU, in processes of their own."""
    where = folder / "scheduler.json"
    scheduler = ["scheduler", "--scheduler-file", where, "--host", "127.0.0.1", "--port", 0, "--idle-timeout", "300 s"]
    worker = ["--scheduler-file", where, "--nthreads", options.threads_per_gpu, "--death-timeout", STARTING]
    worker = [*(["cuda"] if options.device == "cuda" else []), "worker", *worker, "--local-directory", folder]
    with ExitStack() as stack:
        processes = [stack.enter_context(dask_process(scheduler, folder / "scheduler.log"))]
        for number, gpu in enumerate(devices(options.gpus)):
            named = [*worker, "--name", f"gpu-{number}"]
            log = folder / f"worker-{number}.log"
            processes.append(stack.enter_context(dask_process(named, log, CUDA_VISIBLE_DEVICES=gpu)))
        wait_for_file(where, processes)
        client = stack.enter_context(Client(scheduler_file=str(where), timeout=STARTING))
        client.wait_for_workers(options.gpus, timeout=STARTING)
        yield client


@contextmanager
def dask_process(arguments: Sequence[object], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of `dask` as long as the body runs, and the end of what it printed should that fail."""
    package, here = Path(dask_semdedup.__file__).parents[1], Path(__file__).parent
    path = [str(package), str(here), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    command = [sys.executable, "-m", "dask", *map(str, arguments), "--no-dashboard"]
    with log.open("wb") as output:
        # In a group of its own, with the processes that it starts itself.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0)
    try:
        yield process
    except BaseException:
        print(f"\n{' '.join(command)}\n{log.read_text(errors='replace')[-2000:]}", flush=True)
        raise
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """End a process and all of its group, by force if need be."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def wait_for_file(path: Path, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until a file is there, as long as the processes run."""
    deadline = time.monotonic() + STARTING
    while not path.exists():
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("A process of the cluster ended before it had begun.")
        if time.monotonic() > deadline:
            raise TimeoutError(f"No scheduler after {STARTING} s.")
        time.sleep(0.05)


class Run(NamedTuple):
    """A folder to score, the workers (None for all), and whether reading, scoring and writing are one task."""

    source: Path
    workers: Sequence[str] | None = None
    is_fused: bool = False


def score(client: Client, run: Run, output: Path, options: Options) -> float:
    """Files to scores in files; the seconds it takes."""
    start = time.perf_counter()
    backend, size = BACKENDS[options.device], options.partition_size
    scores = dask_semdedup.read_clusters(run.source, backend=backend, partition_size=size).semdedup.pairwise()
    written = scores.to_parquet(output, compute=False)
    future = client.compute(written.optimize() if run.is_fused else written, workers=run.workers)
    try:
        future.result(timeout=RUNNING)
    finally:
        future.cancel()
    return time.perf_counter() - start


def in_turns(
    client: Client, runs: Mapping[str, Run], folder: Path, options: Options, log: Log
) -> tuple[dict[str, list[float]], dict[str, dict[str, list[Interval]]]]:
    """Seconds of each run, taking turns, and what each worker did in its last turn; its scores stay in the folder."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tasks = {}
    for turn in range(options.repeats + 1):
        for number, (name, run) in enumerate(runs.items()):
            output = folder / f"{number}-{turn}"
            began = time.time()
            with log.stage(f"{name}, {f'repeat {turn}' if turn else 'warm-up'}"), get_task_stream(client) as stream:
                taken = score(client, run, output, options)
            if turn:
                seconds[name].append(taken)
            if turn < options.repeats:
                shutil.rmtree(output)
            tasks[name] = by_worker(stream.data, began)
    return seconds, tasks


def by_worker(stream: Sequence[Mapping[str, Any]], began: float) -> dict[str, list[Interval]]:
    """The tasks of each worker's threads, from Dask's task stream."""
    done: dict[str, list[Interval]] = {}
    for task in stream:
        name, thread = key_split(task["key"]), str(task["thread"])
        for step in task["startstops"]:
            # The barrier only waits for all partitions to be written.
            if step["action"] == "compute" and name != "toparquetbarrier":
                interval = Interval(name, thread, step["start"] - began, step["stop"] - began)
                done.setdefault(task["worker"], []).append(interval)
    return done


def sorted_scores(folder: Path) -> pa.Table:
    """Scores by cluster and id."""
    table = ds.dataset(folder, format="parquet").to_table()
    return table.sort_by([("centroid", "ascending"), ("id", "ascending")])


def differences(one: Path, other: Path) -> dict[str, int]:
    """How many rows differ in each column; scores are compared bit for bit."""
    left, right = sorted_scores(one), sorted_scores(other)
    if len(left) != len(right):
        return {"rows": abs(len(left) - len(right))}

    def bits(table: pa.Table, name: str) -> np.ndarray:
        column = table[name].to_numpy()
        return column.view(np.int32) if column.dtype == np.float32 else column

    return {name: int((bits(left, name) != bits(right, name)).sum()) for name in left.column_names}


def addresses(client: Client) -> list[str]:
    """The workers."""
    return list(client.scheduler_info(n_workers=-1)["workers"])


def read_on_worker(files: Sequence[str], device: str, setting: tuple[int, int]) -> float:
    """Seconds that a worker takes to only read files."""
    return seconds_of(partial(read_only, files, device, *setting), device)


def only_reading(case: Case, client: Client, layout: Path, options: Options, log: Log) -> dict[str, list[float]]:
    """Seconds of only reading a case's files: by one worker, and by all, of which each reads its share."""
    files = sorted(map(str, layout.glob("*/*.parquet")))
    shares = {
        f"{case.name}: only reading, {who} worker{'s' * (len(workers) > 1)}": [
            (worker, files[number :: len(workers)]) for number, worker in enumerate(workers)
        ]
        for who, workers in (("all", addresses(client)), ("one", addresses(client)[:1]))
    }
    seconds: dict[str, list[float]] = {name: [] for name in shares}
    for turn in range(options.repeats + 1):
        for name, share in shares.items():
            with log.stage(f"{name}, {f'repeat {turn}' if turn else 'warm-up'}"):
                reads = [
                    client.submit(read_on_worker, part, options.device, case.settings[1], workers=[worker], pure=False)
                    for worker, part in share
                ]
                taken = max(client.gather(reads))
            if turn:
                seconds[name].append(taken)
    return seconds


def measure_scaling(name: str, client: Client, options: Options, log: Log) -> dict[str, Any]:
    """Four times a case, by all workers and by one."""
    case = CASES[name]
    case = replace(case, clusters=TIMES * case.clusters).limited(options.limit_clusters, options.limit_rows)
    layout = make_case(case, options.data, log)
    every, one = f"{name}: all workers", f"{name}: one worker"
    first, fused = addresses(client)[:1], (f"{name}: all workers, fused", f"{name}: one worker, fused")
    # What is compared comes first.
    runs = {every: Run(layout), one: Run(layout, first)}
    runs |= {fused[0]: Run(layout, is_fused=True), fused[1]: Run(layout, first, is_fused=True)}
    with tempfile.TemporaryDirectory() as folder:
        seconds, tasks = in_turns(client, runs, Path(folder), options, log)
        seconds |= only_reading(case, client, layout, options, log)
        with log.stage(f"{name}: comparing the scores"):
            outputs = [Path(folder, f"{number}-{options.repeats}") for number in range(2)]
            differing = differences(*outputs)
    medians = {run: statistics.median(times) for run, times in seconds.items()}
    return {
        "case": name,
        "title": str(case),
        "clusters": case.clusters,
        "seconds": seconds,
        "medians": medians,
        "speedup": medians[one] / medians[every],
        "speedup_fused": medians[fused[1]] / medians[fused[0]],
        "bar": SPEEDUP_BARS.get(options.gpus),
        "differing": differing,
        "tasks": tasks[every],
    }


def measure_skew(client: Client, options: Options, log: Log) -> dict[str, Any]:
    """An oversized cluster among small ones, against itself alone."""
    case = Skew().limited(options.limit_clusters, options.limit_rows)
    layout, oversized = make_skew(case, options.data, log)
    workers = addresses(client)
    total, alone, one = "skew: all workers", "skew: the oversized cluster alone", "skew: one worker"
    runs = {total: Run(layout), alone: Run(oversized), one: Run(layout, workers[:1])}
    with tempfile.TemporaryDirectory() as folder:
        for number, worker in enumerate(workers):
            # Any worker may get the oversized cluster later.
            with log.stage(f"skew: the oversized cluster alone, warm-up of worker {number}"):
                score(client, Run(oversized, [worker]), Path(folder, f"warm-{number}"), options)
        seconds, tasks = in_turns(client, runs, Path(folder), options, log)
    medians = {run: statistics.median(times) for run, times in seconds.items()}
    return {
        "case": SKEW,
        "title": str(case),
        "clusters": case.clusters + 1,
        "seconds": seconds,
        "medians": medians,
        "ratio": medians[total] / medians[alone],
        "bar": SKEW_BAR if options.gpus == 4 else None,
        "shared_out": medians[one] / options.gpus,
        "tasks": tasks[total],
    }


def spread(tasks: Mapping[str, Sequence[Interval]]) -> tuple[list[float], float]:
    """Seconds that each worker was busy, and by how many the first to end was before the last."""
    ends = [max(interval.end for interval in done) for done in tasks.values()]
    return [union(done) for done in tasks.values()], max(ends, default=0.0) - min(ends, default=0.0)


def as_table(results: Sequence[Mapping[str, Any]], options: Options) -> Table:
    """All cases, a few lines each."""
    table = Table(title=f"seconds, medians of {options.repeats}; {options.gpus} workers", title_justify="left")
    for column in ("case", "run"):
        table.add_column(column)
    for column in ("s", "min", "max", "ms a cluster"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_section()
        title = result["title"]
        for run, median in result["medians"].items():
            times = result["seconds"][run]
            numbers = [f"{value:.3f}" for value in (median, min(times), max(times))]
            each = "" if run.endswith("alone") else f"{1e3 * median / result['clusters']:.3f}"
            table.add_row(title, run, *numbers, each)
            title = ""
    return table


def verdict(result: Mapping[str, Any]) -> str:
    """The results of a case in two lines."""
    bar = f" (bar {result['bar']})" if result["bar"] else ""
    busy, early = spread(result["tasks"])
    seconds = ", ".join(f"{value:.2f}" for value in busy)
    if result["case"] == SKEW:
        least = f"the work of one worker shared out to all: {result['shared_out']:.2f} s"
        words = f"{result['ratio']:.2f} times the oversized cluster alone{bar}; {least}"
    else:
        wrong = {name: count for name, count in result["differing"].items() if count}
        same = f"differ in so many rows: {wrong}" if wrong else "are the same"
        fused = f"{result['speedup_fused']:.2f} with both fused"
        words = f"{result['speedup']:.2f} times as fast as one worker{bar}, {fused}; scores {same}"
    return f"{result['case']}: {words}\n  workers busy {seconds} s; the first was done {early:.2f} s before the last"


def save(title: str, results: Sequence[Mapping[str, Any]], options: Options) -> None:
    """Write the results so far."""
    if options.json_path:
        options.json_path.write_text(json.dumps({"machine": title, "cases": results}, indent=1))
    if options.trace:
        runs = {f"{result['case']}: {worker}": done for result in results for worker, done in result["tasks"].items()}
        options.trace.write_text(json.dumps(as_trace(runs)))


def describe(options: Options) -> str:
    """The machine and the versions. Called once the workers run, as it may use the first GPU."""
    cores = f"{CPU_COUNT} cores, {options.threads_per_gpu} threads a worker, {options.scheduler} scheduler"
    if options.device == "cpu":
        return f"{options.gpus} workers on a CPU, {cores}"
    import cudf
    import torch

    name = f"{options.gpus} x {torch.cuda.get_device_name()}"
    return f"{name}, {cores}, torch {torch.__version__}, cuDF {cudf.__version__}"


def run(options: Options, show: Callable[[Any], None]) -> int:
    """Run the cases and print them; the number of those that failed."""
    # So that workers that are asked to end do, however this process is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = options.names([*CASES, SKEW]) if options.cases else ["large", SKEW]
    log, results, failed = Log(), [], 0
    with (
        limited_to(options.time_limit),
        # Workers that are ending may still write to it.
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        with log.stage(f"starting {options.gpus} workers, {options.scheduler}"):
            start = {"local": local_workers, "separate": separate_workers}[options.scheduler]
            workers: AbstractContextManager[Client] = start(options, Path(folder))
            client = stack.enter_context(workers)
        with log.stage("importing here"):
            title = describe(options)
        log.say(title)
        for name in names:
            try:
                measure = measure_skew if name == SKEW else partial(measure_scaling, name)
                results.append(measure(client, options, log))
            except Exception:
                traceback.print_exc()
                failed += 1
            save(title, results, options)
        show(title)
        show(as_table(results, options))
        for result in results:
            show(verdict(result))
        log.say("ending the workers")
    return failed
