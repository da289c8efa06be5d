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

    x: B N D. size: B N patches that each token stands for (1 for prefix tokens), or None: all 1. positions:
    B N original patch of each token (-1: none of its own). owner: B n, the row among the patches that each
    original patch is now in; the number of patches left where it was dropped. score: B P moving average.
    """

    x: torch.Tensor
    size: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    score: torch.Tensor | None = None


class Reducer:
    """Runs the model of `parts` (an anatomy) by `config` (TokenConfig); `counts` are tokens after each block."""

    def __init__(self, parts, config, counts):
        self.parts, self.config, self.counts = parts, config, counts
        late = parts.depth if config.late is None else config.late
        if not -parts.depth <= late <= parts.depth:
            raise ValueError(f"late={config.late}: the model has {parts.depth} blocks")
        late += parts.depth if late < 0 else 0
        self.actions = tuple(config.action if i < late else "drop" for i in range(parts.depth))
        self.inside = config.rule == "exact"
        merges = config.action in MERGES
        self.metric = config.metric or ("input" if config.action == "ward" else "key")
        self.lengths = config.action == "ward" if config.lengths is None else config.lengths
        self.proportional = merges if config.proportional is None else config.proportional
        self.factors = random_factors(config.seed, parts.depth)
        self.total = parts.prefix + parts.patches
        reduced = min(counts) < self.total
        # a mean-pooled head counts a token as often as the patches it stands for
        self.sized = reduced and config.action != "drop" and (self.proportional or merges or not parts.read)
        self.local = any(parts.local(block) is not None for block in parts.model.blocks)
        self.owned = reduced and self.local
        self.placed = reduced and (config.score in POSITIONED or (self.local and config.action == "drop"))
        self.averaged = config.score.endswith("-ema")

    def __call__(self, images, seen=None):
        """images -> logits; `seen`: lists to fill with what each block leaves (see TokenViT)."""
        return self.finish(self.start(images, seen is not None), 0, seen)

    def start(self, images, record=False):
        """images -> the sequence before the first block."""
        x = self.parts.embed(images)
        state, b, prefix = Tokens(x), len(x), self.parts.prefix
        rows = torch.arange(self.total, device=x.device) - prefix
        if record or self.placed:
            state.positions = rows.expand(b, -1)
        if record or self.owned:
            state.owner = rows[prefix:].expand(b, -1)
        return state

    def finish(self, state, layer, seen=None):
        """Blocks from `layer` on, and the head -> logits."""
        parts = self.parts
        for i in range(layer, parts.depth - 1):
            state = self.block(i, state)
            self._note(seen, state)
        last = parts.depth - 1
        if self.config.lean and parts.read:
            state = self._read_rows(state)
            self._note(seen, state)
            return parts.finish(state.x[:, : parts.read], None)
        if self.config.lean and parts.late_norm and (self.inside or self.counts[last] == state.x.shape[1]):
            state, _ = self._attend(last, state)
            self._note(seen, state)
            return parts.finish_mean(self._mean(state))
        state = self.block(last, state)
        self._note(seen, state)
        return parts.finish(state.x, state.size)

    def block(self, layer, state):
        """One block; `counts[layer]` tokens leave it."""
        block = self.parts.model.blocks[layer]
        untouched = state.size is None and not (self.local and state.x.shape[1] < self.total)
        if untouched and self.counts[layer] == state.x.shape[1]:
            return dataclasses.replace(state, x=block(state.x))
        state, pending = self._attend(layer, state)
        return self._carry_out(pending, dataclasses.replace(state, x=state.x + self._mlp(block, state)))

    def view(self, layer, state, query=None, key=None, value=None):
        """What the scores see of block `layer`."""
        parts, config, block = self.parts, self.config, self.parts.model.blocks[layer]
        if query is None:
            query, key, value = parts.split(block, block.norm1(state.x))
        positions = None if state.positions is None else state.positions[:, parts.prefix :]
        return View(query, key, value, parts.prefix, parts.read, self._bias(state), positions, state.score,
                    config.ema, self.factors[layer], parts.grid, parts.scale(block))  # fmt: skip

    def _bias(self, state):
        """Proportional attention: a token that stands for s patches is attended s times (ToMe, eq. 1)."""
        return state.size.log()[:, None, None] if self.proportional and state.size is not None else None

    def _attend(self, layer, state):
        """x + attention -> (state, plans that are still to be carried out, after the MLP)."""
        parts, block, action = self.parts, self.parts.model.blocks[layer], self.actions[layer]
        normed, bias = block.norm1(state.x), self._bias(state)
        query, key, value = parts.split(block, normed)
        plans = []
        if self.counts[layer] < state.x.shape[1]:
            state, plans = self._plans(layer, self.view(layer, state, query, key, value), state, normed)
        dropped = action == "drop" and self.inside
        if plans and dropped:
            # nothing reads what the dropped ones would see, so only the survivors are queries
            query = take(query.transpose(1, 2), plans[0].stay).transpose(1, 2)
            state = self._carry_out(plans, state)
        out = parts.inner(block, parts.attend(block, query, key, value, bias))
        state = dataclasses.replace(state, x=state.x + parts.project(block, out))
        if self.inside and not dropped:
            return self._carry_out(plans, state), []
        return state, [] if self.inside else plans

    def _carry_out(self, plans, state):
        """The state after all of `plans`."""
        for plan in plans:
            x, total = plan.join(state.x)
            state = self._moved(plan, state, x, total)
        return state

    def _plans(self, layer, view, state, normed):
        """The state with its moving average, and the plans of block `layer`; normed: its normalised input."""
        action, prefix = self.actions[layer], self.parts.prefix
        score = None if action in ("merge", "ward") else SCORES[self.config.score](view)
        if self.averaged:
            state = dataclasses.replace(state, score=score)
        keys = None
        if action in MERGES:
            keys = view.patch_keys() if self.metric == "key" else F.normalize(normed[:, prefix:], dim=-1)
        left = self.counts[layer] - prefix
        return state, merge.plans(action, left, prefix, score=score, keys=keys, size=state.size,
                                  power=self.config.power, lengths=self.lengths)  # fmt: skip

    def _moved(self, plan, state, x, total):
        """The state after `plan`, with its tokens `x`; total: the mass of each, or None."""
        before, prefix = state.x.shape[1], self.parts.prefix
        size, positions, owner, score = state.size, state.positions, state.owner, state.score
        if self.sized and (size is not None or plan.target is not None):
            if plan.fused or total is None:  # else its mass is its size
                total = plan.total(torch.ones(x.shape[0], before, device=x.device) if size is None else size)
            size = total
        if positions is not None:
            positions = plan.positions(positions)
        if owner is not None:
            owner = torch.gather(plan.source(before) - prefix, 1, owner + prefix)
        if score is not None:
            padded = torch.cat([score.new_zeros(len(score), prefix), score], dim=1)
            score = plan.total(padded)[:, prefix:]
        return Tokens(x, size, positions, owner, score)

    def _mlp(self, block, state):
        if self.parts.local(block) is None or state.x.shape[1] == self.total:
            return self.parts.mlp(block, state.x)
        return self.parts.local_mlp(block, state.x, self._mixer(block, state))

    def _mixer(self, block, state):
        """The MLP's depthwise convolution for tokens that have left the grid.

        Every patch of the grid gets the hidden features of the token it is in (nothing where it was dropped,
        as beyond the border), the convolution runs over the whole grid, and a token gets the mean over its
        patches.
        """
        parts, owner = self.parts, state.owner
        prefix, left = parts.prefix, state.x.shape[1] - parts.prefix
        whole = self.config.action != "drop" and "drop" not in self.actions

        def mix(hidden):
            patches = hidden[:, prefix:]
            image = take(patches, owner if whole else owner.clamp_max(left - 1))
            image = image if whole else image * (owner < left)[..., None]
            image = image.unflatten(1, parts.grid).permute(0, 3, 1, 2)
            out = parts.local(block)(image).permute(0, 2, 3, 1).flatten(1, 2)
            mixed = patches + self._gathered(out, state, left)
            return torch.cat([hidden[:, :prefix], mixed], dim=1) if prefix else mixed

        return mix

    def _gathered(self, out, state, left):
        """Grid B n H -> tokens B P H: the mean over each token's patches."""
        if self.config.action == "drop":
            return take(out, state.positions[:, self.parts.prefix :])
        owner, size = state.owner, state.size
        sums = add_rows(out.new_zeros(len(out), left + 1, out.shape[2]), owner, out)[:, :left]
        if size is not None and "drop" not in self.actions:  # then a token is in as many patches as its size says
            return sums / size[:, self.parts.prefix :, None].to(out.dtype)
        ones = torch.ones(owner.shape, dtype=out.dtype, device=out.device)
        times = add_rows(out.new_zeros(len(out), left + 1), owner, ones)[:, :left]
        return sums / times[..., None]

    def _read_rows(self, state):
        """The last block for the prefix tokens that the head reads, and no others."""
        parts, block, rows = self.parts, self.parts.model.blocks[-1], self.parts.read
        query, key, value = parts.split_rows(block, block.norm1(state.x), rows)
        out = parts.inner(block, parts.attend(block, query, key, value, self._bias(state)))
        x = state.x[:, :rows] + parts.project(block, out)
        if parts.local(block) is None:
            return dataclasses.replace(state, x=x + parts.mlp(block, x))
        return dataclasses.replace(state, x=x + parts.local_mlp(block, x, lambda hidden: hidden))

    def _mean(self, state):
        """The last block's MLP and the mean of what leaves it, its second layer after the mean: B D."""
        block, x = self.parts.model.blocks[-1], state.x
        size = x.new_ones(x.shape[:2]) if state.size is None else state.size
        weight = (size / size.sum(1, keepdim=True))[..., None].to(x.dtype)
        mix = None
        if self.parts.local(block) is not None:
            mix = block.mlp.local if x.shape[1] == self.total else self._mixer(block, state)
        return self.parts.mean_mlp(block, x, weight, mix)

    def _note(self, seen, state):
        if seen is None:
            return
        seen["tokens"].append(state.x)
        seen["size"].append(state.size)
        seen["kept"].append(state.positions[:, self.parts.prefix :])
        seen["owners"].append(state.owner)
