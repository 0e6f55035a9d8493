"""Against scipy, and against examples that were published with their numbers."""

import itertools

import numpy as np
import pytest
from scipy import stats

from llama_eqx.errors import DataError
from llama_eqx.studies.statistics import equivalence_p, holm, interval, least_pairs, paired_t_p, power, sample_size, sign_flip_p, sign_p

# Student (1908), "The probable error of a mean", Biometrika 6: additional hours of sleep under two drugs. R's data set `sleep`.
SLEEP = np.subtract([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
# Darwin (1876): crossed minus self-fertilised maize in eighths of an inch. Fisher (1935), section 21, counts 863 of 2^15 signs with a
# sum at least as large, and so 1,726 on both sides.
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], float)


def test_students_own_example():
    """`t.test(extra ~ group, data = sleep, paired = TRUE)` in R's manual: p = 0.002833, interval -2.4598858 to -0.7001142."""
    assert interval(SLEEP) == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=1e-7)
    assert paired_t_p(SLEEP) == pytest.approx(0.002833, abs=5e-7)


def test_fishers_own_example():
    assert sign_flip_p(DARWIN) == 1726 / 2**15


@pytest.mark.parametrize("n", [2, 6, 11])
def test_against_scipy(n):
    d = np.random.default_rng(n).normal(0.3, 1, n)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.9)
    assert interval(d, 0.9) == pytest.approx((d.mean(), low, high))
    assert paired_t_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    exact = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(d) == sign_flip_p(-d) == pytest.approx(exact.pvalue)
    sides = stats.ttest_1samp(d, -0.8, alternative="greater"), stats.ttest_1samp(d, 0.8, alternative="less")
    assert equivalence_p(d, 0.8) == pytest.approx(max(side.pvalue for side in sides))


@pytest.mark.parametrize(
    "tenths",
    [
        [1, 2, -3],
        [1] * 3 + [-1] * 3,
        [10**6, 1, -2, 4],  # no two sums are equal
        *np.random.default_rng(0).integers(-9, 10, (5, 8)).tolist(),
    ],
)
def test_signs_with_equal_sums_are_counted_as_in_integers(tenths):
    sums = [abs(sum(sign * d for sign, d in zip(signs, tenths, strict=True))) for signs in itertools.product((1, -1), repeat=len(tenths))]
    exact = sum(each >= abs(sum(tenths)) for each in sums) / len(sums)
    assert sign_flip_p([d / 10 for d in tenths]) == exact


def test_the_sign_test_takes_what_is_infinite():
    d = [0.3, np.inf, 0.1, 2.0, -0.01, 5.0, np.inf, 0.2, 0.0, np.nan]  # seven above, one below, two neither
    assert sign_p(d) == sign_p(np.negative(d)) == pytest.approx(stats.binomtest(7, 8).pvalue)
    assert sign_p([np.nan, 0.0]) == 1


def test_many_differences_are_sampled():
    d = np.random.default_rng(0).normal(0.2, 1, 40)
    assert sign_flip_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=0.1)
    assert sign_flip_p(np.ones(40)) == pytest.approx(1e-5, rel=0.01)
    assert sign_flip_p([0.1, 0.2, -0.3] * 10) == 1


def test_equivalence_is_the_shorter_interval_within_the_margin():
    """p < 0.05 exactly when the 90% interval lies within the margin, and after Holm's adjustment at most a wider one."""
    d = np.random.default_rng(3).normal(0, 1, 12)
    for count in (1, 3):
        _, low, high = interval(d, 1 - 0.1 / count)
        edge = max(-low, high)
        inside, outside = ({str(i): equivalence_p(d, edge * part) for i in range(count)} for part in (1.001, 0.999))
        assert holm(inside)["0"] < 0.05 < holm(outside)["0"]


def test_holm():
    """R's manual has p.adjust(c(0.01, 0.02, 0.03, 0.04), "holm") = 0.04 0.06 0.06 0.06; the order of the names is kept."""
    assert holm({"d": 0.04, "a": 0.01, "b": 0.02, "c": 0.03}) == pytest.approx({"d": 0.06, "a": 0.04, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("effect", "sd", "alone", "among_four"),
    [(0.043, 0.028, 7, 10), (1.0, 1.0, 13, 18), (0.073, 0.023, 4, 5), (0.005, 0.002, 5, 6), (0.01, 0.02, 44, 61)],
)
def test_sample_size(effect, sd, alone, among_four):
    assert sample_size(effect, sd) == alone
    assert sample_size(effect, sd, alpha=0.05 / 4) == among_four


def test_power():
    """G*Power's manual, paired t test of d = 0.421637 and n = 50, two-sided: power 0.832114. And by counting."""
    assert power(0.421637, 1.0, 50) == pytest.approx(0.832114, abs=1e-6)
    d = np.random.default_rng(0).normal(0.8, 1, (20_000, 10))
    assert power(0.8, 1.0, 10) == pytest.approx((stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean(), abs=0.01)


@pytest.mark.parametrize("alpha", [0.25, 0.05, 0.01])
def test_the_least_number_of_pairs_at_which_signs_can_tell(alpha):
    n = least_pairs(alpha)
    assert sign_flip_p([1.0] * n) < alpha <= sign_flip_p([1.0] * (n - 1))


@pytest.mark.parametrize("effect", [0.1, 1.0, 2.0, 10.0])
def test_power_rises_with_the_number_of_pairs(effect):
    found = [power(effect, 1.0, n) for n in range(2, 60)]
    assert np.isfinite(found).all()
    assert (np.diff(found) > -1e-12).all()
    assert power(-effect, 1.0, 19) == pytest.approx(found[17])


def test_no_spread_and_no_numbers():
    assert (paired_t_p([0.0, 0.0]), paired_t_p([1.0, 1.0])) == (1, 0)
    assert (power(0.1, 0.0, 2), power(0.0, 0.0, 2)) == (1, 0)
    assert (equivalence_p([0.0, 0.0], 0.1), equivalence_p([1.0, 1.0], 0.1)) == (0, 1)
    with pytest.raises(DataError, match="more seeds"):
        interval([1.0])
    with pytest.raises(DataError, match="10,000"):
        sample_size(1e-9, 1.0)
