"""Margin histograms that add up, ROC, rules for the operating point, Confusion, calibration, FROC, intervals.

Pure NumPy. A margin is log p/(1-p) of one class against the rest, float32. Its bin is the
top 16 bits of the ordered float32 (sign, exponent, 7 bits of mantissa), so there are
65,536 bins, about 128 per factor of two; counts are integers and add up in any order, and
thresholds that rules fit are bins' edges, so counts at them are exact.

Positive means score >= threshold throughout.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
import numpy.typing as npt

BINS = 65_536
LOWEST_BIN, HIGHEST_BIN = 0x007F, 0xFF80
"""The bins of -inf and +inf; what lies beyond is NaN."""

MIN_PATIENTS = 5
"""Below this many patients no interval is given: resampling so few says nothing about others."""

MIN_SIDE = 2
"""Nor is one where fewer patients than this have positives, or negatives: resampling cannot vary what is of one."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Margins = npt.NDArray[np.float32]
Interval = tuple[float, float]


def probability(margins: Margins) -> Margins:
    """Return the sigmoid of margins, float32; without overflow for any margin."""
    with np.errstate(under="ignore"):
        small = np.exp(-np.abs(margins.astype(np.float64)))
        p: Margins = (np.where(margins >= 0, 1.0, small) / (1 + small)).astype(np.float32)
    return np.where(np.isnan(margins), np.float32(np.nan), p)


def margin_of(p: float) -> float:
    """Return the smallest float32 margin whose `probability` is at least `p` as a float32; -inf where all are.

    So a margin is at least this exactly when the probability that is stored and exported is at least `p`.
    """

    def called(key: int) -> bool:
        return bool(probability(np.array([_float(key)]))[0] >= np.float32(p))

    keys = range(-_INFINITY, _INFINITY + 1)
    return float(_float(keys[bisect_left(keys, True, key=called)]))


_INFINITY = 0x7F800000


def _float(key: int) -> np.float32:
    """The float32 of these bits, negative ones mirrored, so that floats and keys rise together."""
    value: np.float32 = np.uint32(abs(key)).view(np.float32)
    return value if key >= 0 else -value


# histograms


def bin_of(margins: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Return the bin of each margin, uint16, same shape; larger margins never have smaller bins.

    -0.0 counts as 0.0, the infinities have bins of their own. Raises ValueError for NaN.

    >>> bin_of([-1.0, -0.0, 0.0, 1.0]).tolist()
    [16511, 32768, 32768, 49024]
    """
    values = np.asarray(margins, np.float32) + np.float32(0)  # -0.0 + 0.0 is 0.0
    if np.isnan(values).any():
        raise ValueError(f"{np.count_nonzero(np.isnan(values))} of {values.size} margins are NaN.")
    signed = values.view(np.int32) >> 16
    # Positive floats order like their bits; negative ones the other way round, below them.
    return ((signed ^ ((signed >> 31) & 0x7FFF)) + 0x8000).astype(np.uint16)


def edge_of(bins: npt.ArrayLike) -> Margins:
    """Return the smallest float32 in each bin, so that score >= edge_of(b) exactly when bin_of(score) >= b.

    Raises ValueError for a bin that holds no number.

    >>> float(edge_of(32768)), float(edge_of(bin_of([1.0]))[0])
    (0.0, 1.0)
    """
    index = np.asarray(bins, np.int64)
    if ((index < LOWEST_BIN) | (index > HIGHEST_BIN)).any():
        raise ValueError(f"bins lie between {LOWEST_BIN} and {HIGHEST_BIN}.")
    ordered = (index << 16).astype(np.uint32)
    bits = np.where(index >= 0x8000, ordered ^ np.uint32(0x80000000), ~ordered)
    edges = bits.astype(np.uint32).view(np.float32)
    return np.where(index == LOWEST_BIN, np.float32(-np.inf), edges).astype(np.float32)


def histogram(margins: npt.ArrayLike) -> Ints:
    """Return how many margins lie in each bin, int64 (65536,). Histograms add up. Raises ValueError for NaN."""
    return np.bincount(bin_of(margins).ravel(), minlength=BINS).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Sparse:
    """The occupied bins of a histogram: bins uint16 (n,), rising, and their counts int64 (n,), all above 0.

    Of `ranked` scores the bins are ranks, uint32.
    """

    bins: npt.NDArray[np.uint16 | np.uint32]
    counts: Ints

    @classmethod
    def of(cls, margins: npt.ArrayLike) -> Self:
        """Count margins."""
        return cls.from_dense(histogram(margins))

    @classmethod
    def from_dense(cls, counts: Ints) -> Self:
        """Keep the occupied bins of a histogram of 65,536."""
        occupied = np.flatnonzero(counts)
        return cls(occupied.astype(np.uint16), counts[occupied])

    @classmethod
    def empty(cls) -> Self:
        """Count nothing."""
        return cls(np.empty(0, np.uint16), np.empty(0, np.int64))

    @property
    def total(self) -> int:
        """How many margins were counted."""
        return int(self.counts.sum())

    def dense(self) -> Ints:
        """Return all 65,536 counts."""
        out = np.zeros(BINS, np.int64)
        out[self.bins] = self.counts
        return out

    def at_least(self, threshold: float) -> int:
        """Return how many margins are >= `threshold`, which must be a bin's edge."""
        return int(self.counts[self.bins >= _edge_bin(threshold)].sum())

    def __add__(self, other: Self) -> Self:
        both = np.concatenate([self.bins, other.bins])
        bins, place = np.unique(both, return_inverse=True)
        counts = np.zeros(len(bins), np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, other.counts]))
        return type(self)(bins, counts)


def together(histograms: Iterable[Sparse]) -> Ints:
    """Return the sum of histograms, all 65,536 counts."""
    out = np.zeros(BINS, np.int64)
    for one in histograms:
        out[one.bins] += one.counts
    return out


def _edge_bin(threshold: float) -> int:
    found = int(bin_of([threshold])[0])
    if float(edge_of(found)) != threshold:
        raise ValueError(f"The threshold {threshold} is no bin's edge, so counts at it would not be exact.")
    return found


# ROC


@dataclass(frozen=True, eq=False)
class Roc:
    """Counts at every occupied threshold, from the highest down; all arrays have one entry per threshold.

    thresholds : float32; tp, fp : int64; positives, negatives : the totals.
    """

    thresholds: Margins
    tp: Ints
    fp: Ints
    positives: int
    negatives: int

    @property
    def tpr(self) -> Floats:
        """Sensitivity at each threshold; NaN without positives."""
        return _share(self.tp, self.positives)

    @property
    def fpr(self) -> Floats:
        """1 - specificity at each threshold; NaN without negatives."""
        return _share(self.fp, self.negatives)

    @property
    def precision(self) -> Floats:
        """Share of the called that are positive, at each threshold."""
        return self.tp / (self.tp + self.fp)

    @property
    def average_precision(self) -> float:
        """Sum over thresholds of precision times the gain in recall; NaN without positives."""
        if not self.positives:
            return math.nan
        gain = np.diff(self.tp, prepend=0) / self.positives
        return float(gain @ self.precision)

    def curve(self) -> tuple[Floats, Floats]:
        """Return (fpr, tpr) for drawing: from (0, 0), where nothing is called, to (1, 1)."""
        return np.r_[0.0, self.fpr], np.r_[0.0, self.tpr]


def _share(part: Ints, whole: int) -> Floats:
    return part / whole if whole else np.full(len(part), np.nan)


def roc(pos: Ints, neg: Ints) -> Roc:
    """Return the ROC of two histograms, positives' and negatives', int64 (65536,) each."""
    occupied = np.flatnonzero(pos + neg)[::-1]
    return Roc(
        thresholds=edge_of(occupied),
        tp=np.cumsum(pos[occupied]),
        fp=np.cumsum(neg[occupied]),
        positives=int(pos.sum()),
        negatives=int(neg.sum()),
    )


def exact_roc(pos: Margins, neg: Margins) -> Roc:
    """Return the ROC of scores themselves, float32: one threshold per distinct score, as scikit-learn's.

    `roc` has one per bin, some of them here.
    """
    thresholds = np.unique(np.concatenate([pos, neg]))[::-1]
    rising = [np.sort(side) for side in (pos, neg)]
    tp, fp = (len(side) - np.searchsorted(side, thresholds, side="left") for side in rising)
    return Roc(thresholds, tp.astype(np.int64), fp.astype(np.int64), len(pos), len(neg))


def auc(pos: Ints, neg: Ints) -> float:
    """Return the area under the ROC of two histograms: P(positive > negative) + P(equal) / 2; NaN if one is empty.

    Margins of one bin count as equal. The sum is of integers, hence exact and free of order
    (Mann and Whitney, Ann. Math. Stat. 18 (1947) 50-60).
    """
    pairs = int(pos.sum()) * int(neg.sum())
    if not pairs:
        return math.nan
    occupied = np.flatnonzero(pos)
    below = np.cumsum(neg) - neg
    # Python integers: 1e9 positives against 1e10 negatives would overflow int64
    twice = (2 * below + neg)[occupied].astype(object) @ pos[occupied].astype(object)
    return float(twice / (2 * pairs))


def rank_auc(pos: npt.NDArray[np.float32], neg: npt.NDArray[np.float32]) -> float:
    """Return the AUC of margins themselves, ties at 1/2, as scikit-learn's; NaN if one side is empty.

    A histogram's bin holds margins up to 0.8 % apart as equal, which on a few hundred tiles
    of like margins moves the AUC in the third digit.
    """
    if not len(pos) or not len(neg):
        return math.nan
    rising = np.sort(neg)
    wins = [int(np.searchsorted(rising, pos, side=side).sum()) for side in ("left", "right")]
    return sum(wins) / (2 * len(pos) * len(neg))


def average_precision(pos: Ints, neg: Ints) -> float:
    """Return the average precision of two histograms; NaN without positives."""
    return roc(pos, neg).average_precision


# the operating point


Rule = Callable[[Ints, Ints], float]
"""(positives' histogram, negatives' histogram) -> a threshold, a bin's edge unless the rule asks no data."""


def youden(pos: Ints, neg: Ints) -> float:
    """Return the threshold that maximises sensitivity + specificity; the highest of equals.

    W. J. Youden, Cancer 3 (1950) 32-35. Compared as integers, so equals are equal.
    Raises ValueError when there are no positives or no negatives.
    """
    curve = _both_classes(pos, neg)
    # TPR - FPR times both totals; Python integers cannot overflow
    gain = curve.tp.astype(object) * curve.negatives - curve.fp.astype(object) * curve.positives
    return float(curve.thresholds[int(np.argmax(gain))])


def best_f1(pos: Ints, neg: Ints) -> float:
    """Return the threshold of the largest F1; the highest of equals. Raises ValueError as `youden` does."""
    curve = _both_classes(pos, neg)
    return float(curve.thresholds[int(np.argmax(2 * curve.tp / (curve.tp + curve.fp + curve.positives)))])


def fixed_sensitivity(at_least: str | float) -> Rule:
    """Return the rule: the highest threshold whose sensitivity is at least this decimal, computed with exactly."""
    share = Fraction(str(at_least))  # as a float, 0.55 of 100 is more than 55

    def rule(pos: Ints, neg: Ints) -> float:
        curve = _both_classes(pos, neg)
        return float(curve.thresholds[int(np.argmax(curve.tp >= math.ceil(share * curve.positives)))])

    return rule


def fixed_specificity(at_least: str | float) -> Rule:
    """Return the rule: the lowest threshold whose specificity is at least this decimal; above every score if none is.

    Computed with exactly.
    """
    share = Fraction(str(at_least))

    def rule(pos: Ints, neg: Ints) -> float:
        curve = _both_classes(pos, neg)
        good = np.flatnonzero(curve.negatives - curve.fp >= math.ceil(share * curve.negatives))
        return float(curve.thresholds[good[-1]]) if len(good) else _above(curve)

    return rule


def least_cost(cost: str, prevalence: str | None = None) -> Rule:
    """Return the rule: the highest threshold of least cost, where missing a positive costs `cost` false alarms.

    Without a prevalence the cost is that of the data, ``cost * FN + FP``. With one it is that of a case drawn
    where a share `prevalence` is positive: ``cost * prevalence * FN / P + (1 - prevalence) * FP / N`` (C. E. Metz,
    Semin. Nucl. Med. 8 (1978) 283-298). Calling nothing is a choice too: its threshold is above every score. Both
    numbers are decimal texts and are computed with exactly. Raises ValueError for a cost that is not above 0, or a
    prevalence that is not between 0 and 1.
    """
    ratio_, share = Fraction(cost), None if prevalence is None else Fraction(prevalence)
    if ratio_ <= 0 or (share is not None and not 0 < share < 1):
        raise ValueError(f"a cost is above 0 and a prevalence between 0 and 1, got {cost} and {prevalence}")

    def rule(pos: Ints, neg: Ints) -> float:
        curve = _both_classes(pos, neg)
        miss, alarm = ratio_, Fraction(1)
        if share is not None:
            miss, alarm = ratio_ * share / curve.positives, (1 - share) / curve.negatives
        scale = miss.denominator * alarm.denominator
        # Python integers: exact, so that equals are equal
        fn, fp = np.r_[curve.positives, curve.positives - curve.tp].astype(object), np.r_[0, curve.fp].astype(object)
        best = int(np.argmin(fn * int(miss * scale) + fp * int(alarm * scale)))
        return float(curve.thresholds[best - 1]) if best else _above(curve)

    return rule


def _above(curve: Roc) -> float:
    """A threshold above every score."""
    above = int(bin_of(curve.thresholds[:1])[0]) + 1
    return float(edge_of(min(above, HIGHEST_BIN)))


def fixed_probability(at_least: str | float) -> Rule:
    """Return the rule: this probability whatever the data. Its margin, `margin_of`, is no bin's edge."""
    p = float(at_least)
    if not 0 < p < 1:
        raise ValueError(f"a probability lies between 0 and 1, got {p}")
    margin = margin_of(p)
    return lambda pos, neg: margin


def _both_classes(pos: Ints, neg: Ints) -> Roc:
    curve = roc(pos, neg)
    if not curve.positives or not curve.negatives:
        raise ValueError(f"{curve.positives} positives and {curve.negatives} negatives: both are needed.")
    return curve


def counts_at(pos: Ints, neg: Ints, threshold: float) -> Counts:
    """Return the exact counts at a threshold that is a bin's edge; raises ValueError for another one."""
    first = _edge_bin(threshold)
    tp, fp = int(pos[first:].sum()), int(neg[first:].sum())
    return Counts(tp=tp, fn=int(pos.sum()) - tp, fp=fp, tn=int(neg.sum()) - fp)


# counts and confusion


def ratio(part: float, whole: float) -> float:
    """Return part / whole, or NaN where there is nothing to divide by."""
    return part / whole if whole else math.nan


@dataclass(frozen=True)
class Counts:
    """True and false positives and negatives of one class. They add up; rates come last, NaN if undefined."""

    tp: int = 0
    fn: int = 0
    fp: int = 0
    tn: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fn + other.fn, self.fp + other.fp, self.tn + other.tn)

    @property
    def total(self) -> int:
        """Everything counted."""
        return self.tp + self.fn + self.fp + self.tn

    @property
    def sensitivity(self) -> float:
        """Share of the positives that are called (recall)."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """Share of the negatives that are not called."""
        return ratio(self.tn, self.tn + self.fp)

    @property
    def ppv(self) -> float:
        """Share of the called that are positive (precision)."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def npv(self) -> float:
        """Share of those not called that are negative."""
        return ratio(self.tn, self.tn + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of sensitivity and ppv."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> float:
        """Share that is called rightly."""
        return ratio(self.tp + self.tn, self.total)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of sensitivity and specificity."""
        return (self.sensitivity + self.specificity) / 2

    @property
    def kappa(self) -> float:
        """Agreement beyond chance, as `Confusion.kappa`."""
        return self.confusion("", "").kappa

    def confusion(self, negative: str, positive: str) -> Confusion:
        """Return the 2 x 2 table: true classes as rows, negative first."""
        return Confusion((negative, positive), np.array([[self.tn, self.fp], [self.fn, self.tp]], np.int64))


RATES = ("sensitivity", "specificity", "ppv", "npv", "f1", "accuracy", "balanced_accuracy", "kappa")


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often each class was called what: counts int64 (K, K), true classes as rows. They add up."""

    classes: tuple[str, ...]
    counts: Ints

    def __post_init__(self) -> None:
        k = len(self.classes)
        if self.counts.shape != (k, k) or (self.counts < 0).any():
            raise ValueError(f"{k} classes need counts of shape {(k, k)}, none negative; got {self.counts.shape}.")

    @classmethod
    def of(cls, truth: npt.ArrayLike, called: npt.ArrayLike, classes: Sequence[str]) -> Self:
        """Count pairs of class numbers, shape (n,) each. Raises ValueError for a number that is no class."""
        k = len(classes)
        rows, cols = np.asarray(truth, np.int64), np.asarray(called, np.int64)
        if rows.shape != cols.shape or (np.r_[rows, cols] < 0).any() or (np.r_[rows, cols] >= k).any():
            raise ValueError(f"truth and called must have one shape and lie between 0 and {k - 1}.")
        return cls(tuple(classes), np.bincount(rows * k + cols, minlength=k * k).reshape(k, k).astype(np.int64))

    @classmethod
    def zeros(cls, classes: Sequence[str]) -> Self:
        """Count nothing."""
        return cls(tuple(classes), np.zeros((len(classes), len(classes)), np.int64))

    def __add__(self, other: Self) -> Self:
        if self.classes != other.classes:
            raise ValueError(f"Confusions of {self.classes} and {other.classes} do not add up.")
        return type(self)(self.classes, self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Confusion)
            and self.classes == other.classes
            and bool(np.array_equal(self.counts, other.counts))
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """Everything counted."""
        return int(self.counts.sum())

    def by_true(self) -> Floats:
        """Return each row's shares; NaN in the row of a class that never occurs."""
        rows = self.counts.sum(axis=1, keepdims=True)
        shares: Floats = np.divide(self.counts, rows, out=np.full(self.counts.shape, np.nan), where=rows > 0)
        return shares

    def by_total(self) -> Floats:
        """Return shares of everything; NaN where nothing was counted."""
        return np.array([[ratio(int(n), self.total) for n in row] for row in self.counts], np.float64)

    def one_against_rest(self, index: int) -> Counts:
        """Return the counts of one class against all others."""
        tp = int(self.counts[index, index])
        fn = int(self.counts[index].sum()) - tp
        fp = int(self.counts[:, index].sum()) - tp
        return Counts(tp, fn, fp, self.total - tp - fn - fp)

    @property
    def accuracy(self) -> float:
        """Share on the diagonal."""
        return ratio(int(np.trace(self.counts)), self.total)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that occur; NaN if none does."""
        recall = np.diagonal(self.by_true())
        occurs = ~np.isnan(recall)
        return float(recall[occurs].mean()) if occurs.any() else math.nan

    @property
    def kappa(self) -> float:
        """Agreement beyond chance (Cohen, Educ. Psychol. Meas. 20 (1960) 37-46); NaN where chance agrees always."""
        rows, cols = (self.counts.sum(axis=axis).astype(object) for axis in (1, 0))
        chance = ratio(int(rows @ cols), self.total**2)
        return ratio(self.accuracy - chance, 1 - chance) if chance == chance else math.nan


# probabilities: calibration, and 004's ROC

RELIABILITY_BINS = 10
THRESHOLDS_004 = (1.0, 0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)
"""Probabilities at which source 004 draws its ROC."""

_FIXED = 2**30
"""Probabilities are summed as whole numbers of 2**-30, so that sums do not depend on order."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """How probabilities compare with what came true, in ten bins of equal width; adds up in any order.

    positives, total : int64 (10,), labelled cases by bin; sums : int64 (10,), their probabilities in units of 2**-30.
    A bin holds its upper edge, and the first one 0 too. called : int64 (2, 13), positives and negatives whose
    probability is at least each of THRESHOLDS_004.
    """

    positives: Ints
    total: Ints
    sums: Ints
    called: Ints

    @classmethod
    def empty(cls) -> Self:
        """Count nothing."""
        none = np.zeros(RELIABILITY_BINS, np.int64)
        return cls(none, none, none, np.zeros((2, len(THRESHOLDS_004)), np.int64))

    @classmethod
    def of(cls, pos: Margins, neg: Margins) -> Self:
        """Count probabilities, float32, of positives and of negatives: the first two arrays, any length."""
        p = np.concatenate([pos, neg]).astype(np.float64)
        place = np.searchsorted(np.linspace(0, 1, RELIABILITY_BINS + 1)[1:-1], p, side="left")
        sums = np.zeros(RELIABILITY_BINS, np.int64)
        np.add.at(sums, place, np.rint(p * _FIXED).astype(np.int64))
        at = np.array(THRESHOLDS_004, np.float32)
        called = [len(side) - np.searchsorted(np.sort(side), at, side="left") for side in (pos, neg)]
        first = np.bincount(place[: len(pos)], minlength=RELIABILITY_BINS)
        total = np.bincount(place, minlength=RELIABILITY_BINS)
        return cls(first.astype(np.int64), total.astype(np.int64), sums, np.array(called, np.int64))

    def __add__(self, other: Self) -> Self:
        positives, total = self.positives + other.positives, self.total + other.total
        return type(self)(positives, total, self.sums + other.sums, self.called + other.called)

    @property
    def mean_probability(self) -> Floats:
        """Mean probability of each bin, float64 (10,); NaN in an empty one."""
        return _by(self.sums / _FIXED, self.total)

    @property
    def observed(self) -> Floats:
        """Share of positives in each bin, float64 (10,); NaN in an empty one."""
        return _by(self.positives, self.total)

    @property
    def expected_calibration_error(self) -> float:
        """Mean over cases of |observed - mean probability| of their bin; NaN without cases.

        Naeini, Cooper and Hauskrecht, AAAI 2015, for one class against the rest.
        """
        gaps = [abs(int(n) * _FIXED - int(s)) for n, s in zip(self.positives, self.sums, strict=True)]
        return ratio(sum(gaps) / _FIXED, int(self.total.sum()))

    @property
    def auc_004(self) -> float:
        """Area under the ROC by the trapezoid rule over THRESHOLDS_004, as source 004 has it; NaN for one class.

        The curve begins at threshold 1 and not at (0, 0), so the area is too small where scores reach 1.
        """
        tp, fp = self.called
        if not tp[-1] or not fp[-1]:
            return math.nan
        return float(np.trapezoid(tp / tp[-1], fp / fp[-1]))


def _by(part: npt.NDArray[np.float64 | np.int64], whole: Ints) -> Floats:
    out: Floats = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return out


# FROC


FROC_FALSE_POSITIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Mean false positives per slide at which CAMELYON16 reads the sensitivity."""


@dataclass(frozen=True, eq=False)
class Froc:
    """A free-response ROC: false positives per slide and sensitivity at falling strictness, float64 (n,) each.

    sensitivities : at FROC_FALSE_POSITIVES; score : their mean.
    """

    false_positives: Floats
    sensitivity: Floats
    sensitivities: tuple[float, ...]
    score: float


def froc(false_positives: Floats, lesions: Floats, slides: int, count: int) -> Froc | None:
    """Return the FROC by CAMELYON16's rules, or None without slides or lesions.

    Parameters
    ----------
    false_positives : probabilities of the detections that hit no lesion, of all slides
    lesions : highest probability of a hit for each lesion, 0 for one that nothing hit and for isolated tumour cells
    slides : all slides, with and without tumour; false positives are counted per slide of these
    count : lesions that should be found, isolated tumour cells left out

    The thresholds are the distinct probabilities but the smallest, whatever it is, and one above all; sensitivity
    is read at FROC_FALSE_POSITIVES by linear interpolation, as the challenge's own evaluation does.
    """
    if not slides or not count:
        return None
    thresholds = np.unique(np.concatenate([false_positives, lesions]))[1:]
    found = [_at_least(side, thresholds) for side in (false_positives, lesions)]
    per_slide, sensitivity = np.r_[found[0], 0] / slides, np.r_[found[1], 0] / count
    read = np.interp(FROC_FALSE_POSITIVES, per_slide[::-1], sensitivity[::-1])
    return Froc(per_slide, sensitivity, tuple(float(v) for v in read), float(np.mean(read)))


def _at_least(values: Floats, thresholds: Floats) -> Ints:
    return (len(values) - np.searchsorted(np.sort(values), thresholds, side="left")).astype(np.int64)


# intervals over patients


def resample_weights(patients: int, resamples: int = 1000, seed: int = 0) -> Ints:
    """Return how often each patient is drawn, int64 (resamples, patients): as many draws, with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(np.int64)


def no_interval(patients: int, with_positives: int, with_negatives: int) -> str:
    """Say why so few patients have no interval of an AUC; "" where they may have one.

    >>> no_interval(4, 4, 4), no_interval(20, 1, 20), no_interval(5, 2, 2)
    ('no interval from 4 patients', 'no interval: 1 of 20 patients with positives, 2 are needed', '')
    """
    if patients < MIN_PATIENTS:
        return f"no interval from {patients} patients"
    for n, side in ((with_positives, "positives"), (with_negatives, "negatives")):
        if n < MIN_SIDE:
            return f"no interval: {n} of {patients} patients with {side}, {MIN_SIDE} are needed"
    return ""


def ranked(pos: Sequence[Margins], neg: Sequence[Margins]) -> tuple[list[Sparse], list[Sparse]]:
    """Return each patient's scores, float32, as counts of their ranks among all: a bin for every distinct score.

    For the interval of an AUC of scores themselves; bins of margins would hold some of them as equal.
    """
    distinct = np.unique(np.concatenate([np.empty(0, np.float32), *pos, *neg]))

    def ranks(values: Margins) -> Sparse:
        bins, counts = np.unique(np.searchsorted(distinct, values), return_counts=True)
        return Sparse(bins.astype(np.uint32), counts.astype(np.int64))

    return [ranks(values) for values in pos], [ranks(values) for values in neg]


def pairwise_wins(pos: Sequence[Sparse], neg: Sequence[Sparse], block: int = 1024) -> Floats:
    """Return U, float64 (P, P): pairs won by patient p's positives against patient q's negatives, ties at 1/2.

    AUC of any resample with weights w is then w U w / (w pos)(w neg), in P^2 steps instead
    of a pass over the scores. Memory is P^2 and two blocks of P x `block` bins.
    """
    n = len(pos)
    wins, below = np.zeros((n, n)), np.zeros(n)
    occupied = np.unique(np.concatenate([h.bins for h in [*pos, *neg]])) if n else np.empty(0, np.uint16)
    for start in range(0, len(occupied), block):
        bins = occupied[start : start + block]
        ours, theirs = (_columns(side, bins) for side in (pos, neg))
        upto = below[:, None] + np.cumsum(theirs, axis=1)
        wins += ours @ (upto - theirs / 2).T
        below = upto[:, -1]
    return wins


def _columns(histograms: Sequence[Sparse], bins: npt.NDArray[np.uint16 | np.uint32]) -> Floats:
    """The counts of each histogram in `bins` (rising), float64 (P, len(bins))."""
    out = np.zeros((len(histograms), len(bins)))
    for row, histogram in zip(out, histograms, strict=True):
        first, last = np.searchsorted(histogram.bins, [bins[0], bins[-1]], side="left")
        last += int(last < len(histogram.bins) and histogram.bins[last] == bins[-1])
        row[np.searchsorted(bins, histogram.bins[first:last])] = histogram.counts[first:last]
    return out


def auc_interval(
    pos: Sequence[Sparse], neg: Sequence[Sparse], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Return the percentile interval of AUC when patients are resampled; entry p of `pos`, `neg` is patient p's.

    Tiles of one patient resemble each other, so patients are drawn, not tiles. Resamples
    that hold one class only have no AUC and are left out. None where `no_interval` says why, when
    more than half of the resamples are left out, and when all resamples agree: a perfect result
    looks certain to resampling, however few the patients.
    """
    if no_interval(len(pos), *(sum(h.total > 0 for h in side) for side in (pos, neg))):
        return None
    weights = resample_weights(len(pos), resamples, seed).astype(np.float64)
    won = np.einsum("rp,rp->r", weights @ pairwise_wins(pos, neg), weights)
    totals = [weights @ np.array([h.total for h in side], np.float64) for side in (pos, neg)]
    return _percentiles(won, totals[0] * totals[1], level)


def rate_interval(
    part: npt.ArrayLike, whole: npt.ArrayLike, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Return the percentile interval of sum(part) / sum(whole) when patients are resampled, (P,) counts each.

    The same draws as `auc_interval` with the same seed; None in the same cases, of the side that `whole` counts.
    """
    parts, wholes = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    if len(parts) < MIN_PATIENTS or np.count_nonzero(wholes) < MIN_SIDE:
        return None
    weights = resample_weights(len(parts), resamples, seed).astype(np.float64)
    return _percentiles(weights @ parts, weights @ wholes, level)


def kappa_interval(
    tables: Sequence[Ints], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Return the percentile interval of Cohen's kappa when patients are resampled, (K, K) counts of each.

    The same draws as `auc_interval` with the same seed. None with few patients as `rate_interval` has it, or where
    chance agrees always in half of the resamples.
    """
    filled = sum(bool(table.any()) for table in tables)
    if len(tables) < MIN_PATIENTS or filled < MIN_SIDE:
        return None
    counts = np.stack(tables).astype(np.float64)
    drawn = np.einsum("rp,pij->rij", resample_weights(len(tables), resamples, seed).astype(np.float64), counts)
    total = drawn.sum(axis=(1, 2))
    chance = (drawn.sum(axis=1) * drawn.sum(axis=2)).sum(axis=1)  # of total squared
    return _percentiles(total * np.trace(drawn, axis1=1, axis2=2) - chance, total**2 - chance, level)


def _percentiles(part: Floats, whole: Floats, level: float) -> Interval | None:
    defined = whole > 0
    if 2 * np.count_nonzero(defined) < len(whole):
        return None
    low, high = np.quantile(part[defined] / whole[defined], [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if low < high else None
