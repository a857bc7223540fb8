"""Calls over the network, tried again while what failed may pass."""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)
Found = TypeVar("Found")

PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
TRYING = 60.0  # seconds of nothing but failures
GOT_ON = 60.0  # seconds of a call that must have got something before it failed
FIRST, LONGEST = 1.0, 20.0  # seconds of a wait


def retried(
    call: Callable[[], Found],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """`call`, again and again while what it raises may pass: a network or a server that is down.

    Waits grow from one second to twenty, each of a random length up to that (full jitter, so that
    many machines don't come back at once). A minute of nothing but failures is enough; a
    download that got on for a while begins a new count, and goes on where it stopped.
    """
    since, longest = clock(), FIRST
    while True:
        began = clock()
        try:
            return call()
        except Exception as error:
            if clock() - began > GOT_ON:
                since, longest = clock(), FIRST
            wait = random.uniform(0, longest)
            if not _may_pass(error) or clock() - since + wait > TRYING or is_offline():
                raise
            log.warning("%s; trying again in %.0f s", first_line(error), wait)
            sleep(wait)
            longest = min(2 * longest, LONGEST)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def http_error(error: BaseException) -> int | None:
    """The status of the answer behind an error."""
    from huggingface_hub.errors import HfHubHTTPError

    for one in _chain(error):
        if isinstance(one, HfHubHTTPError):
            return one.response.status_code
    return None


def network_error(error: BaseException) -> BaseException | None:
    """What the network library raised behind an error: its module depends on the Hub's version."""
    for one in _chain(error):
        if type(one).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            return one
        if isinstance(one, ConnectionError | TimeoutError):
            return one
    return None


def _may_pass(error: BaseException) -> bool:
    status = http_error(error)
    return status in PASSING if status is not None else network_error(error) is not None


def is_offline() -> bool:
    """Whether the user forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def first_line(error: BaseException) -> str:
    """What an error says, shortly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
