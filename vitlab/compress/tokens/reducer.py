"""Running a ViT's blocks on fewer and fewer tokens."""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vitlab.compress.tokens import merge
from vitlab.compress.tokens.merge import MERGES, add_rows, take
from vitlab.compress.tokens.scores import POSITIONED, SCORES, View, random_factors


@dataclass
class Tokens:
    """The sequence between two blocks.

    x: B N D. size: B N patches that each token stands for, or None: all 1. positions: B N original patch of each token
    (-1: none of its own). owner: B n, the row among the patches that each original patch is now in; the number of
    patches left where it was dropped. score: B P moving average.
    """

    x: torch.Tensor
    size: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    score: torch.Tensor | None = None


class Reducer:
    """Runs the model of `parts` (Adapter) by `config` (TokenConfig); `counts`: tokens after each block."""

    def __init__(self, parts, config):
        self.parts, self.config = parts, config
        self.total = parts.prefix + parts.patches
        self.counts = config.counts_for(self.total, parts.depth, parts.prefix)
        self.inside = config.rule == "exact"
        self.factors = random_factors(config.seed, parts.depth)
        reduced = min(self.counts) < self.total
        self.sized = reduced and config.sized(parts.read)
        self.owned = reduced and parts.local
        self.placed = reduced and (config.score in POSITIONED or (parts.local and config.action == "drop"))

    def start(self, images, record=False):
        """images -> the sequence before the first block."""
        state, prefix = Tokens(self.parts.model.embed(images)), self.parts.prefix
        rows = torch.arange(self.total, device=state.x.device) - prefix
        if record or self.placed:
            state.positions = rows.expand(len(images), -1)
        if record or self.owned:
            state.owner = rows[prefix:].expand(len(images), -1)
        return state

    def finish(self, state, layer, seen=None):
        """Blocks from `layer` on, and the head -> logits; `seen`: lists to fill with what each block leaves."""
        parts, last = self.parts, self.parts.depth - 1
        for i in range(layer, parts.depth):
            pooled = i == last and self.config.pooled_last and parts.read
            state = self._read_rows(state) if pooled else self.block(i, state)
            if seen is not None:
                seen["tokens"].append(state.x)
                seen["size"].append(state.size)
                seen["kept"].append(state.positions[:, parts.prefix :])
                seen["owners"].append(state.owner)
        return parts.finish(state.x[:, : parts.read], None) if pooled else parts.finish(state.x, state.size)

    def block(self, layer, state):
        """One block; `counts[layer]` tokens leave it."""
        block = self.parts.model.blocks[layer]
        untouched = state.size is None and not (self.parts.local and state.x.shape[1] < self.total)
        if untouched and self.counts[layer] == state.x.shape[1]:
            return dataclasses.replace(state, x=block(state.x))
        state, pending = self._attend(layer, state)
        off_grid = self.parts.local and state.x.shape[1] < self.total
        mix = (lambda hidden: self._mixed(block, state, hidden)) if off_grid else None
        return self._carry_out(pending, dataclasses.replace(state, x=state.x + self.parts.mlp(block, state.x, mix)))

    def view(self, layer, state):
        """What the scores see of block `layer`."""
        block = self.parts.model.blocks[layer]
        query, key, _ = block.attn.split(block.norm1(state.x))
        return View(self, layer, state, query, key, self._bias(state))

    def _bias(self, state):
        """Proportional attention: a token that stands for s patches is attended s times (ToMe, eq. 1)."""
        return state.size.log()[:, None, None] if self.config.action in MERGES and state.size is not None else None

    def _attend(self, layer, state):
        """x + attention -> (state, plans that are still to be carried out, after the MLP)."""
        parts, block = self.parts, self.parts.model.blocks[layer]
        normed, bias, plans = block.norm1(state.x), self._bias(state), []
        query, key, value = block.attn.split(normed)
        if self.counts[layer] < state.x.shape[1]:
            state, plans = self._plans(layer, View(self, layer, state, query, key, bias), state, normed)
        dropped = self.config.action == "drop" and self.inside
        if plans and dropped:
            # nothing reads what the dropped ones would see, so only the survivors are queries
            query = take(query.transpose(1, 2), plans[0].stay).transpose(1, 2)
            state = self._carry_out(plans, state)
        state = dataclasses.replace(state, x=state.x + parts.attention(block, query, key, value, bias))
        if self.inside and not dropped:
            return self._carry_out(plans, state), []
        return state, [] if self.inside else plans

    def _plans(self, layer, view, state, normed):
        """The state with its moving average, and the plans of block `layer`; normed: its normalised input."""
        config, action, prefix = self.config, self.config.action, self.parts.prefix
        score = SCORES[config.score](view) if config.scored else None
        if config.score.endswith("-ema"):
            state = dataclasses.replace(state, score=score)
        keys = None
        if action in MERGES:
            keys = F.normalize(normed[:, prefix:], dim=-1) if config.likeness == "input" else view.patch_keys()
        return state, merge.plans(action, self.counts[layer] - prefix, prefix, score=score, keys=keys,
                                  size=state.size, power=config.power, lengths=config.keeps_lengths)  # fmt: skip

    def _carry_out(self, plans, state):
        """The state after all of `plans`."""
        prefix = self.parts.prefix
        for plan in plans:
            before = state.x.shape[1]
            x, mass = plan.join(state.x)
            size, positions, owner, score = state.size, state.positions, state.owner, state.score
            if self.sized and (size is not None or plan.target is not None):
                if plan.fused or mass is None:
                    size = plan.total(x.new_ones(len(x), before, dtype=torch.float32) if size is None else size)
                else:  # the mass of a row of tokens merged by size is its size
                    size = mass
            if positions is not None:
                positions = plan.positions(positions)
            if owner is not None:
                owner = torch.gather(plan.source(before) - prefix, 1, owner + prefix)
            if score is not None:
                score = plan.total(torch.cat([score.new_zeros(len(score), prefix), score], dim=1))[:, prefix:]
            state = Tokens(x, size, positions, owner, score)
        return state

    def _mixed(self, block, state, hidden):
        """The MLP's depthwise convolution for tokens that have left the grid, on their hidden features B N H.

        Every patch of the grid gets the features of the token it is in (nothing where it was dropped, as beyond the
        border), the convolution runs over the whole grid, and a token gets the mean over its patches.
        """
        parts, owner, drops = self.parts, state.owner, self.config.action == "drop"
        prefix, left = parts.prefix, state.x.shape[1] - parts.prefix
        patches = hidden[:, prefix:]
        image = take(patches, owner.clamp_max(left - 1) if drops else owner)
        image = image * (owner < left)[..., None] if drops else image
        image = image.unflatten(1, (parts.grid, -1)).permute(0, 3, 1, 2)
        out = block.mlp.conv(image).permute(0, 2, 3, 1).flatten(1, 2)
        if drops:
            out = take(out, state.positions[:, prefix:])
        else:
            if state.size is None:
                times = add_rows(out.new_zeros(len(out), left), owner, out.new_ones(owner.shape))
            else:  # a token is in as many patches as its size says
                times = state.size[:, prefix:].to(out.dtype)
            out = add_rows(out.new_zeros(len(out), left, out.shape[2]), owner, out) / times[..., None]
        mixed = patches + out
        return torch.cat([hidden[:, :prefix], mixed], dim=1) if prefix else mixed

    def _read_rows(self, state):
        """The last block for the prefix tokens that the head reads, and no others."""
        parts, block, rows = self.parts, self.parts.model.blocks[-1], self.parts.read
        query, key, value = block.attn.split(block.norm1(state.x), rows)
        x = state.x[:, :rows] + parts.attention(block, query, key, value, self._bias(state))
        # the convolution is for patches alone
        return dataclasses.replace(state, x=x + parts.mlp(block, x, lambda hidden: hidden))
