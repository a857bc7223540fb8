"""Micro-batches that keep records whole, against brute force: a Python set of prefixes."""

import math
from collections import Counter
from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given, settings, strategies

import stemtune as st
from stemtune.plan.pack import pack
from tests.trees import forests, spell

Batch = list[int]


def distinct(sequences: list[st.Sequence]) -> int:
    """By the definition: how many different prefixes there are."""
    return len({tuple(s.input_ids[: end + 1].tolist()) for s in sequences for end in range(len(s))})


def padded(sequences: list[st.Sequence]) -> int:
    """By the definition: rows times the longest."""
    return len(sequences) * max(len(sequence) for sequence in sequences)


def of(sequences: list[st.Sequence], batch: Batch) -> list[st.Sequence]:
    return [sequences[index] for index in batch]


def records_in(sequences: list[st.Sequence], batch: Batch) -> set[int]:
    return {sequences[index].record for index in batch}


def with_records(sequences: list[st.Sequence], records: list[int]) -> list[st.Sequence]:
    return [
        st.Sequence(s.input_ids, s.is_target, record=number)
        for s, number in zip(sequences, records, strict=True)
    ]


def spelled(*records: str) -> list[st.Sequence]:
    """A record of each text: `abC abD` has two sequences."""
    words = [(word, number) for number, text in enumerate(records) for word in text.split()]
    return with_records([spell(word) for word, _ in words], [number for _, number in words])


def answer_to(prompt: list[int], answer: list[int], record: int) -> st.Sequence:
    return st.Sequence(prompt + answer, [False] * len(prompt) + [True] * len(answer), record=record)


@strategies.composite
def grown(draw: strategies.DrawFn) -> list[st.Sequence]:
    """Sequences that grow out of one another, of any records: prefixes of one are in another."""
    sequences = draw(forests())
    numbers = strategies.integers(0, 3)
    records = draw(strategies.lists(numbers, min_size=len(sequences), max_size=len(sequences)))
    return with_records(sequences, records)


@strategies.composite
def answered(draw: strategies.DrawFn) -> list[st.Sequence]:
    """Several answers to each prompt; few prompts and few tokens, so that records of one prompt
    lie between one another, prompts begin alike, and some answers are the same."""
    tokens = strategies.integers(0, 2)
    prompts = draw(
        strategies.lists(strategies.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=3)
    )
    answers = strategies.lists(
        strategies.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=4
    )
    sequences = [
        answer_to(prompt, answer, 10 * record)
        for record in range(draw(strategies.integers(1, 6)))
        for prompt in (draw(strategies.sampled_from(prompts)),)
        for answer in draw(answers)
    ]
    return draw(strategies.permutations(sequences))


def any_records() -> strategies.SearchStrategy[list[st.Sequence]]:
    return grown() | answered()


BUDGETS = strategies.integers(1, 40)
RANKS = strategies.integers(1, 3)


@given(any_records(), BUDGETS, RANKS, strategies.booleans())
def test_every_sequence_once_and_every_record_in_one_micro_batch(
    sequences: list[st.Sequence], budget: int, world_size: int, shared: bool
) -> None:
    ranks = pack(sequences, budget, shared=shared, together=True, world_size=world_size)
    assert len(ranks) == world_size
    batches = list(chain.from_iterable(ranks))
    assert all(batches)
    assert sorted(chain.from_iterable(batches)) == list(range(len(sequences)))
    places = Counter(number for batch in batches for number in records_in(sequences, batch))
    assert places == Counter({sequence.record for sequence in sequences})


@settings(max_examples=200)
@given(any_records(), BUDGETS, RANKS)
def test_distinct_tokens_are_within_the_budget_unless_a_record_is_not(
    sequences: list[st.Sequence], budget: int, world_size: int
) -> None:
    for batch in chain.from_iterable(pack(sequences, budget, together=True, world_size=world_size)):
        alone = len(records_in(sequences, batch)) == 1
        assert distinct(of(sequences, batch)) <= budget or alone


@settings(max_examples=200)
@given(any_records(), BUDGETS, RANKS)
def test_padded_tokens_are_within_the_budget_unless_a_record_is_not(
    sequences: list[st.Sequence], budget: int, world_size: int
) -> None:
    for batch in chain.from_iterable(
        pack(sequences, budget, shared=False, together=True, world_size=world_size)
    ):
        alone = len(records_in(sequences, batch)) == 1
        assert padded(of(sequences, batch)) <= budget or alone


@given(any_records())
def test_all_at_once_where_the_budget_allows_it(sequences: list[st.Sequence]) -> None:
    records = {sequence.record for sequence in sequences}
    enough = sum(distinct([s for s in sequences if s.record == record]) for record in records)
    (batches,) = pack(sequences, enough, together=True)
    assert [sorted(batch) for batch in batches] == [list(range(len(sequences)))]
    (batches,) = pack(sequences, padded(sequences), shared=False, together=True)
    assert [sorted(batch) for batch in batches] == [list(range(len(sequences)))]


@given(any_records(), strategies.booleans())
def test_each_record_alone_with_the_smallest_budget(
    sequences: list[st.Sequence], shared: bool
) -> None:
    """Each record begins with a token of its own, so that two have at least two tokens."""
    sequences = [
        st.Sequence([100 + s.record, *s.input_ids], [False, *s.is_target], record=s.record)
        for s in sequences
    ]
    batches = pack(sequences, 1, shared=shared, together=True)[0]
    assert all(len(records_in(sequences, batch)) == 1 for batch in batches)
    assert len(batches) == len({sequence.record for sequence in sequences})


@given(any_records(), BUDGETS, strategies.booleans())
def test_the_cut_does_not_depend_on_ranks(
    sequences: list[st.Sequence], budget: int, shared: bool
) -> None:
    cuts = [
        sorted(
            map(
                sorted,
                chain.from_iterable(
                    pack(sequences, budget, shared=shared, together=True, world_size=size)
                ),
            )
        )
        for size in (1, 2, 3)
    ]
    assert cuts[0] == cuts[1] == cuts[2]


def cheapest(records: list[list[st.Sequence]], budget: int) -> float:
    """Tokens plus micro-batches of the best cut of a sorted list of records, by trying them all."""
    best = math.inf
    for count in range(len(records)):
        for cuts in combinations(range(1, len(records)), count):
            groups = [records[a:b] for a, b in pairwise([0, *cuts, len(records)])]
            sizes = [distinct(list(chain.from_iterable(group))) for group in groups]
            if all(s <= budget or len(g) == 1 for s, g in zip(sizes, groups, strict=True)):
                best = min(best, sum(sizes) + len(groups))
    return best


@strategies.composite
def side_by_side(draw: strategies.DrawFn) -> list[list[st.Sequence]]:
    """Records of neighbours in the order of their ids: none lies between the sequences of another,
    and what a record shares with those before it, it shares with the last one."""
    sequences = sorted(draw(forests(tokens=range(3), most=10)), key=lambda s: s.input_ids.tolist())
    records: list[list[st.Sequence]] = []
    while sequences:
        count = draw(strategies.integers(1, 3))
        records.append(with_records(sequences[:count], [len(records)] * len(sequences[:count])))
        sequences = sequences[count:]
    return records


@settings(max_examples=100)
@given(side_by_side(), strategies.integers(3, 20))
def test_no_cut_between_records_is_cheaper(records: list[list[st.Sequence]], budget: int) -> None:
    sequences = list(chain.from_iterable(records))
    (batches,) = pack(sequences, budget, together=True)
    cost = sum(distinct(of(sequences, batch)) for batch in batches) + len(batches)
    assert cost == cheapest(records, budget)


def test_a_record_is_torn_only_if_it_may_be() -> None:
    """Two prompts of 4 tokens with answers of 4: 8 tokens hold one answer, 12 both."""
    sequences = spelled("abcdEFGH abcdIJKL", "mnopQRST mnopUVWX")
    apart = sorted(map(sorted, pack(sequences, 8)[0]))
    assert apart == [[0], [1], [2], [3]]
    for budget in (1, 8, 11, 12, 23):
        kept = sorted(map(sorted, pack(sequences, budget, together=True)[0]))
        assert kept == [[0, 1], [2, 3]]
    assert sorted(pack(sequences, 24, together=True)[0][0]) == [0, 1, 2, 3]


def test_a_padded_record_is_torn_only_if_it_may_be() -> None:
    """By length alone, the long answers and the short ones would be together."""
    sequences = spelled("abcdefgH abcD", "mnopqrsT mnoP")
    apart = sorted(map(sorted, pack(sequences, 16, shared=False)[0]))
    assert apart == [[0, 2], [1, 3]]
    for budget in (1, 16, 31):
        kept = sorted(map(sorted, pack(sequences, budget, shared=False, together=True)[0]))
        assert kept == [[0, 1], [2, 3]]
    (whole,) = pack(sequences, 32, shared=False, together=True)[0]
    assert sorted(whole) == [0, 1, 2, 3]


def test_a_record_longer_than_the_budget_runs_alone() -> None:
    sequences = spelled("abC", "abcdefghIJK abcdefghLMN", "abD")
    for shared in (True, False):
        (batches,) = pack(sequences, 7, shared=shared, together=True)
        assert [1, 2] in map(sorted, batches)
        assert sorted(chain.from_iterable(batches)) == [0, 1, 2, 3]


def test_records_that_share_a_prompt_share_a_micro_batch() -> None:
    """Two records of the prompt a…f, two of m…r: with 11 tokens, a prompt is computed once."""
    sequences = spelled("abcdefX abcdefY", "mnopqrX mnopqrY", "abcdefZ abcdefW", "mnopqrZ mnopqrW")
    for budget in (10, 11, 19):
        found = sorted(map(sorted, pack(sequences, budget, together=True)[0]))
        assert found == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_records_that_lie_between_one_another() -> None:
    """In the order of ids a sequence of the one follows one of the other. Their tree has 8 tokens,
    but is never counted as less: it is one micro-batch at the latest with 12."""
    sequences = spelled("abcdE abcdG", "abcdF abcdH")
    for budget in range(1, 13):
        batches = sorted(map(sorted, pack(sequences, budget, together=True)[0]))
        assert batches in ([[0, 1], [2, 3]], [[0, 1, 2, 3]])
        assert budget >= 8 or len(batches) == 2
    assert len(batches) == 1


def test_what_is_shared_with_a_record_elsewhere_is_not_saved() -> None:
    """The last record shares 4 tokens with the first one, which is a micro-batch of its own: with
    the second, it has 7 tokens."""
    sequences = spelled("aB mnopQ", "bC", "mnopR")
    assert sorted(map(sorted, pack(sequences, 6, together=True)[0])) == [[0, 1], [2], [3]]


def test_duplicates_are_all_there() -> None:
    """The same answers in one record, and the same records twice."""
    sequences = spelled("abC abC abD", "abC abC abD")
    assert sorted(map(sorted, pack(sequences, 4, together=True)[0])) in (
        [[0, 1, 2], [3, 4, 5]],
        [[0, 1, 2, 3, 4, 5]],
    )
    assert sorted(pack(sequences, 8, together=True)[0][0]) == [0, 1, 2, 3, 4, 5]


def test_more_ranks_than_records() -> None:
    ranks = pack(spelled("abC abD", "xyZ xyW"), 4, together=True, world_size=3)
    assert sorted(map(len, ranks)) == [0, 1, 1]


def test_ranks_are_balanced_by_records() -> None:
    """Six records of 10 tokens, and one of 30: three ranks of 30."""
    sizes = [10] * 6 + [30]
    sequences = [
        answer_to([100 * number + i for i in range(size - 2)], [last], number)
        for number, size in enumerate(sizes)
        for last in (1, 2)
    ]
    ranks = pack(sequences, 10, together=True, world_size=3)
    loads = [sum(distinct(of(sequences, batch)) for batch in rank) for rank in ranks]
    assert loads == [30, 30, 30]


@given(any_records(), BUDGETS, RANKS, strategies.booleans())
def test_records_of_one_sequence_are_packed_as_if_there_were_none(
    sequences: list[st.Sequence], budget: int, world_size: int, shared: bool
) -> None:
    sequences = with_records(sequences, list(range(len(sequences))))
    kept, free = (
        pack(sequences, budget, shared=shared, together=together, world_size=world_size)
        for together in (True, False)
    )
    assert kept == free


@given(any_records(), BUDGETS, RANKS, strategies.booleans())
def test_records_do_not_matter_where_they_may_be_torn(
    sequences: list[st.Sequence], budget: int, world_size: int, shared: bool
) -> None:
    plain = with_records(sequences, [0] * len(sequences))
    found, same = (
        pack(some, budget, shared=shared, world_size=world_size) for some in (sequences, plain)
    )
    assert found == same
    for batch in chain.from_iterable(found):
        size = (distinct if shared else padded)(of(sequences, batch))
        assert size <= budget or len(batch) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_the_same_every_time(shared: bool) -> None:
    sequences = spelled("abC abD", "xyZ xyW", "aB a", "abC abE")
    first, second = (
        pack(sequences, 6, shared=shared, together=True, world_size=2) for _ in range(2)
    )
    assert first == second
