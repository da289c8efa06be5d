"""Gates: folded into the weights exactly, trained under their penalty."""

import torch

from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.gates import L1, GatedViT
from vitlab.compress.pruning.shape import KINDS
from vitlab.compress.pruning.structured import masked, slim
from vitlab.train.loop import Batch, cross_entropy
from vitlab.utils import rng

from .cases import images, ours, random_masks


def test_trained_gates_are_folded():
    model = ours("conv MLP, CLS")
    gated = GatedViT(model, kinds=KINDS)
    draw = rng.generator(0, "gates")
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.copy_(torch.randn(gate.shape, generator=draw))
        gated.gates["blocks_0_mlp"][:7] = 0
    masks = random_masks(model)
    expected = masked(gated, masks)(images())
    small = slim(gated, masks)
    assert torch.allclose(small(images()), expected, atol=2e-5, rtol=1e-5)
    assert torch.allclose(slim(gated)(images()), gated(images()), atol=2e-5, rtol=1e-5)
    assert slim(gated).config.shapes[0].hidden == 33
    assert not [n for n, _ in small.named_parameters() if "gate" in n]


def test_l1_gives_gates_its_subgradient_and_score_reads_them():
    gated = GatedViT(ours("hidden head")).train()
    with torch.no_grad():
        gated.gates["blocks_0_v"][:5] = -0.5
    torch.manual_seed(0)
    batch = Batch(images(), torch.eye(10)[:4], torch.arange(4), 0)
    grads = []
    for objective in (cross_entropy, L1(1e-2)):
        torch.manual_seed(0)  # the same dropout
        gated.zero_grad()
        objective(gated, batch)[0].backward()
        grads.append(gated.gates["blocks_0_v"].grad.clone())
    assert torch.allclose(grads[1] - grads[0], 1e-2 * gated.gates["blocks_0_v"].detach().sign(), atol=1e-6)
    assert all(p.grad is not None for n, p in gated.named_parameters())
    assert torch.equal(score(gated, "gates")["blocks.0.v"], gated.gates["blocks_0_v"].detach().abs())
