"""Pairs from several answers to one prompt."""

from collections.abc import Sequence as Seq

from stemtune.config import Pairs
from stemtune.data.overlap import rouge_l


def ranked_pairs(texts: Seq[str], scores: Seq[float], pairs: Pairs) -> list[tuple[int, int]]:
    """Indices of a better and a worse answer, by `data.pairs`. Answers whose scores differ by no
    more than the margin are tied, and so are those of the same text: neither makes a pair.

    Returns:
        With `best_worst` at most one pair, with `best_all` the best answer against each other one,
        with `all` each against each worse one.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: early ones first
    best = order[0]
    others = [i for i in order if texts[i].strip() != texts[best].strip()]
    wanted = {
        "best_worst": [(best, other) for other in others[-1:]],
        "best_all": [(best, other) for other in others],
        "all": [(a, b) for n, a in enumerate(order) for b in order[n + 1 :]],
    }[pairs.mode]
    return [
        (a, b)
        for a, b in wanted
        if scores[a] - scores[b] > pairs.margin and texts[a].strip() != texts[b].strip()
    ]


def reference_scores(texts: Seq[str], reference: str) -> list[float]:
    """ROUGE-L of each text against the reference."""
    return [rouge_l(text, reference) for text in texts]
