"""Windows of records in the order of their prefixes."""

import random
from collections.abc import Iterable

from hypothesis import given, strategies

from stemtune.plan.prefixes import windows_by_prefix


def distinct(keys: Iterable[bytes]) -> int:
    """Nodes of a trie, by the definition: one for each prefix."""
    return len({key[:end] for key in keys for end in range(1, len(key) + 1)})


@given(
    keys=strategies.lists(strategies.binary(max_size=4), max_size=60),
    size=strategies.integers(1, 20),
)
def test_each_record_once(keys: list[bytes], size: int) -> None:
    records = list(range(len(keys)))[::-1]
    windows = windows_by_prefix(records, keys.__getitem__, size)
    assert sorted(record for window in windows for record in window) == records[::-1]
    assert all(1 <= len(window) <= size for window in windows)
    assert len(windows) == -(-len(keys) // size)


def test_stems_are_hardly_ever_torn_apart() -> None:
    """Five personas longer than any prompt, with 200 prompts each, of which each has three rows."""
    personas = [bytes([n]) * 50 for n in range(5)]
    prompts = [persona + bytes([n, *range(9)]) for persona in personas for n in range(200)]
    keys = [prompt + bytes([n]) * 3 for prompt in prompts for n in range(3)]
    random.Random(0).shuffle(keys)
    asked: list[int] = []

    def key(record: int) -> bytes:
        asked.append(record)
        return keys[record]

    windows = windows_by_prefix(range(len(keys)), key, 100)
    total = sum(distinct(keys[record] for record in window) for window in windows)
    at_random = [keys[start : start + 100] for start in range(0, len(keys), 100)]
    assert distinct(keys) <= total < 1.3 * distinct(keys)
    assert total < 0.7 * sum(map(distinct, at_random)), "there is little to be torn apart"
    assert len(asked) < 1.2 * len(keys)
