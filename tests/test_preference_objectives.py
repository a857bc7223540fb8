"""Objectives that compare answers, against the formulas of their papers in arbitrary precision.

The oracle is written on lists of floats with mpmath, one pair, ranking or answer at a time; its
gradient is a difference quotient of a step so small that it is exact to all digits of float64.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies
from mpmath.ctx_mp import MPContext
from torch import Tensor

import stemtune as st
from stemtune.config import (
    ApoDown,
    ApoZero,
    Cpo,
    Dpo,
    Hinge,
    Ipo,
    Kto,
    Orpo,
    PlackettLuce,
    Sft,
    Simpo,
)
from stemtune.objectives import (
    OBJECTIVES,
    Layout,
    Totals,
    layout_of,
    loss_of,
    terms_of,
    totals_of,
)
from stemtune.objectives.mismatched import baseline, mismatched
from stemtune.objectives.rewards import preference_metrics
from stemtune.objectives.supervised import best_answers

mp = MPContext()
mp.dps = 60
Real = Any  # of mpmath
F32, F64 = torch.float32, torch.float64
every_dtype = pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
DTYPES = strategies.sampled_from([F32, F64])


# -- what is compared ----------------------------------------------------------------------------


@dataclass
class Answer:
    """Log-probabilities of its targets, of the policy and of the reference."""

    ours: list[Real]
    theirs: list[Real]
    good: bool = False

    @property
    def h(self) -> Real:
        return mp.fsum(self.ours) - mp.fsum(self.theirs)

    @property
    def mean(self) -> Real:
        return mp.fsum(self.ours) / len(self.ours)

    @property
    def mean_h(self) -> Real:
        return self.h / len(self.ours)


@dataclass
class Record:
    """Answers to a prompt; `pairs` are (better, worse)."""

    answers: list[Answer]
    pairs: list[tuple[int, int]]

    @property
    def best(self) -> list[Answer]:
        """Wanted, and none is better."""
        beaten = {worse for _, worse in self.pairs}
        wanted = {better for better, _ in self.pairs}
        return [
            answer
            for number, answer in enumerate(self.answers)
            if (number in wanted or answer.good) and number not in beaten
        ]

    @property
    def ranked(self) -> list[Answer]:
        """From best to worst, of a whole ranking."""
        wins = [sum(better == number for better, _ in self.pairs) for number in range(99)]
        order = sorted(range(len(self.answers)), key=lambda number: -wins[number])
        return [self.answers[number] for number in order]


Place = tuple[int, int]
"""A record, and one of its answers."""


@dataclass
class Batch:
    """Records, and the order in which their sequences stand."""

    records: list[Record]
    order: list[Place]

    def at(self, place: Place) -> Answer:
        return self.records[place[0]].answers[place[1]]

    @property
    def sequences(self) -> list[st.Sequence]:
        """Prompts of different lengths; between targets there may be tokens that are none."""
        made: list[st.Sequence] = []
        for number, answer in self.order:
            record = self.records[number]
            mask = [False] * (1 + number % 3)
            for target in range(len(self.at((number, answer)).ours)):
                mask += [False] * ((target + answer) % 4 == 1) + [True]
            worse = tuple(w for b, w in record.pairs if b == answer)
            wanted = worse or record.answers[answer].good
            made.append(
                st.Sequence(
                    range(len(mask)),
                    mask,
                    record=7 * number + 3,
                    role="chosen" if wanted else "rejected",
                    answer=answer,
                    preferred_to=worse,
                )
            )
        return made

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        answers = [self.at(place) for place in self.order]
        ours = [float(value) for answer in answers for value in answer.ours]
        theirs = [float(value) for answer in answers for value in answer.theirs]
        return torch.tensor(ours, dtype=dtype), torch.tensor(theirs, dtype=dtype)

    def of(self, numbers: list[int]) -> "Batch":
        """Some of the records, in the order in which they stand."""
        return Batch(self.records, [place for place in self.order if place[0] in numbers])


def rounded(value: float) -> float:
    """To fp32, so that all precisions are given the same numbers."""
    return float(np.float32(value))


def some_answer(rng: random.Random, size: int, spread: float) -> Answer:
    ours = [-rng.expovariate(1.0) - 1e-4 for _ in range(size)]
    theirs = [min(value + rng.gauss(0.0, spread), -1e-4) for value in ours]
    return Answer(list(map(rounded, ours)), list(map(rounded, theirs)), rng.random() < 0.5)


@strategies.composite
def batches(
    draw: strategies.DrawFn, pairs: str = "some", most: int = 5, longest: int = 12, records: int = 3
) -> Batch:
    """Records of 2 to 5 answers, whose sequences stand in any order.

    Args:
        pairs: `some`: any number of pairs of a hidden ranking; `all`: each two answers are one;
            `none`: answers are good or bad.
    """
    rng = random.Random(draw(strategies.integers(0, 2**32)))
    spread = draw(strategies.sampled_from([0.01, 0.3, 1.0]))
    made: list[Record] = []
    for _ in range(draw(strategies.integers(1, records))):
        count = draw(strategies.integers(1 if pairs == "none" else 2, most))
        lengths = [draw(strategies.integers(1, longest)) for _ in range(count)]
        answers = [some_answer(rng, length, spread) for length in lengths]
        ranking = draw(strategies.permutations(range(count)))
        found = list(combinations(ranking, 2))
        if pairs == "some":
            found = [pair for pair in found if draw(strategies.booleans())]
        if pairs != "none":
            answers = [replace(answer, good=False) for answer in answers]
        made.append(Record(answers, [] if pairs == "none" else found))
    places = [(n, a) for n, record in enumerate(made) for a in range(len(record.answers))]
    return Batch(made, draw(strategies.permutations(places)))


def one_pair(better: Answer, worse: Answer) -> Batch:
    return Batch([Record([better, worse], [(0, 1)])], [(0, 0), (0, 1)])


# -- the formulas --------------------------------------------------------------------------------


def sigma(x: Real) -> Real:
    return 1 / (1 + mp.exp(-x))


def log_sigma(x: Real) -> Real:
    return mp.log(sigma(x)) if x > -100 else x - mp.log1p(mp.exp(x))


def smoothed(z: Real, smoothing: float) -> Real:
    """Mitchell: with the probability ε the label is wrong."""
    return -(1 - mp.mpf(smoothing)) * log_sigma(z) - smoothing * log_sigma(-z)


def slope_of_f(log_u: Real, config: Any) -> Real:
    """f'(u) of Wang et al., table 1, with its constants."""
    u = mp.exp(log_u)
    match config.divergence:
        case "reverse_kl":  # f(u) = u log u
            return mp.log(u) + 1
        case "forward_kl":  # f(u) = -log u
            return -1 / u
        case "js":  # f(u) = u log u - (u + 1) log((u + 1) / 2)
            return mp.log(2 * u / (1 + u))
        case _:  # f(u) = (u^(1-α) - (1-α)·u - α) / (α·(α-1))
            alpha = mp.mpf(config.divergence_alpha)
            return (1 - u**-alpha) / alpha


def dpo_pair(y: Answer, other: Answer, config: Any) -> Real:
    both = min(len(y.ours), len(other.ours))

    def reward(answer: Answer) -> Real:
        h = mp.mpf(0)
        for place, (p, r) in enumerate(zip(answer.ours, answer.theirs, strict=True)):
            h += (p - mp.mpf(r)) * (1 if place < both else mp.mpf(config.ld_alpha))
        if config.length == "sum":
            return config.beta * slope_of_f(h, config)
        # Over the length, the constant makes a difference: a policy that is the reference has 0.
        return (
            config.beta * (slope_of_f(h, config) - slope_of_f(mp.mpf(0), config)) / len(answer.ours)
        )

    z = reward(y) - reward(other)
    eps = mp.mpf(config.label_smoothing)
    if config.robust:
        return (-(1 - eps) * log_sigma(z) + eps * log_sigma(-z)) / (1 - 2 * eps)
    return smoothed(z, eps)


def ipo_pair(y: Answer, other: Answer, config: Any) -> Real:
    return (y.mean_h - other.mean_h - 1 / (2 * mp.mpf(config.beta))) ** 2


def hinge_pair(y: Answer, other: Answer, config: Any) -> Real:
    return max(mp.mpf(0), 1 - config.beta * (y.h - other.h))


def apo_zero_pair(y: Answer, other: Answer, config: Any) -> Real:
    return 1 - sigma(config.beta * y.h) + sigma(config.beta * other.h)


def apo_down_pair(y: Answer, other: Answer, config: Any) -> Real:
    return sigma(config.beta * y.h) + 1 - sigma(config.beta * (y.h - other.h))


def simpo_pair(y: Answer, other: Answer, config: Any) -> Real:
    return smoothed(config.beta * (y.mean - other.mean) - config.gamma, config.label_smoothing)


def orpo_pair(y: Answer, other: Answer, config: Any) -> Real:
    def odds(answer: Answer) -> Real:
        p = mp.exp(answer.mean)
        return p / (1 - p)

    return -config.beta * log_sigma(mp.log(odds(y) / odds(other)))


def cpo_pair(y: Answer, other: Answer, config: Any) -> Real:
    z = config.beta * (mp.fsum(y.ours) - mp.fsum(other.ours))
    return smoothed(z, config.label_smoothing)


PAIR: dict[str, Callable[[Answer, Answer, Any], Real]] = {
    "dpo": dpo_pair,
    "ipo": ipo_pair,
    "hinge": hinge_pair,
    "apo_zero": apo_zero_pair,
    "apo_down": apo_down_pair,
    "simpo": simpo_pair,
    "orpo": orpo_pair,
    "cpo": cpo_pair,
}


def ranking_loss(answers: list[Answer], beta: float) -> Real:
    """Minus the log of the probability of a ranking, drawn from best to worst."""
    probability = mp.mpf(1)
    for k, answer in enumerate(answers):
        rest = mp.fsum(mp.exp(beta * other.h) for other in answers[k:])
        probability *= mp.exp(beta * answer.h) / rest
    return -mp.log(probability)


def kto_loss(answer: Answer, z: float, config: Any) -> Real:
    """λ_y - v(x, y), as in eq. 8."""
    if answer.good:
        return config.desirable_weight * (1 - sigma(config.beta * (answer.h - z)))
    return config.undesirable_weight * (1 - sigma(config.beta * (z - answer.h)))


def answers_of(batch: Batch) -> list[Answer]:
    return [batch.at(place) for place in batch.order]


def records_of(batch: Batch) -> list[Record]:
    return [batch.records[number] for number in sorted({number for number, _ in batch.order})]


def by_formula(batch: Batch, config: Any, z: float = 0.0) -> Real:
    """The sum that an objective returns for a batch."""
    if config.type == "kto":
        return mp.fsum(kto_loss(answer, z, config) for answer in answers_of(batch))
    if config.type == "plackett_luce":
        return mp.fsum(ranking_loss(r.ranked, config.beta) for r in records_of(batch) if r.pairs)
    return mp.fsum(
        PAIR[config.type](record.answers[better], record.answers[worse], config)
        for record in records_of(batch)
        for better, worse in record.pairs
    )


def slopes(batch: Batch, loss: Callable[[Batch], Real]) -> list[float]:
    """The derivative by each log-probability of the policy, in the order of the tensor."""
    step = mp.mpf(10) ** -25
    found: list[float] = []
    for answer in answers_of(batch):
        for place, value in enumerate(answer.ours):
            ends: list[Real] = []
            for moved in (mp.mpf(value) + step, mp.mpf(value) - step):
                answer.ours[place] = moved
                ends.append(loss(batch))
            answer.ours[place] = value
            found.append(float((ends[0] - ends[1]) / (2 * step)))
    return found


# -- the code ------------------------------------------------------------------------------------


def by_code(
    batch: Batch, config: Any, dtype: torch.dtype, z: float | None = None
) -> tuple[float, list[float]]:
    """The sum that an objective returns for a batch, and its gradient."""
    ours, theirs = batch.tensors(dtype)
    ours.requires_grad_()
    layout = layout_of(
        batch.sequences, baseline=None if z is None else torch.tensor(z, dtype=dtype)
    )
    function, _ = OBJECTIVES[config.type]
    loss, metrics = function(ours, theirs if config.has_reference else None, layout, config)
    assert loss.dtype == dtype and loss.shape == () and metrics == {}
    loss.requires_grad_()  # it has none of its own where there is nothing to compare
    loss.backward()
    grad = torch.zeros_like(ours) if ours.grad is None else ours.grad
    return float(loss.detach()), grad.tolist()


def near(value: Real, dtype: torch.dtype, size: float = 1.0) -> Any:
    """As exact as the precision allows; `size` is that of the numbers that were added up."""
    if dtype == F64:
        return pytest.approx(float(value), rel=1e-9, abs=1e-12 * size)
    return pytest.approx(float(value), rel=1e-4, abs=1e-5 * size)


def check(batch: Batch, config: Any, z: float | None = None, gradient: bool = False) -> None:
    """The code against the formula, in both precisions."""
    truth = by_formula(batch, config, z or 0.0)
    for dtype in (F64, F32):
        loss, grad = by_code(batch, config, dtype, z)
        assert loss == near(truth, dtype, max(1, len(batch.order)))
        assert all(map(math.isfinite, grad))
        if gradient and dtype == F64:
            expected = slopes(batch, lambda some: by_formula(some, config, z or 0.0))
            assert grad == pytest.approx(expected, rel=1e-7, abs=1e-10)


BETAS = strategies.sampled_from([0.01, 0.1, 0.5, 2.0])
SMOOTHING = strategies.sampled_from([0.0, 0.1, 0.45])


@strategies.composite
def dpos(draw: strategies.DrawFn) -> Dpo:
    """Any combination of its variants."""
    smoothing = draw(SMOOTHING)
    divergence = draw(strategies.sampled_from(["reverse_kl", "forward_kl", "js", "alpha"]))
    alphas = strategies.sampled_from([0.05, 0.3, 0.5, 1.0])
    return Dpo(
        beta=draw(BETAS),
        label_smoothing=smoothing,
        robust=bool(smoothing) and draw(strategies.booleans()),
        length=draw(strategies.sampled_from(["sum", "mean"])),
        ld_alpha=draw(strategies.sampled_from([0.0, 0.3, 1.0])),
        divergence=divergence,
        divergence_alpha=draw(alphas) if divergence == "alpha" else None,
    )


@strategies.composite
def pairwise(draw: strategies.DrawFn) -> Any:
    """Any objective over pairs but DPO, with any settings."""
    kind = draw(strategies.sampled_from([Ipo, Hinge, ApoZero, ApoDown, Simpo, Orpo, Cpo]))
    settings: dict[str, Any] = {"beta": draw(BETAS)}
    if kind is Simpo:
        settings["gamma"] = draw(strategies.sampled_from([0.0, 0.5, 3.0]))
    if kind in (Simpo, Cpo):
        settings["label_smoothing"] = draw(SMOOTHING)
    return kind(**settings)


# -- pairs ---------------------------------------------------------------------------------------


@given(batches(), dpos())
def test_dpo_in_all_its_variants(batch: Batch, config: Dpo) -> None:
    check(batch, config)


@given(batches(most=3, longest=5, records=2), dpos())
def test_the_gradient_of_dpo_in_all_its_variants(batch: Batch, config: Dpo) -> None:
    check(batch, config, gradient=True)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2, "robust": True},
    "by length": {"length": "mean"},
    "length-desensitised": {"ld_alpha": 0.4},
    "none of the rest": {"ld_alpha": 0.0},
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "alpha": {"divergence": "alpha", "divergence_alpha": 0.4},
}
OTHERS = [Ipo(), Hinge(), ApoZero(), ApoDown(), Simpo(), Orpo(), Cpo()]
EVERY_PAIRWISE = {
    **{f"dpo {name}": Dpo(**settings) for name, settings in VARIANTS.items()},
    **{config.type: config for config in OTHERS},
}
every_pairwise = pytest.mark.parametrize("config", EVERY_PAIRWISE.values(), ids=EVERY_PAIRWISE)


@every_pairwise
@given(batch=batches(most=3, longest=6, records=2))
def test_each_objective_over_pairs(config: Any, batch: Batch) -> None:
    check(batch, config, gradient=True)


@given(batches(), pairwise())
def test_objectives_over_pairs_with_any_settings(batch: Batch, config: Any) -> None:
    check(batch, config)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.type)
def test_a_pair_by_hand(config: Any) -> None:
    """h is 2 and -1 by sum, 1 and -1 by token; log π is -2 and -2, by token -1 and -2."""
    batch = one_pair(Answer([-1.0, -1.0], [-2.0, -2.0]), Answer([-2.0], [-1.0]))
    p, q = math.exp(-1), math.exp(-2)
    odds = p / (1 - p) / (q / (1 - q))

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = {
        "ipo": (2 - 5) ** 2,
        "hinge": 1 - 0.1 * 3,
        "apo_zero": 1 - s(0.2) + s(-0.1),
        "apo_down": s(0.2) + 1 - s(0.3),
        "simpo": -math.log(s(2 * (-1 + 2) - 1)),
        "orpo": 0.1 * math.log(1 + 1 / odds),
        "cpo": math.log(2),
    }[config.type]
    assert by_code(batch, config, F64)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, -math.log(1 / (1 + math.exp(-0.3)))),
        ({"length": "mean"}, -math.log(1 / (1 + math.exp(-0.2)))),
        ({"ld_alpha": 0.5}, -math.log(1 / (1 + math.exp(-0.25)))),
        (
            {"divergence": "forward_kl"},
            -math.log(1 / (1 + math.exp(-0.1 * (math.exp(1) - math.exp(-2))))),
        ),
    ],
)
def test_dpo_by_hand(changes: dict[str, Any], expected: float) -> None:
    batch = one_pair(Answer([-1.0, -1.0], [-2.0, -2.0]), Answer([-2.0], [-1.0]))
    assert by_code(batch, Dpo(**changes), F64)[0] == pytest.approx(expected, rel=1e-9)


@given(batches(most=2, records=1, pairs="all"), strategies.sampled_from([0.05, 0.2, 0.45]))
def test_what_robust_estimates_is_unbiased(batch: Batch, noise: float) -> None:
    """Over labels that are turned round with the probability ε, its mean is the plain loss."""
    ((better, worse),) = batch.records[0].pairs
    turned = Batch([replace(batch.records[0], pairs=[(worse, better)])], batch.order)
    robust = Dpo(label_smoothing=noise, robust=True, beta=0.5)
    seen, wrong = (by_code(some, robust, F64)[0] for some in (batch, turned))
    mean = (1 - noise) * seen + noise * wrong
    assert mean == pytest.approx(by_code(batch, Dpo(beta=0.5), F64)[0], rel=1e-9)


@given(batches(most=3), dpos())
def test_a_policy_that_is_its_reference(batch: Batch, config: Dpo) -> None:
    """All margins are 0, whatever the lengths: log 2 for each pair."""
    for answer in answers_of(batch):
        answer.theirs = list(answer.ours)
    pairs = sum(len(record.pairs) for record in batch.records)
    for dtype in (F32, F64):
        assert by_code(batch, config, dtype)[0] == near(pairs * math.log(2), dtype)


@pytest.mark.parametrize("alpha", [1e-2, 1e-4, 1e-6])
@every_dtype
def test_alpha_near_0_is_reverse_kl(alpha: float, dtype: torch.dtype) -> None:
    batch = one_pair(Answer([-1.0, -0.5], [-1.5, -0.75]), Answer([-2.0], [-1.75]))
    config = Dpo(beta=1.0, divergence="alpha", divergence_alpha=alpha)
    assert by_code(batch, config, dtype)[0] == near(by_formula(batch, config), dtype)
    plain = by_code(batch, Dpo(beta=1.0), dtype)[0]
    assert by_code(batch, config, dtype)[0] == pytest.approx(plain, abs=alpha + 1e-4)


def test_alpha_of_1_is_forward_kl() -> None:
    batch = one_pair(Answer([-1.0, -0.5], [-1.5, -0.75]), Answer([-2.0], [-1.75]))
    alpha = by_code(batch, Dpo(divergence="alpha", divergence_alpha=1.0), F64)
    forward = by_code(batch, Dpo(divergence="forward_kl"), F64)
    assert alpha[0] == pytest.approx(forward[0])
    assert alpha[1] == pytest.approx(forward[1])


def test_what_an_answer_has_beyond_the_other_counts_less() -> None:
    """The third token of the better answer has a quarter of the gradient of its first two."""
    batch = one_pair(Answer([-1.0] * 3, [-1.0] * 3), Answer([-1.0] * 2, [-1.0] * 2))
    grad = by_code(batch, Dpo(ld_alpha=0.25, beta=2.0), F64)[1]
    assert grad == pytest.approx([-1.0, -1.0, -0.25, 1.0, 1.0])


@every_pairwise
@every_dtype
def test_nothing_to_compare(config: Any, dtype: torch.dtype) -> None:
    answers = [Answer([-1.0, -2.0], [-2.0, -1.0]), Answer([-3.0], [-1.0])]
    batch = Batch([Record(answers, [])], [(0, 0), (0, 1)])
    assert by_code(batch, config, dtype) == (0.0, [0.0, 0.0, 0.0])


# -- extremes ------------------------------------------------------------------------------------

SURE, HOPELESS = rounded(-1e-7), -300.0
EXTREMES = {
    "both sure": ([SURE] * 3, [-1.0] * 3, [SURE] * 2, [-2.0] * 2),
    "both hopeless": ([HOPELESS] * 3, [-1.0] * 3, [HOPELESS] * 12, [-2.0] * 12),
    "sure against hopeless": ([SURE] * 3, [HOPELESS] * 3, [HOPELESS] * 12, [SURE] * 12),
    "hopeless against sure": ([HOPELESS] * 12, [SURE] * 12, [SURE] * 3, [HOPELESS] * 3),
    "unmoved": ([SURE, HOPELESS], [SURE, HOPELESS], [HOPELESS], [HOPELESS]),
    "won by 500": ([-1.0], [-501.0], [-1.0], [-1.0]),
    "lost by 500": ([-501.0], [-1.0], [-1.0], [-1.0]),
    "both gone down by 500": ([-501.0], [-1.0], [-501.0], [-1.0]),
    "both gone up by 500": ([-1.0], [-501.0], [-1.0], [-501.0]),
    "the worse gone up by 500": ([-1.0], [-1.0], [-1.0], [-501.0]),
    "the worse gone down by 500": ([-1.0], [-1.0], [-501.0], [-1.0]),
}
"""Policy and reference on the better answer, then on the worse one."""
SETTINGS: dict[str, Any] = {
    **EVERY_PAIRWISE,
    "dpo beta 1": Dpo(beta=1.0),
    "dpo beta 1, smoothed": Dpo(beta=1.0, label_smoothing=0.1),
    "dpo beta 1, robust": Dpo(beta=1.0, label_smoothing=0.1, robust=True),
    "forward_kl by length": Dpo(divergence="forward_kl", length="mean"),
    "forward_kl, robust": Dpo(divergence="forward_kl", label_smoothing=0.1, robust=True),
    "alpha 1": Dpo(divergence="alpha", divergence_alpha=1.0),
    "alpha 0.01": Dpo(divergence="alpha", divergence_alpha=0.01),
    "hinge beta 1": Hinge(beta=1.0),
    "plackett_luce": PlackettLuce(),
    "plackett_luce beta 1": PlackettLuce(beta=1.0),
}


def extreme(name: str) -> Batch:
    ours, theirs, ours_too, theirs_too = (list(values) for values in EXTREMES[name])
    return one_pair(Answer(ours, theirs), Answer(ours_too, theirs_too))


every_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


@every_setting
@every_dtype
def test_extremes_are_finite(config: Any, dtype: torch.dtype) -> None:
    for name in EXTREMES:
        loss, grad = by_code(extreme(name), config, dtype)
        assert math.isfinite(loss), name
        assert all(map(math.isfinite, grad)), name


def explodes(batch: Batch, config: Any) -> bool:
    """Whether f' is beyond what fp32 can hold."""
    if getattr(config, "divergence", "") not in ("forward_kl", "alpha"):
        return False
    alpha = config.divergence_alpha or 1.0
    return any(-alpha * answer.h > 80 for answer in answers_of(batch))


@every_setting
@every_dtype
def test_extremes_by_the_formula(config: Any, dtype: torch.dtype) -> None:
    for name in EXTREMES:
        batch = extreme(name)
        if explodes(batch, config):
            continue  # only finite: see above
        loss, grad = by_code(batch, config, dtype)
        truth = float(by_formula(batch, config))
        # fp32 can't tell how far from 1 a probability is: of ORPO's odds it knows the magnitude.
        if config.type == "orpo" and dtype == F32 and SURE in batch.tensors(F64)[0].tolist():
            assert loss == pytest.approx(truth, rel=0.02, abs=1e-5), name
            continue
        assert loss == near(truth, dtype), name
        expected = slopes(batch, lambda some: by_formula(some, config))
        rel, least = (1e-7, 1e-10) if dtype == F64 else (1e-3, 1e-6)
        assert grad == pytest.approx(expected, rel=rel, abs=least), name


@pytest.mark.parametrize("size", [2.5e-7, 1e-6, 1e-4, 1e-2, 0.5, 0.69, 0.7, 1.0, 5.0, 30.0, 300.0])
@every_dtype
def test_odds_of_any_size(size: float, dtype: torch.dtype) -> None:
    """log(1 - exp(x)) from near 0 to far below, on either side of a pair."""
    plain, other = Answer([-1.0], [0.0]), Answer([rounded(-size)], [0.0])
    for batch in (one_pair(other, plain), one_pair(plain, other)):
        config = Orpo(beta=1.0)
        loss, grad = by_code(batch, config, dtype)
        assert loss == near(by_formula(batch, config), dtype)
        expected = slopes(batch, lambda some: by_formula(some, config))  # noqa: B023
        rel = 1e-7 if dtype == F64 else 1e-4
        assert grad == pytest.approx(expected, rel=rel, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, -1e-12, -1e-8, -1e-7])
def test_odds_of_what_is_certain_are_finite(value: float) -> None:
    for pair in ((value, -1.0), (-1.0, value), (value, value)):
        batch = one_pair(*(Answer([rounded(one)], [0.0]) for one in pair))
        loss, grad = by_code(batch, Orpo(), F32)
        assert math.isfinite(loss) and all(map(math.isfinite, grad))
        if pair[0] == pair[1]:
            assert loss == pytest.approx(0.1 * math.log(2))


# -- rankings ------------------------------------------------------------------------------------


@given(batches(pairs="all"), BETAS)
def test_plackett_luce(batch: Batch, beta: float) -> None:
    check(batch, PlackettLuce(beta=beta))


@given(batches(pairs="all", longest=4, records=2), BETAS)
def test_the_gradient_of_plackett_luce(batch: Batch, beta: float) -> None:
    check(batch, PlackettLuce(beta=beta), gradient=True)


@given(batches(pairs="all", most=2), BETAS)
def test_a_ranking_of_two_is_dpo(batch: Batch, beta: float) -> None:
    ranking, pairs = (by_code(batch, kind(beta=beta), F64) for kind in (PlackettLuce, Dpo))
    assert ranking[0] == pytest.approx(pairs[0], rel=1e-10)
    assert ranking[1] == pytest.approx(pairs[1], rel=1e-10)


def test_rankings_by_hand() -> None:
    """Three answers whose rewards are log 4, log 2 and log 1: 4/7 · 2/3."""
    answers = [Answer([math.log(n) - 9.0], [-9.0]) for n in (1, 4, 2)]
    batch = Batch([Record(answers, [(1, 2), (1, 0), (2, 0)])], [(0, 0), (0, 1), (0, 2)])
    loss, _ = by_code(batch, PlackettLuce(beta=1.0), F64)
    assert loss == pytest.approx(-math.log(4 / 7 * 2 / 3))


@given(
    batches(pairs="all"),
    strategies.randoms(use_true_random=False),
    strategies.sampled_from([PlackettLuce(beta=0.5), Dpo(beta=0.5), Ipo(), Orpo()]),
)
def test_the_order_in_which_answers_stand_is_no_matter(
    batch: Batch, rng: random.Random, config: Any
) -> None:
    order = list(batch.order)
    rng.shuffle(order)
    other = Batch(batch.records, order)
    (loss, grad), (again, grad_too) = (by_code(some, config, F64) for some in (batch, other))
    assert loss == pytest.approx(again, rel=1e-10)
    split = [by_place(some, each) for some, each in ((batch, grad), (other, grad_too))]
    for place, mine in split[0].items():
        assert mine == pytest.approx(split[1][place], rel=1e-9, abs=1e-13)


def by_place(batch: Batch, grad: list[float]) -> dict[Place, list[float]]:
    found: dict[Place, list[float]] = {}
    start = 0
    for place in batch.order:
        end = start + len(batch.at(place).ours)
        found[place], start = grad[start:end], end
    return found


@pytest.mark.parametrize("margin", [500.0, -500.0])
@every_dtype
def test_rankings_with_large_margins(margin: float, dtype: torch.dtype) -> None:
    rewards = [margin, 0.0, -margin, 2 * margin]
    answers = [Answer([-2000.0 + reward], [-2000.0]) for reward in rewards]
    record = Record(answers, [(3, 0), (3, 1), (3, 2), (0, 1), (0, 2), (1, 2)])
    batch = Batch([record], [(0, 2), (0, 0), (0, 3), (0, 1)])
    loss, grad = by_code(batch, PlackettLuce(beta=1.0), dtype)
    best_first = [2 * margin, margin, 0.0, -margin]
    largest = sum(max(best_first[k:]) - best_first[k] for k in range(4))
    assert loss == pytest.approx(largest, rel=1e-6, abs=1e-6)
    expected = slopes(batch, lambda some: by_formula(some, PlackettLuce(beta=1.0)))
    assert grad == pytest.approx(expected, rel=1e-4, abs=1e-5)


# -- answers without a partner -------------------------------------------------------------------


@strategies.composite
def ktos(draw: strategies.DrawFn) -> Kto:
    weights = strategies.sampled_from([0.0, 0.3, 1.0, 1.33])
    return Kto(beta=draw(BETAS), desirable_weight=draw(weights), undesirable_weight=draw(weights))


ZEROS = strategies.sampled_from([0.0, 0.125, 2.5, 40.0])


@given(batches(pairs="none"), ktos(), ZEROS, strategies.sampled_from(["mixed", "good", "bad"]))
def test_kto(batch: Batch, config: Kto, z: float, labels: str) -> None:
    for answer in answers_of(batch):
        answer.good = {"mixed": answer.good, "good": True, "bad": False}[labels]
    check(batch, config, z)


@given(batches(pairs="none", longest=4, records=2), ktos(), ZEROS)
def test_the_gradient_of_kto(batch: Batch, config: Kto, z: float) -> None:
    check(batch, config, z, gradient=True)


@given(batches(pairs="all", most=3), ktos(), ZEROS)
def test_kto_takes_the_answers_of_pairs_one_by_one(batch: Batch, config: Kto, z: float) -> None:
    for record in batch.records:
        for number, answer in enumerate(record.answers):
            answer.good = any(number == better for better, _ in record.pairs)
    check(batch, config, z)


def test_kto_by_hand() -> None:
    """h is 1 for the good one and for the bad one, z is 3, beta 0.5: σ(-1) and σ(1)."""
    good, bad = Answer([-1.0, -1.0], [-1.5, -1.5], True), Answer([-2.0], [-3.0], False)
    batch = Batch([Record([good], []), Record([bad], [])], [(0, 0), (1, 0)])
    config = Kto(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    lower = 1 / (1 + math.exp(1))
    expected = 2 * (1 - lower) + 3 * lower
    assert by_code(batch, config, F64, 3.0)[0] == pytest.approx(expected)


@pytest.mark.parametrize("z", [0.0, 500.0])
@pytest.mark.parametrize("h", [-3600.0, -500.0, 500.0, 3600.0])
@every_dtype
def test_extremes_of_kto(h: float, z: float, dtype: torch.dtype) -> None:
    ours, theirs = (-1.0, -1.0 - h) if h > 0 else (-1.0 + h, -1.0)
    answers = [Answer([ours], [theirs], good) for good in (True, False)]
    batch = Batch([Record([answer], []) for answer in answers], [(0, 0), (1, 0)])
    for config in (Kto(), Kto(beta=1.0)):
        loss, grad = by_code(batch, config, dtype, z)
        assert loss == near(by_formula(batch, config, z), dtype)
        expected = slopes(batch, lambda some: by_formula(some, config, z))  # noqa: B023
        assert grad == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_baseline_has_no_gradient_of_its_own() -> None:
    ours = [torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-2.0])]
    theirs = [torch.tensor([-2.0, -3.0]), torch.tensor([-1.0])]
    z = baseline(ours, theirs)
    assert not z.requires_grad
    assert float(z) == 1.0  # of 3 and -1


@pytest.mark.parametrize(("moved", "z"), [([], 0.0), ([-4.0, 1.0], 0.0), ([4.0, -1.0], 1.5)])
def test_a_baseline_is_a_mean_and_not_below_0(moved: list[float], z: float) -> None:
    ours = [torch.tensor([-9.0 + by, -1.0]) for by in moved]
    theirs = [torch.tensor([-9.0, -1.0]) for _ in moved]
    assert float(baseline(ours, theirs)) == z


# -- the best answers, and combinations ----------------------------------------------------------


def nll_of_best(batch: Batch) -> Real:
    return -mp.fsum(p for record in records_of(batch) for a in record.best for p in a.ours)


@given(batches(), DTYPES)
def test_the_term_of_best_answers(batch: Batch, dtype: torch.dtype) -> None:
    ours, _ = batch.tensors(dtype)
    ours.requires_grad_()
    loss, metrics = best_answers(ours, None, layout_of(batch.sequences), None)
    assert float(loss.detach()) == near(nll_of_best(batch), dtype)
    assert metrics == {}
    loss.backward()
    best = [id(answer) for record in batch.records for answer in record.best]
    expected = [-float(id(answer) in best) for answer in answers_of(batch) for _ in answer.ours]
    assert ours.grad is not None and ours.grad.tolist() == expected


def test_the_best_of_a_partial_order() -> None:
    """1 and 2 are beaten by none; 0 is both better and worse; 3 and 4 are worse; 5 is neither."""
    answers = [Answer([-float(2**n)], [0.0]) for n in range(6)]
    record = Record(answers, [(1, 0), (0, 3), (2, 4)])
    batch = Batch([record], [(0, n) for n in range(6)])
    ours, _ = batch.tensors(F32)
    assert float(best_answers(ours, None, layout_of(batch.sequences), None)[0]) == 2 + 4


def by_hand_totals(batch: Batch) -> Totals:
    records = records_of(batch)
    return Totals(
        targets=sum(len(answer.ours) for answer in answers_of(batch)),
        best=sum(len(answer.ours) for record in records for answer in record.best),
        pairs=sum(len(record.pairs) for record in records),
        answers=len(batch.order),
        rankings=sum(bool(record.pairs) for record in records),
    )


def loss_by_code(
    batch: Batch, objectives: list[Any], totals: Totals | None = None, z: float = 1.0
) -> tuple[float, Tensor]:
    """A batch's share of the loss of a step, in float64, and its gradient."""
    ours, theirs = batch.tensors(F64)
    ours.requires_grad_()
    layout = layout_of(batch.sequences, baseline=torch.tensor(z, dtype=F64))
    totals = totals or totals_of(batch.sequences)
    loss, metrics = loss_of(terms_of(objectives), ours, theirs, layout, totals)
    assert metrics == {}
    loss.requires_grad_()
    loss.backward()
    return float(loss.detach()), torch.zeros_like(ours) if ours.grad is None else ours.grad


@given(
    batches(),
    strategies.lists(dpos() | pairwise(), min_size=1, max_size=3),
    strategies.lists(strategies.sampled_from([0.1, 1.0, 2.5]), min_size=4, max_size=4),
    strategies.sampled_from([0.0, 0.5, 2.0]),
    strategies.booleans(),
)
def test_terms_add_up_by_their_weights(
    batch: Batch, objectives: list[Any], weights: list[float], sft_weight: float, sft: bool
) -> None:
    objectives = [
        config.model_copy(update={"weight": weight, "sft_weight": sft_weight})
        for config, weight in zip(objectives, weights, strict=False)
    ]
    totals = by_hand_totals(batch)
    assume(totals.pairs)
    nll = nll_of_best(batch) / totals.best
    expected = mp.mpf(0)
    for config in objectives:
        expected += config.weight * (by_formula(batch, config) / totals.pairs + sft_weight * nll)
    if sft:
        objectives.append(Sft(weight=weights[3]))
        expected += weights[3] * nll
    assert loss_by_code(batch, objectives)[0] == near(expected, F64)


@given(batches(pairs="all"), strategies.sampled_from([0.0, 0.5]))
def test_a_ranking_is_divided_by_rankings(batch: Batch, sft_weight: float) -> None:
    config = PlackettLuce(weight=3.0, sft_weight=sft_weight, beta=0.5)
    nll = nll_of_best(batch) / by_hand_totals(batch).best
    expected = 3 * (by_formula(batch, config) / len(batch.records) + sft_weight * nll)
    assert loss_by_code(batch, [config])[0] == near(expected, F64)


@given(batches(pairs="none"), strategies.booleans())
def test_kto_is_divided_by_answers_and_sft_by_the_targets_of_good_ones(
    batch: Batch, sft: bool
) -> None:
    config = Kto(weight=2.0, beta=0.5)
    expected = 2 * by_formula(batch, config, 1.0) / len(batch.order)
    if sft and (targets := by_hand_totals(batch).best):
        expected += nll_of_best(batch) / targets / 2
    objectives = [config, Sft(weight=0.5)] if sft else [config]
    assert loss_by_code(batch, objectives)[0] == near(expected, F64)


@pytest.mark.parametrize(
    ("config", "added"), [(Orpo(), 1.0), (Cpo(), 1.0), (Dpo(), 0.0), (Simpo(), 0.0), (Ipo(), 0.0)]
)
def test_what_orpo_and_cpo_contain(config: Any, added: float) -> None:
    """The likelihood of the better answer, by its 2 tokens; for the others, only if asked for."""
    batch = one_pair(Answer([-1.0, -2.0], [-1.0, -1.0]), Answer([-4.0], [-3.0]))
    expected = float(by_formula(batch, config)) + added * 1.5
    assert loss_by_code(batch, [config])[0] == pytest.approx(expected)


@given(batches(pairs="none"))
def test_sft_alone_takes_all_targets(batch: Batch) -> None:
    total = -mp.fsum(p for answer in answers_of(batch) for p in answer.ours)
    expected = total / by_hand_totals(batch).targets
    assert loss_by_code(batch, [Sft()])[0] == near(expected, F64)


def test_a_function_of_ones_own_replaces_the_first() -> None:
    """What is divided by stays, and so does the likelihood; what it tells is divided as well."""

    def mine(
        logps: Tensor, reference: Tensor | None, layout: Layout, config: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert reference is not None and config.type == "dpo"
        told = {"seen": torch.tensor(float(len(layout.pairs)), requires_grad=True)}
        return (logps**2).sum(), told

    answers = [Answer([-1.0], [-1.0]), Answer([-2.0], [-1.0]), Answer([-3.0], [-2.0])]
    batch = Batch([Record(answers, [(0, 1), (0, 2)])], [(0, 0), (0, 1), (0, 2)])
    ours, theirs = batch.tensors(F32)
    terms = terms_of([Dpo(weight=2.0, sft_weight=0.5), Sft(weight=3.0)], mine)
    totals = totals_of(batch.sequences) + totals_of(batch.sequences)
    loss, metrics = loss_of(terms, ours, theirs, layout_of(batch.sequences), totals)
    assert float(loss.detach()) == pytest.approx(2 * (14 / 4 + 0.5 * 1 / 2) + 3 * 1 / 2)
    assert {name: float(value) for name, value in metrics.items()} == {"seen": 0.5}
    assert not metrics["seen"].requires_grad


def test_a_step_without_pairs_has_the_loss_of_what_is_left() -> None:
    batch = Batch([Record([Answer([-1.0, -3.0], [-1.0, -1.0], good=True)], [])], [(0, 0)])
    assert loss_by_code(batch, [Dpo()]) == (0.0, pytest.approx(torch.zeros(2)))
    assert loss_by_code(batch, [Dpo(sft_weight=0.5), Ipo()])[0] == pytest.approx(1.0)


COMBINED = [
    [Dpo(sft_weight=0.5), Simpo(weight=0.3), Sft(weight=2.0)],
    [Orpo()],
    [Dpo(ld_alpha=0.5, length="mean"), Ipo(weight=0.1)],
    [PlackettLuce(sft_weight=1.0), Hinge()],
    [Kto(), Sft()],
]


@pytest.mark.parametrize("objectives", COMBINED, ids=lambda some: "+".join(c.type for c in some))
@given(batch=batches(pairs="all"), data=strategies.data())
def test_the_loss_of_a_step_is_the_sum_of_its_micro_batches(
    objectives: list[Any], batch: Batch, data: strategies.DataObject
) -> None:
    """However its records are cut; the gradients are those of the whole as well."""
    cut = [data.draw(strategies.integers(0, 2)) for _ in batch.records]
    parts = [[n for n, mine in enumerate(cut) if mine == part] for part in range(3)]
    parts = [part for part in parts if part]
    totals = totals_of(batch.sequences)
    loss, grad = loss_by_code(batch, objectives)
    shares = [loss_by_code(batch.of(part), objectives, totals) for part in parts]
    assert sum(share for share, _ in shares) == pytest.approx(loss, rel=1e-10, abs=1e-13)
    whole = by_place(batch, grad.tolist())
    for part, (_, share) in zip(parts, shares, strict=True):
        for place, mine in by_place(batch.of(part), share.tolist()).items():
            assert mine == pytest.approx(whole[place], rel=1e-9, abs=1e-13)


# -- the layout ----------------------------------------------------------------------------------


def three_answers() -> list[st.Sequence]:
    """Record 5: answer 2 over 0 and 1, 0 over 1. Record 9: a good one alone. They interleave."""
    mask = [False, False, True, True]
    return [
        st.Sequence([1, 2, 3, 4], mask, 1.0, 5, "chosen", 0, (1,)),
        st.Sequence([1, 7, 8], [False, True, False], 0.5, 9, "chosen", 0),
        st.Sequence([1, 2, 4, 4], mask, 2.0, 5, "rejected", 1),
        st.Sequence([1, 2, 5], [False, True, True], 1.0, 5, "chosen", 2, (0, 1)),
    ]


def test_a_layout_by_hand() -> None:
    layout = layout_of(three_answers())
    assert layout.sequence.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert layout.weight.tolist() == [1, 1, 0.5, 2, 2, 1, 1]
    assert layout.weight.dtype == F32
    assert layout.record.tolist() == [5, 9, 5, 5]
    assert layout.chosen.tolist() == [True, True, False, True]
    assert sorted(layout.pairs.tolist()) == [[0, 2], [3, 0], [3, 2]]
    assert layout.baseline is None
    assert layout.length.tolist() == [2, 1, 2, 2]
    assert layout.best.tolist() == [False, True, False, True]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    assert layout.sums(values).tolist() == [3, 4, 24, 96]
    assert layout.means(values).tolist() == [1.5, 4, 12, 48]


def test_pairs_of_which_one_is_missing_are_none() -> None:
    first, _, second, _ = three_answers()
    assert layout_of([second, first]).pairs.tolist() == [[1, 0]]
    assert layout_of([first]).pairs.shape == (0, 2)
    assert layout_of([second]).best.tolist() == [False]
    assert totals_of([first]).rankings == 0


def test_answers_of_the_same_number_in_other_records_are_no_partners() -> None:
    better = st.Sequence([1, 2], [False, True], 1.0, 0, "chosen", 0, (1,))
    other = st.Sequence([1, 3], [False, True], 1.0, 1, "rejected", 1)
    assert layout_of([better, other]).pairs.tolist() == []


def test_a_sequence_without_targets() -> None:
    empty = st.Sequence([1, 2], [False, False], 1.0, 0, "rejected", 1)
    layout = layout_of([three_answers()[1], empty])
    assert layout.length.tolist() == [1, 0]
    assert layout.means(torch.tensor([-3.0])).tolist() == [-3.0, 0.0]


def test_totals_by_hand() -> None:
    totals = totals_of(three_answers())
    assert totals == Totals(targets=8.5, best=3, pairs=3, answers=4, rankings=1)
    assert totals + Totals(1, 2, 3, 4, 5) == Totals(9.5, 5, 6, 8, 6)


@given(batches())
def test_totals_of_any(batch: Batch) -> None:
    totals = totals_of(batch.sequences)
    assert totals == by_hand_totals(batch)
    numbers = range(len(batch.records))
    parts = [totals_of(batch.of([number]).sequences) for number in numbers]
    for field in fields(Totals):
        together = sum(getattr(part, field.name) for part in parts)
        assert getattr(totals, field.name) == together


def test_each_objective_is_divided_by_what_it_sums_over() -> None:
    per = {name: field for name, (_, field) in OBJECTIVES.items()}
    assert per == {
        "sft": "targets",
        "plackett_luce": "rankings",
        "kto": "answers",
        **dict.fromkeys(PAIR, "pairs"),
    }


# -- what is told --------------------------------------------------------------------------------


def hand_batch() -> Batch:
    """Record 0: the better answer has Σ log π = -3 (h = 1), the worse -4 (h = 1). Record 1: two
    tokens of -4 (h = -2) against three of -6 (h = 3)."""
    first = Record([Answer([-1.0, -2.0], [-2.0, -2.0]), Answer([-4.0], [-5.0])], [(0, 1)])
    second = Record(
        [Answer([-2.0, -2.0], [-1.0, -1.0]), Answer([-1.0, -2.0, -3.0], [-2.0, -3.0, -4.0])],
        [(0, 1)],
    )
    return Batch([first, second], [(0, 0), (0, 1), (1, 0), (1, 1)])


def told_of(
    batch: Batch, config: Any, of: list[bool] | None = None, reference: bool = True
) -> dict[str, float]:
    ours, theirs = batch.tensors(F64)
    chosen = None if of is None else torch.tensor(of)
    layout = layout_of(batch.sequences)
    return preference_metrics(
        ours.requires_grad_(), theirs if reference else None, layout, config, chosen
    )


def k3(batch: Batch) -> float:
    """r - 1 - log r with r = ρ/π, by token."""
    values = [
        math.exp(r - p) - 1 - (r - p)
        for answer in answers_of(batch)
        for p, r in zip(answer.ours, answer.theirs, strict=True)
    ]
    return math.fsum(values) / len(values)


def test_preference_metrics_by_hand() -> None:
    batch = hand_batch()
    told = told_of(batch, Dpo(beta=0.5))
    assert told == pytest.approx(
        {
            "rewards_chosen": 0.5 * (1 - 2) / 2,
            "rewards_rejected": 0.5 * (1 + 3) / 2,
            "rewards_margin": 0.5 * (0 - 5) / 2,
            "rewards_accuracy": (0.5 + 0) / 2,  # the first is a tie
            "logps_chosen": (-3 - 4) / 2,
            "logps_rejected": (-4 - 6) / 2,
            "logps_accuracy": 1.0,
            "mean_logps_accuracy": (1 + 0.5) / 2,  # -1.5 > -4, and -2 = -2
            "length_difference": (1 - 1) / 2,
            "kl": k3(batch),
        }
    )


def test_preference_metrics_of_some_answers() -> None:
    batch = hand_batch()
    told = told_of(batch, Dpo(beta=0.5), [False, False, True, True])
    assert told == pytest.approx(
        {
            "rewards_chosen": -1.0,
            "rewards_rejected": 1.5,
            "rewards_margin": -2.5,
            "rewards_accuracy": 0.0,
            "logps_chosen": -4.0,
            "logps_rejected": -6.0,
            "logps_accuracy": 1.0,
            "mean_logps_accuracy": 0.5,
            "length_difference": -1.0,
            "kl": k3(batch.of([1])),
        }
    )


def test_preference_metrics_without_a_reference() -> None:
    told = told_of(hand_batch(), Cpo(beta=0.5), reference=False)
    assert "kl" not in told
    assert told["rewards_chosen"] == 0.5 * told["logps_chosen"] == pytest.approx(-1.75)
    assert told["rewards_margin"] == pytest.approx(0.5 * (1 + 2) / 2)
    assert told["rewards_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("config", "reference", "chosen", "rejected"),
    [
        (Dpo(beta=0.5, length="mean"), True, 0.5 * (0.5 - 1) / 2, 0.5 * (1 + 1) / 2),
        (Ipo(beta=0.5), True, 0.5 * (0.5 - 1) / 2, 0.5 * (1 + 1) / 2),
        (Simpo(beta=2.0), False, 2 * (-1.5 - 2) / 2, 2 * (-4 - 2) / 2),
        (Orpo(beta=0.5), False, 0.5 * (-1.5 - 2) / 2, 0.5 * (-4 - 2) / 2),
        (Hinge(beta=0.5), True, 0.5 * (1 - 2) / 2, 0.5 * (1 + 3) / 2),
        (PlackettLuce(beta=0.5), True, 0.5 * (1 - 2) / 2, 0.5 * (1 + 3) / 2),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_rewards_are_those_of_the_objective(
    config: Any, reference: bool, chosen: float, rejected: float
) -> None:
    told = told_of(hand_batch(), config, reference=reference)
    assert told["rewards_chosen"] == pytest.approx(chosen)
    assert told["rewards_rejected"] == pytest.approx(rejected)


def test_what_there_is_nothing_of_is_left_out() -> None:
    good = Batch([Record([Answer([-1.0], [-2.0], good=True)], [])], [(0, 0)])
    assert told_of(good, Kto()).keys() == {"rewards_chosen", "logps_chosen", "kl"}
    bad = Batch([Record([Answer([-1.0], [-2.0])], [])], [(0, 0)])
    assert told_of(bad, Kto(), reference=False).keys() == {"rewards_rejected", "logps_rejected"}
    assert told_of(hand_batch(), Dpo(), [False] * 4) == {}


@given(batches(), strategies.randoms(use_true_random=False))
def test_preference_metrics_of_any(batch: Batch, rng: random.Random) -> None:
    """Of any records, by loops over answers and pairs."""
    kept = [number for number in range(len(batch.records)) if rng.random() < 0.7]
    told = told_of(batch, Dpo(beta=0.5), [number in kept for number, _ in batch.order])
    records = [batch.records[number] for number in kept]
    pairs = [(r.answers[b], r.answers[w]) for r in records for b, w in r.pairs]
    better = [r.answers[b] for r in records for b in sorted({b for b, _ in r.pairs})]
    worse = [a for r in records for a in r.answers if not any(a is b for b in better)]

    def mean(values: list[Real]) -> float | None:
        return float(mp.fsum(values) / len(values)) if values else None

    def wins(values: list[Real]) -> float | None:
        return mean([1 if value > 0 else 0.5 if value == 0 else 0 for value in values])

    expected = {
        "rewards_chosen": mean([a.h / 2 for a in better]),
        "rewards_rejected": mean([a.h / 2 for a in worse]),
        "rewards_margin": mean([(y.h - z.h) / 2 for y, z in pairs]),
        "rewards_accuracy": wins([y.h - z.h for y, z in pairs]),
        "logps_chosen": mean([mp.fsum(a.ours) for a in better]),
        "logps_rejected": mean([mp.fsum(a.ours) for a in worse]),
        "logps_accuracy": wins([mp.fsum(y.ours) - mp.fsum(z.ours) for y, z in pairs]),
        "mean_logps_accuracy": wins([y.mean - z.mean for y, z in pairs]),
        "length_difference": mean([len(y.ours) - len(z.ours) for y, z in pairs]),
        "kl": k3(batch.of(kept)) if kept else None,
    }
    assert told == pytest.approx({k: v for k, v in expected.items() if v is not None}, rel=1e-6)


@given(batches(), strategies.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 1.0]), DTYPES)
def test_the_divergence_is_not_below_0(batch: Batch, moved: float, dtype: torch.dtype) -> None:
    ours, theirs = batch.tensors(dtype)
    theirs = ours + moved * (theirs - ours)
    told = preference_metrics(ours, theirs, layout_of(batch.sequences), Dpo())
    assert told["kl"] >= 0
    if not moved:
        assert told["kl"] == told["rewards_rejected"] == 0
    if moved == 1.0:
        assert told["kl"] == pytest.approx(k3(batch), rel=1e-3)


def test_what_is_told_of_a_large_divergence_is_json() -> None:
    """A token that fell by 100: its estimate is e^99."""
    batch = one_pair(Answer([-1.0], [-1.0]), Answer([-101.0], [-1.0]))
    ours, theirs = batch.tensors(F32)
    told = preference_metrics(ours, theirs, layout_of(batch.sequences), Dpo())
    assert all(map(math.isfinite, told.values())), told


# -- answers beside other prompts ----------------------------------------------------------------


def shown(sequences: list[st.Sequence]) -> list[tuple[list[int], list[bool], int]]:
    return [(s.input_ids.tolist(), s.is_target.tolist(), s.record) for s in sequences]


def test_each_prompt_with_the_answers_of_the_record_before() -> None:
    sequences = [
        st.Sequence([1, 2, 3, 4, 9], [False, False, True, True, True], record=4, role="chosen"),
        st.Sequence([1, 2, 5, 9], [False, False, True, True], record=4, answer=1),
        st.Sequence([7, 3, 9], [False, True, True], record=2, role="chosen", preferred_to=(1,)),
        st.Sequence([8, 8, 8, 6, 0, 9], [False] * 3 + [True, False, True], record=3),
    ]
    assert shown(mismatched(sequences)) == [
        ([1, 2, 6, 0, 9], [False, False, True, False, True], 4),
        ([7, 3, 4, 9], [False, True, True, True], 2),
        ([7, 5, 9], [False, True, True], 2),
        ([8, 8, 8, 3, 9], [False, False, False, True, True], 3),
    ]


def test_equal_prompts_give_none() -> None:
    def one(prompt: list[int], answer: int, record: int) -> st.Sequence:
        return st.Sequence([*prompt, answer], [False] * len(prompt) + [True], record=record)

    assert mismatched([one([1, 2], 3, 0)]) == []
    assert mismatched([one([1, 2], 3, 0), one([1, 2], 4, 1)]) == []
    found = mismatched([one([1, 2], 3, 0), one([1, 2], 4, 1), one([5], 6, 2)])
    assert shown(found) == [([1, 2, 6], [False, False, True], 0), ([5, 4], [False, True], 2)]


@strategies.composite
def prompted(draw: strategies.DrawFn) -> list[tuple[list[int], list[list[int]]]]:
    """Records: a prompt and some answers. Few tokens, so that prompts repeat and begin alike."""
    tokens = strategies.lists(strategies.integers(0, 2), min_size=1, max_size=3)
    records = strategies.tuples(tokens, strategies.lists(tokens, min_size=1, max_size=3))
    return draw(strategies.lists(records, min_size=1, max_size=5))


@given(prompted())
def test_prompts_and_answers_of_any(records: list[tuple[list[int], list[list[int]]]]) -> None:
    sequences = [
        st.Sequence(prompt + answer, [False] * len(prompt) + [True] * len(answer), record=50 - n)
        for n, (prompt, answers) in enumerate(records)
        for answer in answers
    ]
    expected = [
        (prompt + answer, [False] * len(prompt) + [True] * len(answer), 50 - n)
        for n, (prompt, _) in enumerate(records)
        for other, answers in (records[n - 1],)
        for answer in answers
        if other != prompt
    ]
    assert shown(mismatched(sequences)) == expected
