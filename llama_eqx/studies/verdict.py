"""What runs prove, in numbers and in words that follow from the numbers."""

import contextlib
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from llama_eqx.errors import DataError
from llama_eqx.studies.registration import Contrast, Registration
from llama_eqx.studies.runs import Run
from llama_eqx.studies.statistics import Interval, equivalence_p, holm, interval, least_pairs, paired_t_p, sample_size, sign_flip_p, sign_p


class Finding(NamedTuple):
    """A contrast over the seeds that all its arms have. `role` is "contrast", "negative control" or "positive control".

    `p` is that of the t test. It and `equivalence_p` are adjusted by Holm's method over the contrasts, and unadjusted for a control.
    `verdict` is "no effect" when `equivalence_p` is below alpha; else "worse" or "better" when `p` and `sign_flip_p` both are; else
    "undecided". `sign_flip_p` does not rest on a normal distribution.

    A run that ended without finite numbers counts as worse than any other. Differences with it are infinite, or NaN where two such runs
    pull apart. Then there is no `interval`, `p` and `sign_flip_p` are those of the sign test, and equivalence cannot be shown.
    """

    name: str
    role: str
    differences: list[float]
    interval: Interval | None
    sign_flip_p: float
    t_p: float
    p: float
    equivalence_p: float
    verdict: str


def findings(runs: Sequence[Run], registration: Registration) -> list[Finding]:
    """The finding of every contrast for which there are two seeds or more."""
    values: dict[tuple[str, int], float] = {(run.arm, run.seed): run.last(registration.metric) for run in runs}
    roles = (
        ("contrast", registration.contrasts),
        ("negative control", registration.negative_controls),
        ("positive control", registration.positive_controls),
    )
    measured: list[tuple[str, str, list[float]]] = []
    for role, contrasts in roles:
        for name, contrast in contrasts.items():
            found = paired(values, contrast)
            if len(found) >= 2:
                measured.append((name, role, found))
    raw = {name: paired_t_p(found) if _finite(found) else sign_p(found) for name, _, found in measured}
    same = {name: equivalence_p(found, registration.margin) if _finite(found) else 1.0 for name, _, found in measured}
    family = [name for name, role, _ in measured if role == "contrast"]
    p, alike = raw | holm({name: raw[name] for name in family}), same | holm({name: same[name] for name in family})
    out = []
    for name, role, found in measured:
        middle = interval(found) if _finite(found) else None
        flipped, mean = (sign_flip_p(found), middle.mean) if middle else (raw[name], _excess(found))
        verdict = _verdict(max(p[name], flipped), alike[name], mean, registration.alpha)
        out.append(Finding(name, role, found, middle, flipped, raw[name], p[name], alike[name], verdict))
    return out


def _finite(differences: Sequence[float]) -> bool:
    return all(map(math.isfinite, differences))


def _excess(differences: Sequence[float]) -> float:
    """How many more differences are worse than better."""
    return float(sum(d > 0 for d in differences) - sum(d < 0 for d in differences))


def paired(values: dict[tuple[str, int], float], contrast: Contrast) -> list[float]:
    """The weighted sum over the arms, for each seed that all of them have; NaN where infinities of both signs meet."""
    seeds = set.intersection(*({seed for arm, seed in values if arm == wanted} for wanted in contrast))
    terms = [[weight * values[arm, seed] for arm, weight in contrast.items()] for seed in sorted(seeds)]
    return [math.fsum(of) if _finite(of) else sum(of) for of in terms]


def _verdict(p: float, same: float, mean: float, alpha: float) -> str:
    if same < alpha:
        return "no effect"  # within the margin, even if it is not 0
    if p < alpha:
        return "worse" if mean > 0 else "better"
    return "undecided"


def equivalence_in_words(found: Sequence[Finding], alpha: float) -> str:
    """By which interval "no effect" is judged: two one-sided tests at `alpha` find it when that of 1 - 2 alpha lies within the margin."""
    contrasts = sum(finding.role == "contrast" for finding in found)
    adjusted = f" (Holm: up to {100 - 200 * alpha / contrasts:.3g}%)" if contrasts > 1 else ""
    return f'"no effect" is judged by the {100 - 200 * alpha:.3g}% interval{adjusted}'


def in_words(found: Sequence[Finding], registration: Registration) -> str:
    """The findings, a line for each. It says "no effect" only where the equivalence test does."""
    said, seeds = [f"Differences of {registration.metric}, paired by seed, with their 95% intervals."], len(registration.seeds)
    if seeds < least_pairs(registration.alpha):
        no_p = f"the sign-flip test has no p below {2 / 2**seeds:g}"
        said.append(f"With {seeds} seed{'s' * (seeds != 1)} no difference can be shown, however large: {no_p}.")
    for role, opening in (("positive control", "The positive control"), ("negative control", "The negative control")):
        for finding in (finding for finding in found if finding.role == role):
            wanted = "worse" if role == "positive control" else "no effect"
            verb = "came out as it had to" if finding.verdict == wanted else f"did not come out {wanted}: what follows is weak"
            said.append(f"{opening} ({finding.name}) {verb}: {_numbers(finding)}.")
    if not any(finding.role == "positive control" for finding in found):
        said.append("There is no positive control: what was not found might not have been seen.")
    for finding in (finding for finding in found if finding.role == "contrast"):
        said.append(f"{finding.name[:1].upper()}{finding.name[1:]}: {_sentence(finding, registration)}.")
    return "\n".join(said)


def _sentence(finding: Finding, registration: Registration) -> str:
    numbers, margin = _numbers(finding), f"{registration.margin:g}"
    if not any(finding.differences):
        return f"{finding.verdict}, every one of {len(finding.differences)} differences is exactly 0, so these arms may compute the same"
    if finding.verdict == "no effect":
        return f"no effect, that is less than {margin} nats per token either way (p = {_p(finding.equivalence_p)} for more); {numbers}"
    if finding.verdict in ("worse", "better"):
        return f"{finding.verdict}, {numbers}, {_deciding(finding)}"
    if finding.interval is None:
        return f"undecided, no effect is shown ({_deciding(finding)}), and its absence cannot be; {numbers}"
    spread, n = statistics.stdev(finding.differences), len(finding.differences)
    more = ""
    with contextlib.suppress(DataError):  # it would take more than 10,000
        need = sample_size(registration.margin, spread, alpha=registration.alpha / max(len(registration.contrasts), 1))
        if (need := max(need, least_pairs(registration.alpha))) > n:
            unit = 10 ** (len(str(need)) - 1)  # the spread of few differences, of which this is the square, has no second digit
            more = f"; to see {margin} at this spread with 90% probability takes some {-(-need // unit) * unit:,} seeds"
    absence = f"p = {_p(finding.equivalence_p)} by the equivalence test"
    return f"undecided, neither an effect ({_deciding(finding)}) nor its absence ({absence}) is shown; {numbers}{more}"


def _deciding(finding: Finding) -> str:
    """The larger p of the two tests that must both find an effect."""
    if finding.sign_flip_p > finding.p:
        return f"p = {_p(finding.sign_flip_p)} by the sign-flip test"
    return f"p = {_p(finding.p)} by the {'t' if finding.interval else 'sign'} test after Holm's adjustment"


def _numbers(finding: Finding) -> str:
    if finding.interval is None:
        worse, better = (sum(sign * d > 0 for d in finding.differences) for sign in (1, -1))
        return f"{worse} of {len(finding.differences)} pairs are worse and {better} better"
    mean, low, high = finding.interval
    return f"{mean:+.4f} nats per token [{low:+.4f}, {high:+.4f}] over {len(finding.differences)} pairs"


def _p(p: float) -> str:
    return f"{p:.1g}" if p < 0.0095 else f"{p:.2f}"


def best_rates(runs: Sequence[Run], registration: Registration) -> tuple[dict[str, float], dict[str, dict[float, list[float]]], list[str]]:
    """The learning rate with the lowest mean loss for each tuned arm, every loss by arm and rate, and what speaks against the choice."""
    losses: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        losses.setdefault(run.arm, {}).setdefault(run.peak, []).append(run.last(registration.metric))
    best, remarks = {}, []
    for arm in registration.tune_arms:
        of = {rate: values for rate, values in sorted(losses.get(arm, {}).items())}
        lacking = [rate for rate in registration.rates if len(of.get(rate, ())) < len(registration.tune_seeds)]
        if lacking:
            remarks.append(f"{arm} lacks runs at {', '.join(f'{rate:g}' for rate in lacking)}: no rate is chosen for it")
            continue
        if not any(map(_finite, of.values())):
            remarks.append(f"at every rate a run of {arm} ended without finite numbers: no rate is chosen for it")
            continue
        best[arm] = min(of, key=lambda rate: statistics.fmean(of[rate]))
        if best[arm] in (min(of), max(of)):
            edge = "lowest" if best[arm] == min(of) else "highest"
            remarks.append(
                f"the best rate of {arm}, {best[arm]:g}, is the {edge} registered: a better one may lie beyond, which takes a registration "
                "of its own with a wider grid"
            )
    return best, losses, remarks
