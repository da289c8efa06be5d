"""How many tokens `vitlab apply --reduce-tokens auto` leaves: by this machine's clock, in minutes."""

import dataclasses

import torch

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.tokens.latency import TokenLatency
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.search import calibrate
from vitlab.metrics import meters
from vitlab.utils.device import device_of, example

SHARES = (0.7, 0.8, 0.9)  # of the time before, that are tried for, from the strongest on
IMAGES, PASSES = (16, 64), (10, 40)  # looked at, and how often: least and most
SEARCH = 120.0  # seconds of looking for each of SHARES, where the least does not take longer
GRID, CPU_BATCH = 16, 16  # numbers of tokens that are timed; a CPU takes as long an image in larger batches


def sought(model, small, data, batch, fields, *, seconds, worth):
    """The TokenConfig whose counts make `small` faster at that batch and change `model`'s predictions least.

    What a count costs is read off this machine's clock with `small`, what it spoils off `model`, as a model that was
    just pruned has no predictions worth keeping. What is found is timed as a whole, for `seconds`: None where no counts
    make it `worth` times as fast. fields: of TokenConfig.
    """
    shape, device = (small.config.in_chans, small.config.image_size, small.config.image_size), device_of(small)
    images = example(small, shape, batch)
    some = images if device.type == "cuda" else images[:CPU_BATCH]
    config = TokenConfig(**{"action": "size-priced", "pooled_last": True} | fields)
    print(f"\nchoosing tokens by this machine's clock at batch {len(some)}", flush=True)
    # in blocks, timed in turns with one: what else the machine does meanwhile slows both
    quick = {"device": device, "warmup": 1, "seconds": 0.02, "min_runs": 3}
    block, tokens = small.blocks[0], torch.randn(len(some), small.config.tokens, small.config.dim, device=device)

    def blocks(run):
        timed = meters.compare({"part": run, "block": lambda: block(tokens)}, **quick)
        return timed["part"].median_s / timed["block"].median_s

    meter, n = TokenLatency(small, some, config, timer=blocks), small.config.tokens
    step = -(-n // GRID)

    def clock(counts):  # of the next larger number that is timed
        return meter([min(n, -(-count // step) * step) for count in counts])

    whole = clock([n] * len(small.config.shapes))
    looks = SEARCH * len(some) / meters.latency(model, some, **quick).median_s  # at single images
    count = int(min(max(looks / PASSES[1], IMAGES[0]), IMAGES[1]))
    passes = int(min(max(looks / count, PASSES[0]), PASSES[1]))
    few = dataclasses.replace(data, train=data.train.take(count))
    for share in SHARES:
        try:
            found = calibrate(model, few, latency=share * whole, meter=clock, config=config, passes=passes)
        except BudgetImpossible:
            continue
        pair = {"whole": small, "fewer": reduce_tokens(small, found)}
        timed = meters.compare(pair, images, warmup=2, seconds=seconds, min_runs=5)
        gain = timed["whole"].median_s / timed["fewer"].median_s
        if gain >= worth:
            print(f"tokens after each block: {' '.join(map(str, found.counts))}; {gain:.2f}x as fast at batch {batch}")
            return found
    print(f"no numbers of tokens with action={config.action} make this model faster at batch {batch} here: all stay")
    return None
