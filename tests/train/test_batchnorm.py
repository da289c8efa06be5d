"""Batch norm by the statistics of a whole batch that workers share out; here they are threads."""

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.batchnorm import normalised
from vitlab.train.loop import Batch, cross_entropy

CONFIG = ViTConfig(image_size=16, patch_size=8, dim=16, depth=2, heads=2, num_classes=4)


class Threads:
    """Workers that each have a share of a batch and exchange tensors."""

    def __init__(self, weights):
        self.weights, self.own = weights, threading.local()
        self.given, self.barrier = [None] * len(weights), threading.Barrier(len(weights))

    index = property(lambda self: self.own.index)
    speaks = property(lambda self: self.own.index == 0)

    def gather(self, tensor):
        self.given[self.index] = tensor
        self.barrier.wait(60)
        found = torch.stack(self.given)
        self.barrier.wait(60)  # nobody gives the next before all have read this
        return found

    def map(self, work, *parts):
        """What work(part) gives for each of the parts, by as many threads."""

        def one(index, *given):
            self.own.index = index
            try:
                return work(*given)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.weights)) as pool:
            return list(pool.map(one, range(len(self.weights)), *parts))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.25, 0.75], [0.5, 0.25, 0.25]])
def test_a_models_gradient_and_running_statistics_are_those_of_the_whole_batch(weights):
    torch.manual_seed(0)
    model = ViT(dataclasses.replace(CONFIG, stem="residual", mlp="conv")).double()
    whole, sizes = copy.deepcopy(model), [round(12 * w) for w in weights]
    given = torch.randn(12, 3, 16, 16).double(), torch.rand(12, 4).double().softmax(1), torch.randint(4, (12,))
    wanted = torch.autograd.grad(cross_entropy(whole, Batch(*given, 0))[0], [*whole.parameters()])
    team = Threads(weights)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.forward = lambda x, norm=norm: normalised(norm, x, team)

    def gradients(*part):
        return torch.autograd.grad(cross_entropy(model, Batch(*part, 0))[0], [*model.parameters()])

    found = team.map(gradients, *(t.split(sizes) for t in given))
    for of_all, *of_parts in zip(wanted, *found, strict=True):
        torch.testing.assert_close(sum(w * g for w, g in zip(weights, of_parts)), of_all, rtol=1e-9, atol=1e-14)
    for buffer, of_all in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(buffer, of_all, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_as_exact_as_torchs(dtype):
    """Of two shares in that type, against torch's own of the whole batch in float64."""
    torch.manual_seed(0)
    norm, x, target = nn.BatchNorm2d(5), 3 + 2 * torch.randn(24, 5, 7, 7), torch.randn(24, 5, 7, 7)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.normal_()

    def gradients(norm, x, target, weights):
        x = x.detach().requires_grad_()
        team = Threads(weights)
        if len(weights) == 1:
            loss = (norm(x).double() * target.double()).sum() / len(x)
            return torch.autograd.grad(loss, [x, *norm.parameters()])
        parts = [p.detach().requires_grad_() for p in x.split([round(w * len(x)) for w in weights])]
        wanted = target.split([len(part) for part in parts])

        def of(part, given):
            loss = (normalised(norm, part, team).double() * given.double()).sum() / len(part)
            return torch.autograd.grad(loss, [part, *norm.parameters()])

        found = team.map(of, parts, wanted)
        scaled = [[w * g for g in of_part] for w, of_part in zip(weights, found)]
        return torch.cat([s[0] for s in scaled]), *(sum(g) for g in zip(*(s[1:] for s in scaled)))

    exact = gradients(copy.deepcopy(norm).double(), x.to(dtype).double(), target, [1.0])
    whole, shared = (gradients(norm, x.to(dtype), target, weights) for weights in ([1.0], [0.25, 0.75]))
    for of_shares, of_torch, of_exact in zip(shared, whole, exact, strict=True):
        error, torchs = ((found.double() - of_exact).norm() / of_exact.norm() for found in (of_shares, of_torch))
        assert error < 2 * torchs + 1e-6
