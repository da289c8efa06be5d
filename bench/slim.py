"""How much of what structured pruning saves in operations is saved in time: DeiT-S and the study's baseline.

    OMP_WAIT_POLICY=passive python bench/slim.py [--models deit,ours] [--batches 1,16,64] [--share 0.7]
                                                 [--engines eager,compiled,onnxruntime] [--record]

Random weights: what is timed hangs on the widths that are left only. One width for the heads of a block, and unequal
widths. For the rest see bench/tokens.py.
"""

import torch
from tokens import main

import vitlab


def slim(plain, share):
    """{what was done: model} at `share` of the MACs of `plain`."""
    budget, side = share * plain.config.macs(), plain.config.image_size
    images = [(torch.randn(4, 3, side, side), torch.arange(4))]
    kinds = {"uniform heads": {}, "unequal heads": {"uniform": False}}
    return {what: vitlab.prune(plain, images, macs=budget, **options) for what, options in kinds.items()}


if __name__ == "__main__":
    main("slim", slim, __doc__)
