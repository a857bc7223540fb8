"""How much two texts have in common, by words; by characters, where a script has no spaces."""

from collections import Counter

from rapidfuzz.distance import LCSseq

from stemtune.data.words import words


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence.

    Source:
        Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, with beta = 1.
    """
    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return 0.0
    common = LCSseq.similarity(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that both have, wherever they stand.

    Source:
        Rajpurkar et al. 2016, SQuAD, arXiv 1606.05250, without its dropping of English articles.
    """
    ours, theirs = words(text), words(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def exact_match(text: str, reference: str) -> float:
    """1 if both have the same words in the same order; case and punctuation don't count."""
    return float(words(text) == words(reference))
