from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from slideflow_ray import metrics as m

FLOATS = st.floats(width=32, allow_nan=False)


def data(seed: int, n: int = 3000, sd: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    return rng.normal(truth * 0.8 * sd, sd).astype(np.float32), truth


def on_edges(margins: np.ndarray) -> np.ndarray:
    """Round to bin edges, so that scikit-learn sees exactly what the histograms see."""
    return m.edge_of(m.bin_of(margins))


def both(margins: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return m.histogram(margins[truth]), m.histogram(margins[~truth])


# bins


@given(FLOATS, FLOATS)
def test_bins_keep_the_order(a, b):
    low, high = sorted((a, b))
    assert m.bin_of([low])[0] <= m.bin_of([high])[0]


@given(FLOATS, st.integers(m.LOWEST_BIN, m.HIGHEST_BIN))
@settings(max_examples=500)
def test_at_or_above_an_edge_is_in_its_bin_or_above(score, index):
    assert (np.float32(score) >= m.edge_of(index)) == (int(m.bin_of([score])[0]) >= index)


def test_every_edge_is_the_smallest_float_of_its_bin():
    bins = np.arange(m.LOWEST_BIN, m.HIGHEST_BIN + 1)
    edges = m.edge_of(bins)
    assert np.array_equal(m.bin_of(edges), bins)
    assert np.all(np.diff(edges) > 0)
    with np.errstate(over="ignore"):  # below the lowest finite float lies -inf
        below = np.nextafter(edges[1:], np.float32(-np.inf))
    assert np.array_equal(m.bin_of(below), bins[:-1])


def test_special_values_have_their_place():
    bins = m.bin_of([-np.inf, -1, -0.0, 0.0, 1, np.inf])
    assert bins[2] == bins[3]
    assert bins[0] == m.LOWEST_BIN
    assert bins[-1] == m.HIGHEST_BIN
    assert sorted(bins) == list(bins)
    assert m.edge_of(m.LOWEST_BIN) == -np.inf
    assert m.edge_of(m.HIGHEST_BIN) == np.inf
    assert m.edge_of(0x8000) == 0


def test_nan_is_refused():
    with pytest.raises(ValueError, match="1 of 3"):
        m.histogram([0.0, math.nan, 1.0])


def test_a_bin_without_a_number_has_no_edge():
    with pytest.raises(ValueError):
        m.edge_of(m.HIGHEST_BIN + 1)


def test_histograms_add_up_and_sparse_is_the_same():
    a, b = data(1)[0], data(2, 500)[0]
    whole = m.histogram(np.r_[a, b])
    assert whole.shape == (65_536,)
    assert whole.dtype == np.int64
    assert whole.sum() == 3500
    assert np.array_equal(whole, m.histogram(a) + m.histogram(b))
    both_sparse = m.Sparse.of(a) + m.Sparse.of(b)
    assert np.array_equal(whole, both_sparse.dense())
    assert np.array_equal(whole, m.together([m.Sparse.of(a), m.Sparse.of(b)]))
    assert both_sparse.total == 3500
    assert np.all(np.diff(both_sparse.bins.astype(int)) > 0)
    edge = float(m.edge_of(m.bin_of([0.7]))[0])
    assert both_sparse.at_least(edge) == np.count_nonzero(np.r_[a, b] >= np.float32(edge))


# curves


@pytest.mark.parametrize("sd", [0.02, 3.0, 60.0])
def test_curve_areas_are_scikit_learns(sd):
    margins, truth = data(3, sd=sd)
    pos, neg = both(margins, truth)
    rounded = on_edges(margins)
    assert m.auc(pos, neg) == pytest.approx(sk.roc_auc_score(truth, rounded), abs=1e-12)
    assert m.auc(pos, neg) == pytest.approx(sk.roc_auc_score(truth, margins), abs=1e-4)
    assert m.average_precision(pos, neg) == pytest.approx(sk.average_precision_score(truth, rounded), abs=1e-12)
    fpr, tpr, thresholds = sk.roc_curve(truth, rounded, drop_intermediate=False)
    curve = m.roc(pos, neg)
    assert np.array_equal(curve.thresholds, thresholds[1:])
    x, y = curve.curve()
    assert np.allclose(x, fpr, atol=0)
    assert np.allclose(y, tpr, atol=0)


def test_auc_counts_ties_as_half():
    margins, truth = np.round(data(4, 200)[0]), data(4, 200)[1]
    wins = [(p > n) + (p == n) / 2 for p, n in product(margins[truth], margins[~truth])]
    assert m.auc(*both(margins, truth)) == pytest.approx(np.mean(wins), abs=1e-15)


def test_auc_of_more_pairs_than_int64_holds():
    pos, neg = np.zeros(m.BINS, np.int64), np.zeros(m.BINS, np.int64)
    pos[[40_000, 50_000]] = 6 * 10**9
    neg[[30_000, 50_000]] = 6 * 10**9
    assert m.auc(pos, neg) == (1 + 0.5 + 0 + 1) / 4
    assert m.youden(pos, neg) == float(m.edge_of(40_000))


def test_one_class_has_no_curve():
    nothing, some = np.zeros(m.BINS, np.int64), m.histogram([1.0, 2.0])
    assert math.isnan(m.auc(some, nothing))
    assert math.isnan(m.auc(nothing, some))
    assert math.isnan(m.average_precision(nothing, some))
    assert np.isnan(m.roc(some, nothing).fpr).all()
    with pytest.raises(ValueError, match="both are needed"):
        m.youden(some, nothing)


# operating points


def test_youden_is_the_best_of_all_thresholds():
    margins, truth = data(5)
    pos, neg = both(margins, truth)
    best = m.youden(pos, neg)

    def j(threshold: np.float32) -> float:
        return float((margins[truth] >= threshold).mean() - (margins[~truth] >= threshold).mean())

    assert j(np.float32(best)) == pytest.approx(max(j(t) for t in np.unique(on_edges(margins))), abs=1e-12)


def test_the_highest_of_equal_thresholds_wins():
    pos, neg = m.histogram([1.0, 3.0]), m.histogram([0.0, 2.0])
    assert m.youden(pos, neg) == 3.0
    assert m.best_f1(m.histogram([1.0, 3.0]), m.histogram([2.0])) == 1.0


def test_fixed_rules_keep_their_word():
    margins, truth = data(6)
    pos, neg = both(margins, truth)
    edges = np.unique(on_edges(margins))
    t = m.fixed_sensitivity(0.9)(pos, neg)
    assert (margins[truth] >= t).mean() >= 0.9 > (margins[truth] >= edges[edges > t][0]).mean()
    t = m.fixed_specificity(0.9)(pos, neg)
    assert (margins[~truth] < t).mean() >= 0.9 > (margins[~truth] < edges[edges < t][-1]).mean()
    f1 = max(sk.f1_score(truth, margins >= e) for e in edges[::7])
    counts = m.counts_at(pos, neg, m.best_f1(pos, neg))
    assert counts.f1 >= f1
    assert counts.f1 == pytest.approx(sk.f1_score(truth, margins >= m.best_f1(pos, neg)))


@pytest.mark.parametrize("share", ["0.55", "0.7", "0.95", "0.07"])
def test_a_share_is_a_decimal_and_no_float(share):
    """0.55 * 100 is 55.00000000000001, and 0.07 * 100 is 7.000000000000001: one case too many would be asked for."""
    cases = m.histogram(np.arange(1, 101, dtype=np.float32))
    other = m.histogram([0.5])
    need = int(Fraction(share) * 100)
    for value in (share, float(share)):
        t = m.fixed_sensitivity(value)(cases, other)
        assert m.counts_at(cases, other, t).tp == need
        t = m.fixed_specificity(value)(m.histogram([200.0]), cases)
        assert m.counts_at(m.histogram([200.0]), cases, t).tn == need


def test_specificity_beyond_reach_calls_nothing():
    pos, neg = m.histogram([1.0]), m.histogram([2.0])
    t = m.fixed_specificity(1.0)(pos, neg)
    assert m.counts_at(pos, neg, t) == m.Counts(0, 1, 0, 1)


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 0.5, 0.8, 0.9, 0.99, 0.9999])
def test_a_probability_needs_no_data_and_is_called_exactly_where_it_is_reached(p):
    nothing = np.zeros(m.BINS, np.int64)
    t = m.fixed_probability(p)(nothing, nothing)
    assert t == pytest.approx(math.log(p / (1 - p)), abs=1e-7 / (p * (1 - p)))
    near = np.float32(t) + np.arange(-9, 10, dtype=np.float32) * np.spacing(np.float32(max(abs(t), 1e-9)))
    assert np.array_equal(near >= np.float32(t), m.probability(near) >= np.float32(p))
    assert m.probability(np.nextafter(np.float32(t), np.float32([-np.inf])))[0] < np.float32(p)
    with pytest.raises(ValueError):
        m.fixed_probability(1.0)


def test_counts_at_a_threshold_are_exact():
    margins, truth = data(7)
    pos, neg = both(margins, truth)
    for edge in np.unique(on_edges(margins))[::50]:
        tn, fp, fn, tp = sk.confusion_matrix(truth, margins >= edge).ravel()
        assert m.counts_at(pos, neg, float(edge)) == m.Counts(tp=tp, fn=fn, fp=fp, tn=tn)
    with pytest.raises(ValueError, match="no bin's edge"):
        m.counts_at(pos, neg, 1.0001)


# counts and confusion


def test_rates_are_scikit_learns():
    margins, truth = data(8)
    called = margins > 1
    counts = m.counts_at(*both(on_edges(margins), truth), 1.0)
    called = on_edges(margins) >= 1
    assert counts.sensitivity == sk.recall_score(truth, called)
    assert counts.specificity == sk.recall_score(~truth, ~called)
    assert counts.ppv == sk.precision_score(truth, called)
    assert counts.npv == sk.precision_score(~truth, ~called)
    assert counts.f1 == pytest.approx(sk.f1_score(truth, called))
    assert counts.accuracy == sk.accuracy_score(truth, called)
    assert counts.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(truth, called))
    assert counts.confusion("a", "b").counts.tolist() == sk.confusion_matrix(truth, called).tolist()


def test_confusion_is_scikit_learns_with_true_classes_as_rows():
    rng = np.random.default_rng(9)
    truth = rng.choice(4, 900, p=[0.5, 0.3, 0.15, 0.05])
    called = np.where(rng.random(900) < 0.7, truth, rng.integers(0, 4, 900))
    whole = m.Confusion.of(truth, called, "abcd")
    assert np.array_equal(whole.counts, sk.confusion_matrix(truth, called))
    assert not np.array_equal(whole.counts, whole.counts.T)
    assert (
        m.Confusion.of(truth[:100], called[:100], "abcd") + m.Confusion.of(truth[100:], called[100:], "abcd") == whole
    )
    assert np.allclose(whole.by_true(), sk.confusion_matrix(truth, called, normalize="true"))
    assert np.allclose(whole.by_total(), sk.confusion_matrix(truth, called, normalize="all"))
    assert whole.accuracy == sk.accuracy_score(truth, called)
    assert whole.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(truth, called))
    assert whole.kappa == pytest.approx(sk.cohen_kappa_score(truth, called))
    for index in range(4):
        tn, fp, fn, tp = sk.confusion_matrix(truth == index, called == index).ravel()
        assert whole.one_against_rest(index) == m.Counts(tp, fn, fp, tn)


def test_what_is_not_defined_is_nan_without_a_warning():
    counts = m.Counts()
    assert all(math.isnan(getattr(counts, name)) for name in m.RATES)
    empty = m.Confusion.zeros("ab")
    assert math.isnan(empty.accuracy)
    assert math.isnan(empty.kappa)
    assert math.isnan(empty.balanced_accuracy)
    assert np.isnan(empty.by_true()).all()
    assert np.isnan(empty.by_total()).all()
    one = m.Confusion.of([0, 0], [0, 0], "ab")
    assert math.isnan(one.kappa)
    assert one.accuracy == 1
    assert np.isnan(one.by_true()[1]).all()


def test_confusions_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="do not add up"):
        m.Confusion.zeros("ab") + m.Confusion.zeros("ac")
    with pytest.raises(ValueError, match="between 0 and 1"):
        m.Confusion.of([0, 2], [0, 1], "ab")
    with pytest.raises(ValueError, match="shape"):
        m.Confusion(("a", "b"), np.zeros((2, 3), np.int64))


# intervals


def cohort(patients: int, seed: int = 10) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 1, patients)
    pos = [rng.normal(1.5 + s, 1, rng.integers(0, 40)).astype(np.float32) for s in shift]
    neg = [rng.normal(s, 1, rng.integers(1, 80)).astype(np.float32) for s in shift]
    return pos, neg


def test_pairwise_wins_is_brute_force():
    pos, neg = cohort(7)
    wins = m.pairwise_wins([m.Sparse.of(x) for x in pos], [m.Sparse.of(x) for x in neg], block=64)
    for p, q in product(range(7), repeat=2):
        a, b = m.bin_of(pos[p]).astype(int), m.bin_of(neg[q]).astype(int)
        expected = sum((a > j).sum() + (a == j).sum() / 2 for j in b)
        assert wins[p, q] == expected


def test_the_interval_is_that_of_resampled_patients():
    pos, neg = cohort(12)
    low, high = m.auc_interval([m.Sparse.of(x) for x in pos], [m.Sparse.of(x) for x in neg], resamples=200, seed=3)
    areas = []
    for weights in m.resample_weights(12, 200, 3):
        p = np.concatenate([np.repeat(x, w) for x, w in zip(pos, weights, strict=True)])
        n = np.concatenate([np.repeat(x, w) for x, w in zip(neg, weights, strict=True)])
        areas.append(sk.roc_auc_score(np.r_[np.ones(len(p)), np.zeros(len(n))], on_edges(np.r_[p, n])))
    assert (low, high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-9)


def test_ranked_scores_have_the_interval_of_the_scores_themselves():
    """Probabilities near 1: a bin of margins holds 0.4 % of them as equal."""
    pos, neg = ([np.float32(1) - np.float32(2**-12) * np.exp(-x) for x in side] for side in cohort(12))
    whole = m.ranked(pos, neg)
    low, high = m.auc_interval(*whole, resamples=200, seed=3)
    areas = []
    for weights in m.resample_weights(12, 200, 3):
        p = np.concatenate([np.repeat(x, w) for x, w in zip(pos, weights, strict=True)])
        n = np.concatenate([np.repeat(x, w) for x, w in zip(neg, weights, strict=True)])
        areas.append(sk.roc_auc_score(np.r_[np.ones(len(p)), np.zeros(len(n))], np.r_[p, n]))
    assert (low, high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-9)
    area = m.auc(*(m.together(side) for side in whole))
    assert area == pytest.approx(m.rank_auc(np.concatenate(pos), np.concatenate(neg)))
    assert low < area < high


def test_one_patient_on_a_side_has_no_interval():
    rng = np.random.default_rng(1)
    neg = [m.Sparse.of(rng.normal(0, 1, 50)) for _ in range(20)]
    for n, some in ((1, False), (2, True)):
        pos = [m.Sparse.of(rng.normal(1, 1, 50)) if i < n else m.Sparse.empty() for i in range(20)]
        assert (m.auc_interval(pos, neg) is not None) == some
        assert (m.auc_interval(neg, pos) is not None) == some
        whole = [h.total for h in pos]
        assert (m.rate_interval(np.array(whole) * np.linspace(0.3, 0.9, 20), whole) is not None) == some
        assert bool(m.no_interval(20, n, 20)) == bool(m.no_interval(20, 20, n)) == (not some)


def test_rates_have_the_same_interval():
    tp, positives = np.array([3, 5, 0, 9, 4, 2]), np.array([4, 5, 3, 10, 8, 2])
    low, high = m.rate_interval(tp, positives, resamples=300, seed=1)
    weights = m.resample_weights(6, 300, 1)
    rates = [(w * tp).sum() / (w * positives).sum() for w in weights]
    assert (low, high) == pytest.approx(tuple(np.quantile(rates, [0.025, 0.975])))
    assert weights.sum(axis=1).tolist() == [6] * 300


def test_there_is_no_interval_where_it_would_mislead():
    few = [m.Sparse.of([1.0])] * 4
    assert m.auc_interval(few, few) is None
    assert m.rate_interval([1] * 4, [2] * 4) is None
    perfect = m.auc_interval([m.Sparse.of([2.0])] * 6, [m.Sparse.of([1.0])] * 6)
    assert perfect is None
    lonely = [m.Sparse.of([1.0]), *[m.Sparse.empty()] * 5], [m.Sparse.empty(), *[m.Sparse.of([0.0])] * 5]
    interval = m.auc_interval(*lonely)
    assert interval is None


def test_intervals_repeat_with_their_seed():
    pos, neg = ([m.Sparse.of(x) for x in side] for side in cohort(8))
    assert m.auc_interval(pos, neg, seed=1) == m.auc_interval(pos, neg, seed=1) != m.auc_interval(pos, neg, seed=2)


# cost, calibration, 004's area


def literal_costs(pos, neg, thresholds, cost, prevalence=None):
    def one(t):
        missed, alarms = (pos < t).sum(), (neg >= t).sum()
        if prevalence is None:
            return cost * missed + alarms
        return cost * prevalence * missed / len(pos) + (1 - prevalence) * alarms / len(neg)

    return {float(t): one(t) for t in thresholds}


@pytest.mark.parametrize(
    ("cost", "prevalence"), [("1", None), ("5", None), ("0.2", None), ("1/3", None), ("4", "0.02")]
)
def test_the_least_cost_is_the_least_of_all_thresholds(cost, prevalence):
    rng = np.random.default_rng(11)
    pos, neg = rng.normal(1, 1, 60).astype(np.float32), rng.normal(-1, 1, 300).astype(np.float32)
    found = m.least_cost(cost, prevalence)(m.histogram(pos), m.histogram(neg))
    bins = np.unique(m.bin_of(np.concatenate([pos, neg])))
    thresholds = m.edge_of(np.r_[bins, bins.max() + 1])
    number = float(Fraction(cost))
    costs = literal_costs(pos, neg, thresholds, number, prevalence and float(prevalence))
    least = min(costs.values())
    assert found == max(t for t, c in costs.items() if c <= least * (1 + 1e-12))


def test_cost_with_known_answers():
    pos, neg = m.histogram([1.0, 3.0]), m.histogram([0.0, 2.0, 2.0])
    assert m.least_cost("1")(pos, neg) == 3.0  # one missed; at 1.0 two alarms
    assert m.least_cost("3")(pos, neg) == 1.0  # a miss costs 3, two alarms 2
    assert m.least_cost("2")(pos, neg) == 3.0  # equal: the higher
    above = m.least_cost("0.01", "0.01")(m.histogram([0.0]), m.histogram([0.0]))
    assert 0 < above < 1e-30  # calling nothing
    for bad in (("0", None), ("-1", None), ("1", "0"), ("1", "1")):
        with pytest.raises(ValueError):
            m.least_cost(*bad)
    with pytest.raises(ValueError, match="both are needed"):
        m.least_cost("1")(pos, m.histogram([]))


def probabilities(rng, n=4000):
    p = np.round(rng.beta(0.5, 0.7, n), 3).astype(np.float32)
    return p, rng.uniform(size=n) < p**2


def test_reliability_agrees_with_scikit_learn():
    from sklearn.calibration import calibration_curve

    p, truth = probabilities(np.random.default_rng(12))
    p[:3] = (0.0, 1.0, np.float32(0.3))
    table = m.Reliability.of(p[truth], p[~truth])
    observed, mean = calibration_curve(truth, p, n_bins=10)
    assert table.observed == pytest.approx(observed)
    assert table.mean_probability == pytest.approx(mean, abs=1e-8)
    share = table.total / len(p)
    error = float(share @ np.abs(observed - mean))
    assert table.expected_calibration_error == pytest.approx(error, abs=1e-8)
    assert error > 0.05


def test_reliability_adds_up_in_any_order_to_the_bit():
    p, truth = probabilities(np.random.default_rng(13))
    whole = m.Reliability.of(p[truth], p[~truth])
    parts = [m.Reliability.of(p[i::7][truth[i::7]], p[i::7][~truth[i::7]]) for i in range(7)]
    for order in (parts, parts[::-1]):
        total = sum(order, m.Reliability.empty())
        for name in ("positives", "total", "sums", "called"):
            assert np.array_equal(getattr(total, name), getattr(whole, name))
        assert total.expected_calibration_error == whole.expected_calibration_error
    assert math.isnan(m.Reliability.empty().expected_calibration_error)
    assert math.isnan(m.Reliability.empty().auc_004)


def test_a_calibrated_and_a_wrong_table():
    half = np.full(4, 0.5, np.float32)
    assert m.Reliability.of(half, half).expected_calibration_error == 0
    assert m.Reliability.of(np.zeros(0, np.float32), half).expected_calibration_error == 0.5
    assert m.Reliability.of(np.ones(3, np.float32), np.zeros(3, np.float32)).expected_calibration_error == 0


def test_the_area_of_004_is_the_trapezoid_over_its_thresholds():
    p, truth = probabilities(np.random.default_rng(14))
    thresholds = [1, 0.99, *(i / 10 for i in range(9, 0, -1)), 0.05, 0]
    tpr = [(p[truth] >= np.float32(t)).mean() for t in thresholds]
    fpr = [(p[~truth] >= np.float32(t)).mean() for t in thresholds]
    area = sum((fpr[i + 1] - fpr[i]) * (tpr[i] + tpr[i + 1]) / 2 for i in range(len(thresholds) - 1))
    found = m.Reliability.of(p[truth], p[~truth]).auc_004
    assert found == pytest.approx(area)
    assert found != pytest.approx(sk.roc_auc_score(truth, p), abs=1e-4)
    # scores of 1 on both sides: the curve begins at (0.5, 0.5), and what lies left of it is lost
    assert m.Reliability.of(np.float32([1, 0]), np.float32([1, 0])).auc_004 == pytest.approx(0.375)


def test_exact_curves_are_scikit_learns():
    rng = np.random.default_rng(15)
    truth = rng.uniform(size=300) < 0.3
    z = np.round(rng.normal(truth, 1), 2).astype(np.float32)
    curve = m.exact_roc(z[truth], z[~truth])
    fpr, tpr, thresholds = sk.roc_curve(truth, z, drop_intermediate=False)
    assert np.array_equal(curve.thresholds, thresholds[1:].astype(np.float32))
    assert curve.fpr == pytest.approx(fpr[1:])
    assert curve.tpr == pytest.approx(tpr[1:])
    precision, recall, _ = sk.precision_recall_curve(truth, z)
    assert curve.precision[::-1] == pytest.approx(precision[:-1])
    assert curve.tpr[::-1] == pytest.approx(recall[:-1])
    assert curve.average_precision == pytest.approx(sk.average_precision_score(truth, z))
    assert math.isnan(m.exact_roc(z[:0], z).average_precision)
    assert m.exact_roc(z, z[:0]).average_precision == pytest.approx(1)


def test_counts_have_kappa():
    counts = m.Counts(tp=20, fn=5, fp=10, tn=65)
    truth = [1] * 25 + [0] * 75
    called = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 65
    assert counts.kappa == pytest.approx(sk.cohen_kappa_score(truth, called))
    assert math.isnan(m.Counts(tn=5).kappa)


def test_the_interval_of_kappa_draws_patients():
    """Against scikit-learn's kappa of each resample, written out."""
    rng = np.random.default_rng(3)
    tables = [rng.multinomial(20, rng.dirichlet([4, 1, 1, 1, 4, 1, 1, 1, 4])).reshape(3, 3) for _ in range(9)]
    slow = []
    for weights in m.resample_weights(9, 60, 5):
        total = sum(int(w) * table for w, table in zip(weights, tables, strict=True))
        truth, called = (np.repeat(np.indices((3, 3))[axis].ravel(), total.ravel()) for axis in (0, 1))
        slow.append(sk.cohen_kappa_score(truth, called))
    found = m.kappa_interval(tables, resamples=60, seed=5)
    np.testing.assert_allclose(found, np.quantile(slow, [0.025, 0.975]), atol=1e-12)
    assert m.kappa_interval(tables[:4]) is None
    one_class = [np.diag([5, 0, 0])] * 9
    assert m.kappa_interval(one_class) is None  # chance agrees always
