"""How far figures of one model may lie apart by chance: the noise that verdicts and sentences allow for."""

import math
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from vitlab.metrics.measure import show
from vitlab.metrics.statistics import holm, unpacked

# standard deviation of a single run: points for an accuracy, a share of the figure for the others; what is counted,
# and a peak of allocated memory, repeats exactly. Speed: the same models, measured for two notebooks on one machine,
# differed by 13 to 20 %, as two runs with 12 % each do.
NOISE = {"accuracy": 0.5, "speed": 0.12, "power": 0.02, "memory": 0.0, "structural": 0.0}
# the same of speed where models take turns in one run: the plain model's median in four such comparisons, minutes
# apart, spread by 3.2 % (batches of 1, 64 and 256 of two models, pooled; speed-*.json of notebook 05, one CPU thread).
# Within one comparison, ratios that repeat the same work spread by 1.1 % (its rivals-*.json): this is on the wide side.
IN_TURNS = 0.03
TIMES = ["latency_ms", "images_per_s"]  # of these the seeds' median counts: what disturbs one seed is no property
PRIOR = 10  # as many degrees of freedom NOISE counts for beside those of the runs themselves


def standard_error(values, noise, shared=0.0):
    """(standard error of the mean of runs, degrees of freedom): their own variance pooled with that of `noise`.

    shared: standard deviation of what all runs have in common, such as the test images: more runs do not lessen it.
    """
    own, freedom = len(values) - 1, PRIOR + len(values) - 1
    variance = (PRIOR * noise**2 + own * (stdev(values) ** 2 if own else 0.0)) / freedom
    return math.hypot(math.sqrt(variance / len(values)), shared), freedom


def interval(values, noise, shared=0.0):
    """(mean, standard deviation or None, margin): half the 95 % interval of the mean of the `values` of runs.

    `noise`, of one run in the values' unit, is what a single run is held to. More runs never widen that. shared: see
    `standard_error`.
    """
    error, freedom = standard_error(values, noise, shared)
    margin = float(min(stdtrit(freedom, 0.975) * error, stdtrit(PRIOR, 0.975) * math.hypot(noise, shared)))
    return fmean(values), stdev(values) if len(values) > 1 else None, margin


def p_value(values, noise, shared=0.0):
    """Two-sided p-value of the mean of runs being 0."""
    error, freedom = standard_error(values, noise, shared)
    away = abs(fmean(values))
    return float(2 * stdtr(freedom, -away / error) if error else away == 0)


def no_loss_p(values, most):
    """One-sided p-value of the mean of paired differences being a loss of `most` or more (negative is worse).

    Student's t on their own spread, without NOISE: runs that share weights, or truly agree, lie closer than two runs
    from scratch do, and can show it with three seeds. Fewer than two differences show nothing (1.0).
    """
    if len(values) < 2:
        return 1.0
    error, above = stdev(values) / math.sqrt(len(values)), fmean(values) + most
    return float(stdtr(len(values) - 1, -above / error)) if error else float(above <= 0)


def image_noise(rows, column="accuracy_top1", images=None):
    """Standard deviation (points) that the finite test set gives an accuracy: the binomial one of the rows' mean.

    column: of accuracies (%), on so many `images` (None: what the rows say in `n`); 0.0 where the rows have none.
    """
    if column not in rows or not rows[column].notna().any() or not (images or "n" in rows):
        return 0.0
    share = rows[column].mean() / 100
    return 100 * math.sqrt(share * (1 - share) / (images or rows.n.min()))


def paired_image_noise(rows, arm, other, column="accuracy_top1", images=None):
    """What to take for the `image_noise` of one accuracy where two arms were judged on the same images.

    Only images on which they disagree move the difference: its standard deviation is that of the mean over the images
    of what arm less other, mean over their common seeds, has right; of one accuracy it is 1/sqrt(2) of that. Where
    rows do not say which images were right (`right`), that of independent images, which is more.
    """
    pair = rows[rows.arm.isin([arm, other])] if column == "accuracy_top1" and "right" in rows else rows.head(0)
    pair = pair[pair.right.notna()] if len(pair) else pair
    right = {who: {row.seed: unpacked(row.right, int(row.n)) for row in pair[pair.arm == who].itertuples()}
             for who in (arm, other)}  # fmt: skip
    common = right[arm].keys() & right[other].keys()
    if not common or pair.n.nunique() > 1 or ("dataset" in pair and pair.dataset.nunique() > 1):
        return image_noise(rows, column, images)
    apart = np.mean([right[arm][seed].astype(float) - right[other][seed] for seed in common], axis=0)
    return 100 * float(apart.std()) / math.sqrt(2 * len(apart))


def run_noise(rows):
    """Standard deviation (points) to expect of one run's accuracy: its seed's, and the finite test set's."""
    return math.hypot(NOISE["accuracy"], image_noise(rows))


def change(rows, arm, other, shared=None):
    """Accuracy of one arm of `rows` less that of another, over the seeds that both have: "-1.20 ± 0.80 points".

    That is the 95 % interval of the mean, by the seeds and by the test images, which all seeds share
    (`shared`, standard deviation; None: `paired_image_noise`); a difference inside it is called unclear.
    """
    by_seed = rows.pivot(index="seed", columns="arm", values="accuracy_top1")
    apart = (by_seed[arm] - by_seed[other]).dropna().tolist()
    shared = paired_image_noise(rows, arm, other) if shared is None else shared
    mean, _, margin = interval(apart, math.sqrt(2) * NOISE["accuracy"], math.sqrt(2) * shared)
    return f"{mean:+.2f} ± {margin:.2f} points" + " (unclear)" * (abs(mean) <= margin)


def changes(by_seed, base, noise, shared=0.0):
    """What each other column of `by_seed` (seeds x arms) changes against the column `base`, seed by seed.

    DataFrame, one line an arm: change, low and high (95 % interval), p (Holm's, over all the lines). `noise`, `shared`:
    see `interval`, of one run's figure (shared: or {arm: its own}); a change has those of two.
    """
    apart = by_seed.drop(columns=base).sub(by_seed[base], axis=0)
    shared = shared if isinstance(shared, dict) else dict.fromkeys(apart, shared)
    two = {arm: (math.sqrt(2) * noise, math.sqrt(2) * shared[arm]) for arm in apart}
    found = [interval(apart[arm].tolist(), *two[arm]) for arm in apart]
    p = holm([p_value(apart[arm].tolist(), *two[arm]) for arm in apart])
    lines = [(mean, mean - margin, mean + margin, one) for (mean, _, margin), one in zip(found, p)]
    return pd.DataFrame(lines, index=apart.columns, columns=["change", "low", "high", "p"])


def over_seeds(values, column):
    """A column's values over seeds as text: "71.00 ± 1.41" (standard deviation), or "not measured"."""
    values = [float(v) for v in values if v is not None and v == v]
    text = show(fmean(values) if values else None, column)
    return text + (f" ± {show(stdev(values), column)}" if len(values) > 1 else "")


def typical(seeds):
    """{column: mean of the seeds, of a time their median}."""
    return dict(seeds.mean()) | dict(seeds[TIMES].median())


def times(one, other):
    """{column: an arm's time or speed in shares of another arm's}, by the medians of the seeds (rows) of both."""
    one, other = one.align(other, join="inner")
    known = one.columns.intersection(TIMES)
    return dict(one[known].median() / other[known].median())
