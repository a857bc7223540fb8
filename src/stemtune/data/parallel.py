"""Chunks of work over all cores, in order; a little work stays in this process."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from stemtune.errors import OutOfMemoryError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_chunks(
    function: Callable[[Chunk], Result], chunks: Iterable[Chunk], workers: int | None = None
) -> Iterator[Result]:
    """`function` of every chunk, in their order. At most a few chunks are in memory at once.

    A single chunk, or a single core, needs no other process.

    Args:
        function: without side effects; it and what it returns can be pickled.
        workers: processes; as many as there are cores, if not given.

    Raises:
        OutOfMemoryError: a process was killed, as a system does that has no memory left.
    """
    workers = workers or cores()
    rest = iter(chunks)
    first = list(islice(rest, 2))
    if len(first) < 2 or workers == 1:
        yield from map(function, chain(first, rest))
        return
    # Forked workers share what is imported and loaded already; where there is no fork, or where it
    # is not safe (macOS), they start anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the workers only read, parse and tokenise.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function,))
        try:
            waiting: deque[Future[Result]] = deque()
            for chunk in chain(first, rest):
                waiting.append(pool.submit(_call, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            what = "a process that read the data was killed, perhaps for want of memory"
            hint = "free some memory, or allow this command fewer cores (taskset)"
            raise OutOfMemoryError(what, where="data", hint=hint) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[[Any], Any]


def _start(function: Callable[[Any], Any]) -> None:
    global _function  # noqa: PLW0603 (pickled once a worker, not once a chunk)
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
