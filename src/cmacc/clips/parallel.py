"""Run many tasks on any `concurrent.futures.Executor`: local threads, or the workers of a Dask cluster."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Enough to keep the workers of a large cluster busy, without holding a million tasks in memory.
_IN_FLIGHT = 1024


def results_of(
    executor: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[tuple[_Item, _Result]]:
    """``(item, function(item))`` for every item, in the order of completion.

    An error of a task is raised here, and tasks that have not started are cancelled.
    """
    waiting: dict[Future[_Result], _Item] = {}
    rest = iter(items)
    try:
        while True:
            while len(waiting) < _IN_FLIGHT and (item := next(rest, None)) is not None:
                waiting[executor.submit(function, item)] = item
            if not waiting:
                return
            done = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda one: one.exception() is not None):  # errors last
                yield waiting.pop(future), future.result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def workers_of(count: int, cluster: str | None = None) -> Iterator[Executor]:
    """An executor: ``count`` local threads (each with a guarded process), or the workers of a Dask cluster.

    Parameters
    ----------
    count
        Number of threads; ignored with a cluster.
    cluster
        Address of a Dask scheduler, such as ``tcp://10.0.0.1:8786``. Its workers must have cmacc installed and see the
        files under the same paths.

    Raises
    ------
    ValueError
        ``count`` is below 1, the extra ``cluster`` is not installed, or no scheduler answers.
    """
    if cluster is None:
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {count}")
        with ThreadPoolExecutor(count) as threads:
            yield threads
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("--cluster needs the extra `cluster`: pip install 'cmacc[cluster]'") from error
    try:
        client = Client(cluster, timeout=5)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ValueError(f"--cluster {cluster}: no Dask scheduler answers ({error})") from error
    with client, client.get_executor() as executor:  # type: ignore[no-untyped-call]
        yield executor
