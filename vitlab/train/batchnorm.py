"""Batch norm by the statistics of a whole batch whose images workers share out: processes or threads.

A team of workers has `gather(tensor)`: the tensors that all workers give, stacked in one order; `weights`: the share of
the images that each worker has, summing to 1; and `speaks`: whether this worker keeps the running statistics. What a
worker minimises is the mean over its own images.
"""

import torch
import torch.nn.functional as F
from torch import nn

native_backward = torch.ops.aten.native_batch_norm_backward


def normalised(norm, x, team):
    """What the BatchNorm2d `norm` gives for this worker's images x, B C H W; all of `team` call it together."""
    if not norm.training:
        return nn.BatchNorm2d.forward(norm, x)
    return _BatchNorm.apply(x, norm.weight, norm.bias, norm, team)


class _BatchNorm(torch.autograd.Function):
    """Ioffe & Szegedy 2015, algorithm 1, and its gradient: fused passes over the images, means exchanged between."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, team):
        unused = (torch.zeros_like(s) for s in (norm.running_mean, norm.running_var))  # their type is the results'
        weights = torch.as_tensor(team.weights, dtype=norm.running_mean.dtype, device=x.device)[:, None]
        means, variances = team.gather(torch.stack(torch.batch_norm_update_stats(x, *unused, 0.0))).unbind(1)
        mean = (weights * means).sum(0)
        variance = (weights * (variances + (means - mean).square())).sum(0)
        if team.speaks:
            count = x.numel() / x.shape[1] / weights[team.index].item()
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        ctx.save_for_backward(x, weight, mean, variance, weights)
        ctx.eps, ctx.team = norm.eps, team
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, ctx.eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, variance, weights = ctx.saved_tensors
        as_in_eval = None, None, False, ctx.eps, [True, True, True]
        to_x, to_weight, to_bias = native_backward(gradient.contiguous(), x, weight, mean, variance, *as_in_eval)
        # mean and variance depend on x, too: dx -= scale (mean of dy + normalised x mean of (dy normalised x))
        sums = weights[:, None] * ctx.team.gather(torch.stack([to_bias, to_weight]))
        of_dy, of_product = sums.sum(0) * (x.shape[1] / x.numel())  # by own images, as this worker's loss is
        spread = (variance + ctx.eps).rsqrt()
        slope = -weight * spread.square() * of_product
        shift = -weight * spread * of_dy - slope * mean
        slope, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in (slope, shift))
        return torch.addcmul(to_x.add_(shift), x, slope), to_weight, to_bias, None, None
