"""Results that are needed now, and tasks that write files: after one has failed, none of them writes any more."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import dask
import dask.dataframe as dd
import pandas as pd
from dask import threaded
from dask.base import get_scheduler
from dask.core import flatten
from dask.system import CPU_COUNT
from dask.typing import Key

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.lazy.workers import is_connected, watched

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["compute", "compute_to_the_end", "results_of", "submit"]


def compute(*collections: Any) -> tuple[Any, ...]:
    """Return the results of collections, computed on Dask's default scheduler.

    Raises
    ------
    InvalidArgumentError
        If the scheduler is that of an asynchronous client, which cannot be waited for.
    """
    client = _client_of(_scheduler_of(collections))
    if client is None:
        return dask.compute(*collections)
    # Results that wait on workers for all others would fill their memory.
    with _out_of_the_way():
        futures = client.compute(collections, traverse=False)
        return _gathered(client, futures)


def _scheduler_of(collections: Iterable[Any]) -> Any:
    """Return Dask's scheduler for collections, which may be a client's; raise if it cannot be waited for."""
    # It raises for an asynchronous client of this event loop.
    try:
        return get_scheduler(collections=collections)
    except RuntimeError as error:
        raise InvalidArgumentError(
            "The client is asynchronous, and the rows are needed now. Call this in a thread of its own, as with "
            "asyncio.to_thread, with a client that is not asynchronous."
        ) from error


def _client_of(get: Any) -> Client | None:
    """Return the client that a scheduler's function belongs to, or None of a scheduler in this process."""
    distributed = sys.modules.get("distributed")
    client = getattr(get, "__self__", None)
    return client if distributed is not None and isinstance(client, distributed.Client) else None


def _gathered(client: Client, futures: Sequence[Future]) -> tuple[Any, ...]:
    """Return the results of futures, in order, each of which is fetched and released as soon as it is there."""
    from distributed import as_completed

    results: dict[Any, Any] = {}
    with watched(client) as moved:
        for future, result in as_completed(futures, with_results=True):
            results[future.key] = result
            future.release()
            moved()
    return tuple(results[future.key] for future in futures)


def compute_to_the_end(frame: dd.DataFrame) -> pd.DataFrame:
    """Compute a frame whose tasks write files, on the same scheduler as `compute`.

    Parameters
    ----------
    frame : dask.dataframe.DataFrame
        Frame of small pandas partitions, which describe the files.

    Returns
    -------
    pandas.DataFrame
        All rows, in the partitions' order.

    Raises
    ------
    Exception
        The first error of a task, once no other task runs, so that the written files can be removed.
    """
    get = _scheduler_of([frame])
    if (client := _client_of(get)) is not None:
        with _out_of_the_way():
            return pd.concat(results_of(client, submit(client, frame)))
    tasks = _tasks_of(frame)
    if get is not threaded.get:
        return pd.concat(get(*tasks))
    # A pool of its own, since leaving it waits for its threads.
    with ThreadPoolExecutor(dask.config.get("num_workers", None) or CPU_COUNT) as pool:
        return pd.concat(get(*tasks, pool=pool))


def submit(client: Client, frame: dd.DataFrame) -> list[Future]:
    """Have a client compute a frame, and return the futures of its partitions."""
    return client.get(*_tasks_of(frame), sync=False)


def _tasks_of(frame: dd.DataFrame) -> tuple[Mapping[Key, Any], list[Key]]:
    """Return the graph of a frame, in which what can be one task is one, and the keys of its partitions.

    Computed as a collection, the frame would not be fused; or, if it is already, be optimised again. That renames what
    fused tasks refer to by its former name, where one source is read with all of its columns and with some.
    """
    made = frame.optimize().expr
    return made.__dask_graph__(), list(flatten(made.__dask_keys__()))


@contextmanager
def _out_of_the_way() -> Iterator[None]:
    """If this is a task, free the worker's thread for other tasks while it waits, as `compute` does."""
    from distributed import rejoin, secede

    try:
        secede()
    except (KeyError, ValueError):  # Not in a task.
        yield
        return
    try:
        yield
    finally:
        rejoin()


def results_of(client: Client, futures: Iterable[Future], advance: Callable[[], None] = lambda: None) -> list[Any]:
    """Wait for futures, and return their results in order.

    After the first error, all are stopped. The error is raised once none of their tasks runs any more.

    Parameters
    ----------
    client : distributed.Client
    futures : iterable of distributed.Future
    advance : callable
        Called each time a future is done.
    """
    from distributed import as_completed

    futures = list(futures)
    try:
        with watched(client) as moved:
            for future in as_completed(futures):
                # Raises its error, if it has failed.
                future.result()
                moved()
                advance()
        return client.gather(futures)
    except BaseException:
        # A cluster that is gone cannot be waited for.
        if is_connected(client):
            with suppress(OSError):
                _stop(client, futures)
        raise


def _stop(client: Client, futures: list[Future]) -> None:
    """Cancel tasks, and wait for those that run: no worker interrupts them."""
    client.cancel(futures)
    keys = {future.key for future in futures}
    while any(client.run(_knows_any, keys, on_error="ignore").values()):
        time.sleep(0.1)


def _knows_any(keys: set[Any], dask_worker: Any) -> bool:
    """Return whether a worker has tasks of these keys; it forgets cancelled ones as soon as they do not run."""
    return not keys.isdisjoint(dask_worker.state.tasks)
