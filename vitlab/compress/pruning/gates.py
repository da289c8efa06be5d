"""Gates: a multiplier on every unit that can be pruned, trained or masked, kept apart from the plain model.

"Channel selection" (Zhu et al. 2021, "Vision transformer pruning"; Liu et al. 2017, "Network slimming"). All gates
multiply linearly into a weight, so a gated forward pass is the plain model's with multiplied weights.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from vitlab.compress.pruning.shape import KINDS, check, head_index, prunable, sizes
from vitlab.models.checkpoint import Wrapper, register
from vitlab.train.loop import cross_entropy
from vitlab.utils.files import described


@register("gated")
@dataclass(frozen=True, kw_only=True)
class GatedConfig(Wrapper):
    """A ViT of the config `base` with trainable gates of these kinds."""

    base: object
    kinds: tuple = ("qk", "v", "mlp")

    def __post_init__(self):
        object.__setattr__(self, "kinds", tuple(self.kinds))

    def build(self):
        return GatedViT(self.base.build(), self.kinds)


class GatedViT(nn.Module):
    """A ViT whose q/k, value and MLP channels, heads, embedding channels and blocks have gates.

    model: anything `prunable` takes (it is copied). kinds: what has a trainable gate. Where the gates act:
    "qk" (query/key channels): the product of query and key channel; "v": the value channel; "heads": the
    head's output; "mlp": the hidden channel after the activation; "block": both branches with their biases;
    "embed" (once a model): every LayerNorm's output; a gate of 0 also empties the residual channel.
    `masks` of all kinds (1 = kept) multiply the gates; `mask(masks)` sets them.
    """

    def __init__(self, model, kinds=("qk", "v", "mlp"), masks=None):
        super().__init__()
        self.core = copy.deepcopy(prunable(model))
        device = next(self.core.parameters()).device
        config, self.kinds = self.core.config, tuple(kinds)
        gates = sizes(config, kinds)
        self.gates = nn.ParameterDict({_key(k): nn.Parameter(torch.ones(n, device=device)) for k, n in gates.items()})
        self.structures = sizes(config)
        for name, size in self.structures.items():
            self.register_buffer(f"mask_{_key(name)}", torch.ones(size, device=device))
        for i, block in enumerate(config.shapes):
            self.register_buffer(f"head_of_{i}", head_index(block, "v").to(device), persistent=False)
        self.mask(masks or {})
        self.train(model.training)

    @property
    def config(self):
        return GatedConfig(base=self.core.config, kinds=self.kinds)

    @property
    def shape(self):
        """The config of the model inside: its widths, macs() and parameters(), gates not counted."""
        return self.core.config

    def mask(self, masks):
        """Set masks ({structure: 0/1 or bool tensor}); structures not named keep theirs."""
        check(self.shape, masks)
        for name, mask in masks.items():
            getattr(self, f"mask_{_key(name)}").copy_(mask)

    def values(self):
        """{structure: gate times mask}, flat tensors that carry the gates' gradients."""
        found = {}
        for name in self.structures:
            mask = getattr(self, f"mask_{_key(name)}")
            found[name] = self.gates[_key(name)] * mask if _key(name) in self.gates else mask
        return found

    def penalty(self):
        """Sum of the absolute gates: the L1 penalty (0-d)."""
        return sum(value.abs().sum() for name, value in self.values().items() if _key(name) in self.gates)

    def folded(self):
        """{parameter: weight with the gates multiplied in} of the parameters that gates touch."""
        weights, config, gates, new = dict(self.core.named_parameters()), self.shape, self.values(), {}

        def scale(name, factor, axis):
            if name in weights:
                old = new.get(name, weights[name])
                new[name] = old * factor.to(old.dtype).reshape([-1 if a == axis else 1 for a in range(old.ndim)])

        for i, block in enumerate(config.shapes):
            at, gate = f"blocks.{i}.", {kind: gates.get(f"blocks.{i}.{kind}") for kind in KINDS}
            if gate["qk"] is not None:  # on the query alone: the product takes it once
                rows = torch.cat([gate["qk"], gate["qk"].new_ones(block.qk + block.v)])
                scale(at + "attn.qkv.weight", rows, 0)
                scale(at + "attn.qkv.bias", rows, 0)
            if gate["v"] is not None:
                scale(at + "attn.proj.weight", gate["v"], 1)
            if gate["heads"] is not None:
                scale(at + "attn.proj.weight", gate["heads"][getattr(self, f"head_of_{i}")], 1)
            if gate["mlp"] is not None:
                scale(at + "mlp.fc2.weight", gate["mlp"], 1)
            if gate["block"] is not None:
                for name in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
                    scale(at + name, gate["block"].expand(config.dim), 0)  # one factor for all rows
        if "embed" in gates:
            gate = gates["embed"]
            live = (gate.detach() != 0).to(gate.dtype)
            for name in weights:
                owner = name.rpartition(".")[0]
                if owner.rpartition(".")[2] in ("norm", "norm1", "norm2"):
                    scale(name, gate, 0)
                elif name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
                    scale(name, live, 2)
                elif owner == "patch_embed.proj" or owner.endswith((".attn.proj", ".mlp.fc2")):
                    scale(name, live, 0)
        return new

    def forward(self, images, intermediates=False):
        return functional_call(self.core, self.folded(), (images, intermediates))


def _key(structure):
    return structure.replace(".", "_")  # names of parameters have no dots


class L1(nn.Module):
    """Objective: `base` (cross-entropy or another) + weight * sum of |gates| of the `GatedViT` that is trained."""

    def __init__(self, weight=1e-4, base=cross_entropy):
        super().__init__()
        self.weight, self.base = weight, base

    def describe(self):
        """All that tells this objective from another, as plain data."""
        return {"weight": self.weight, "base": described(self.base)}

    @staticmethod
    def penalty(model):
        """What is penalised (0-d)."""
        return model.penalty()

    def forward(self, model, batch):
        loss, logs = self.base(model, batch)
        penalty = self.penalty(model)
        return loss + self.weight * penalty, {**logs, "l1": penalty.detach()}
