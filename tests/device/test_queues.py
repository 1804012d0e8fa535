"""Where work runs, and on how many cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster

from dask_semdedup import search
from dask_semdedup.device import devices, queues, sharing
from dask_semdedup.frames.columns import SearchOptions
from dask_semdedup.search import streaming
from dask_semdedup.steps import pairwise
from tests.data import GOLDEN, run


@pytest.mark.parametrize(
    ("rows", "has_cuda", "expected"), [(1000, True, "cpu"), (9000, True, "cuda"), (9000, False, "cpu")]
)
def test_auto_searches_on_a_gpu_where_that_pays(monkeypatch, rows, has_cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert devices.choose_device("auto", "cpu", np.array([0, rows])) == expected
    assert devices.choose_device("cpu", "cuda", np.array([0, rows])) == "cpu"


@pytest.fixture
def watched_searches(monkeypatch):
    """How many searches ran at once at most, and the numbers of threads that torch had in them."""
    seen = {"running": 0, "most": 0, "threads": set()}
    lock = threading.Lock()
    nearest_earlier = search.nearest_earlier

    def watched(*arguments, **options):
        with lock:
            seen["running"] += 1
            seen["most"] = max(seen["most"], seen["running"])
            seen["threads"].add(torch.get_num_threads())
        time.sleep(0.01)
        result = nearest_earlier(*arguments, **options)
        with lock:
            seen["running"] -= 1
        return result

    monkeypatch.setattr(search, "nearest_earlier", watched)
    cores = queues.Cores(2)
    monkeypatch.setattr(queues, "cores", lambda: cores)
    return seen


@pytest.fixture
def two_threads():
    """Torch with two threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows_worth_all", "most", "threads"), [(7, 2, {1}), (6, 1, {2})], ids=["small", "large"])
def test_searches_share_the_cores(monkeypatch, watched_searches, two_threads, rows_worth_all, most, threads):
    """Small clusters are searched side by side with a thread each, large ones in turn with all threads."""
    monkeypatch.setattr(queues, "ROWS_WORTH_ALL_THREADS", rows_worth_all)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, [GOLDEN] * 16))
        left = set(pool.map(lambda _: torch.get_num_threads(), range(16)))
    assert watched_searches == {"running": 0, "most": most, "threads": threads}
    assert left == {2}
    assert torch.get_num_threads() == 2
    assert all(result.equals(results[0]) for result in results)


def test_a_search_in_the_main_thread_has_all_cores(watched_searches, two_threads):
    run(GOLDEN)
    assert watched_searches["threads"] == {2}


def test_one_thread_means_one():
    """Products, sums and copies of a limited thread keep to it: no time is spent in any other."""
    script = """
import time
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
from dask_semdedup.device import queues

def in_one_thread():
    rows = torch.ones(1000, 400)
    with queues.cores_for("cpu", np.array([0, 1000])):
        own, all_threads = time.thread_time(), time.process_time()
        for _ in range(20):
            half = rows.bfloat16()
            half @ half.T, rows @ rows.T, torch.bmm(rows[None], rows.T[None]), rows.mul(2).sum(dim=1)
        return (time.process_time() - all_threads) / (time.thread_time() - own)

with ThreadPoolExecutor(1) as pool:
    assert (ratio := pool.submit(in_one_thread).result()) < 1.2, ratio
assert torch.get_num_threads() == 2
"""
    # Distributed leaves MKL_NUM_THREADS=1 in the environment of a process that has started workers.
    environment = {k: v for k, v in os.environ.items() if k != "MKL_NUM_THREADS"} | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)


def test_a_failed_search_gives_its_cores_back():
    cores = queues.Cores(2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="lost"), cores.take(5):
            raise RuntimeError("lost")
    with cores.take(1), cores.take(1):
        pass


def test_first_come_first_served():
    """A search that wants all cores is not overtaken for ever by those that want one."""
    cores, order = queues.Cores(2), []

    def take(name, threads):
        with cores.take(threads):
            order.append(name)

    with cores.take(1):
        waiting = [threading.Thread(target=take, args=item) for item in [("all", 2), ("one", 1)]]
        for number, thread in enumerate(waiting, start=1):
            thread.start()
            while len(cores._waiting) < number:
                time.sleep(0.001)
        assert order == []
    for thread in waiting:
        thread.join(10)
    assert order == ["all", "one"]


def test_threads_that_come_first_at_once_share_the_cores():
    queues._cores.cache_clear()
    together = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: together.wait() >= 0 and queues.cores(), range(8)))
    assert len(set(map(id, found))) == 1


def test_a_forked_process_has_all_cores():
    script = """
import os
from dask_semdedup.device import queues

with queues.cores().take(10**6):
    child = os.fork()
    if child == 0:
        with queues.cores().take(10**6):
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def most_inside(place):
    """How many of 12 threads were in a place at once."""
    inside, most, lock = 0, 0, threading.Lock()

    def enter(_):
        nonlocal inside, most
        with place():
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(enter, range(24)))
    return most


def test_slots_limit_the_partitions_on_a_gpu(monkeypatch):
    monkeypatch.setattr(queues, "reading_stream", lambda device: nullcontext())
    assert most_inside(lambda: queues.gpu_slot("cuda")) == queues.PARTITIONS_ON_GPU
    assert most_inside(lambda: queues.gpu_slot("cpu")) > queues.PARTITIONS_ON_GPU


def test_the_pool_is_shared_before_torch_first_uses_cuda(monkeypatch):
    shared = []

    def stream(device):
        assert shared, "torch uses CUDA before it shares the pool"
        assert device == "cuda"
        return nullcontext()

    monkeypatch.setattr(queues, "share_memory_pool", lambda: shared.append(True))
    monkeypatch.setattr(queues, "reading_stream", stream)
    with queues.gpu_slot("cuda"):
        pass


def test_searches_take_turns_on_a_gpu_and_not_on_a_cpu():
    assert most_inside(lambda: queues.gpu_turn("cuda")) == 1
    assert most_inside(lambda: queues.gpu_turn("cpu")) > 1


def test_long_searches_take_turns_with_each_other_only():
    works = cycle([0.9 * queues.LONG_SEARCH, queues.LONG_SEARCH])
    assert most_inside(lambda: queues.gpu_turn("cuda", next(works))) == 2
    assert most_inside(lambda: queues.gpu_turn("cuda", queues.LONG_SEARCH)) == 1


@pytest.mark.parametrize(
    ("work", "waits"),
    [(0, [True, False, True]), (queues.LONG_SEARCH, [False, True, True]), (None, [True, True, True])],
    ids=["short", "long", "in host memory"],
)
def test_rows_in_host_memory_have_the_gpu_for_themselves(work, waits):
    def search(other):
        with queues.gpu_turn("cuda", other):
            return True

    for other, has_to_wait in zip((0, queues.LONG_SEARCH, None), waits, strict=True):
        with ThreadPoolExecutor(1) as pool:
            with queues.gpu_turn("cuda", work):
                found = pool.submit(search, other)
                assert bool(wait([found], timeout=0.1 if has_to_wait else 30).not_done) == has_to_wait
            assert found.result(30)


@pytest.mark.parametrize("is_there", [True, False])
def test_only_a_search_of_rows_on_the_gpu_is_long(monkeypatch, is_there):
    work = []
    monkeypatch.setattr(pairwise, "gpu_turn", lambda device, its: work.append(its) or nullcontext())
    monkeypatch.setattr(streaming, "nearest_earlier_from_host", lambda *_, **__: (torch.empty(0),) * 2)
    options = SearchOptions(device="cpu" if is_there else "cuda")
    pairwise.search_segments(torch.ones(6, 5), np.array([0, 4, 6]), None, options)
    assert work == [5 * (16 + 4) / 2 if is_there else None]


@pytest.mark.parametrize(("gpus", "expected"), [(0, 12), (1, 12), (4, 3), (16, 1)])
def test_a_gpu_has_its_share_of_the_cores(monkeypatch, gpus, expected):
    for module in (devices, sharing):
        monkeypatch.setattr(module, "CPU_COUNT", 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices.cores_per_gpu() == expected


@pytest.mark.parametrize(
    ("workers", "gpus", "expected", "at_work"),
    [
        ({}, 1, 12, 1),
        ({"tcp://a:1": 4}, 1, 10, 1),
        ({"tcp://a:1": 14}, 1, 14, 1),
        ({"tcp://a:1": 14}, 8, 14, 1),
        ({"tcp://a:1": 14, "tcp://a:2": 13}, 2, 14, 2),
        ({"tcp://a:1": 14, "tcp://a:2": 13}, 4, 27, 2),
        ({"tcp://a:1": 4, "tcp://a:2": 4, "tcp://a:3": 4}, 1, 30, 1),
        ({"tcp://a:1": 4, "tcp://a:2": 14, "tcp://a:3": 4}, 2, 42, 2),
        ({"tcp://a:1": 4, "tcp://a:2": 4, "tcp://b:1": 4, "tcp://b:2": 14}, 2, 14, 4),
        ({"inproc://a:1": 14, "inproc://a:2": 2}, 1, 16, 1),
        ({"inproc://a:1": 14, "inproc://a:2": 2}, 2, 16, 1),
    ],
    ids=[
        "none yet",
        "few threads",
        "one",
        "one of many GPUs",
        "a GPU each",
        "fewer than GPUs",
        "all on one GPU",
        "more than GPUs",
        "two machines",
        "in one process",
        "in one process beside two GPUs",
    ],
)
def test_workers_say_how_many_gpus_work_and_partitions_are_on_one(monkeypatch, workers, gpus, expected, at_work):
    for module in (devices, sharing):
        monkeypatch.setattr(module, "CPU_COUNT", 12)
    monkeypatch.setattr(sharing, "visible_gpus", lambda: gpus)
    info = {
        "workers": {
            address: {"nthreads": threads, "host": address.split("/")[2].split(":")[0]}
            for address, threads in workers.items()
        }
    }
    client = SimpleNamespace(asynchronous=False, status="running", scheduler_info=lambda n_workers: info)
    assert sharing.partitions_per_gpu(client) == expected
    assert sharing.gpus_at_work(client) == at_work


@pytest.mark.parametrize("state", [{"asynchronous": True, "status": "running"}, {"status": "closed"}], ids=str)
def test_a_client_that_cannot_be_asked_is_not(monkeypatch, state):
    for module in (devices, sharing):
        monkeypatch.setattr(module, "CPU_COUNT", 12)
    assert sharing.partitions_per_gpu(SimpleNamespace(**{"asynchronous": False} | state)) == 12


def test_the_default_client_is_asked(monkeypatch):
    for module in (devices, sharing):
        monkeypatch.setattr(module, "CPU_COUNT", 12)
    assert sharing.partitions_per_gpu() == 12
    with LocalCluster(n_workers=2, threads_per_worker=10, processes=False, dashboard_address=None) as cluster:
        with Client(cluster):
            assert sharing.partitions_per_gpu() == 20
        with Client(cluster, set_as_default=False) as client:
            assert sharing.partitions_per_gpu() == 12
            assert sharing.partitions_per_gpu(client) == 20
    assert sharing.partitions_per_gpu() == 12
