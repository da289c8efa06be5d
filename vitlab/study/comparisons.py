"""Arms held against each other: changes of accuracy that share their error, times that were taken in turns."""

from itertools import pairwise

import pandas as pd

from vitlab.metrics.measure import compare
from vitlab.study.noise import NOISE, changes, paired_image_noise
from vitlab.utils.device import device_of, example


def compared(rows, pairs, column="accuracy_top1", images=None):
    """How much one arm of each pair changes against the other, seed by seed: a DataFrame, a line a pair.

    rows: of arms and seeds, with a `column` of accuracies (%) on `images` images (see `noise.paired_image_noise`);
    pairs: {label: (arm, the arm it is held against)}. Columns: change, low and high (95 %
    interval, see `noise`), p (Holm's over all the pairs) and text, "+1.20 ± 0.80 points", which is called unclear where
    p is above 5 %.
    """
    paired = rows[rows.arm.isin({arm for pair in pairs.values() for arm in pair})]
    by_seed = paired.pivot(index="seed", columns="arm", values=column)
    apart = pd.DataFrame({label: by_seed[arm] - by_seed[other] for label, (arm, other) in pairs.items()}).dropna()
    shared = {label: paired_image_noise(rows, *pair, column, images) for label, pair in pairs.items()}
    found = changes(apart.assign(**{"": 0.0}), "", NOISE["accuracy"], shared)
    return found.assign(text=[f"{line.change:+.2f} ± {line.high - line.change:.2f} points"
                              + " (unclear)" * (line.p > 0.05) for line in found.itertuples()])  # fmt: skip


def ordered(rows, *orders, column="accuracy_top1", images=None):
    """(whether `orders` of arms hold, one a seed; by how many points, one a seed, the step holds that holds least; what
    the test images leave open of that step).

    rows, column, images: as in `compared`; orders: tuples of arms, the best first. The second and third are what a
    statement about an order is settled with: the step with the smallest mean, so that it tells of all of them.
    """
    by_seed = rows.pivot(index="seed", columns="arm", values=column)
    pairs = [pair for order in orders for pair in pairwise(order)]
    steps = pd.DataFrame({i: by_seed[arm] - by_seed[other] for i, (arm, other) in enumerate(pairs)}).dropna()
    least = steps.mean().idxmin()
    shared = paired_image_noise(rows, *pairs[least], column, images)
    return (steps > 0).all(axis=1).tolist(), steps[least].tolist(), shared


def in_turns(models, batch, seconds, *, dtype=None, rounds=1):
    """Milliseconds that each of {name: model} takes for `batch` images, timed in turns: a DataFrame, a line a round.

    What stands in one line was measured side by side, so that a busy machine hits all alike.
    """
    first = next(iter(models.values()))
    config = first.config
    images = example(first, (config.in_chans, config.image_size, config.image_size), batch)
    models = {name: model.to(device_of(first)) for name, model in models.items()}
    found = (compare(models, images, dtype=dtype, seconds=seconds, warmup=1, min_runs=3) for _ in range(rounds))
    return pd.DataFrame([{name: 1e3 * time.median_s for name, time in times.items()} for times in found])
