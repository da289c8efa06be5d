"""What torch-pruning does to the same model, so that ours stands beside it."""

import warnings

import torch

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.pruning.shape import narrow, prunable, sizes

# what torch-pruning may rank channels by, of what needs no images
IMPORTANCES = {"torch-pruning": "GroupMagnitudeImportance", "torch-pruning, LAMP": "LAMPImportance",
               "torch-pruning, FPGM": "FPGMImportance"}  # fmt: skip


def torch_pruning(model, macs, *, multiple=8, step=0.02, importance="torch-pruning"):
    """The channels torch-pruning would keep of `model` within `macs`: masks for `structured.slim`.

    Its `BasePruner` over all layers at once (Fang et al. 2023, "DepGraph") with one of IMPORTANCES, by default group
    magnitude, on a copy of the model's blocks in timm's ViT; head dimensions and MLP channels may go. Cut out by `slim`
    these masks give the library's own pruned model. model: a plain ViT with heads of one width. The smallest ratio that
    meets `macs`, in steps of `step`, is taken; BudgetImpossible (a ValueError) where the smallest it makes is still too
    large.
    """
    full = prunable(model)
    if any(len(b.heads) != 1 or b.heads[0][1] != b.heads[0][2] for b in full.config.shapes):
        raise ValueError("torch-pruning needs heads of equal width, the same for queries, keys and values")
    smallest = full.config.macs()
    for i in range(1, int(0.9 / step) + 1):  # not a bisection: a layer that would vanish stays whole there
        masks = _chosen(full, i * step, multiple, IMPORTANCES[importance])
        cost = narrow(full.config, masks).macs()
        if cost <= macs:
            return masks
        smallest = min(smallest, cost)
    raise BudgetImpossible(f"macs={macs:,}: torch-pruning's smallest model has {smallest:,}", smallest)


def _chosen(full, ratio, multiple, importance):
    import torch_pruning as tp

    copied = _timm(full)
    stay = [copied.patch_embed.proj, copied.head, *(b.attn.proj for b in copied.blocks),
            *(b.mlp.fc2 for b in copied.blocks)]  # fmt: skip
    side, heads = full.config.image_size, {b.attn.qkv: b.attn.num_heads for b in copied.blocks}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")
        pruner = tp.pruner.BasePruner(
            copied, torch.zeros(1, full.config.in_chans, side, side), pruning_ratio=ratio, global_pruning=True,
            importance=getattr(tp.importance, importance)(), ignored_layers=stay, num_heads=heads,
            prune_num_heads=False, prune_head_dims=True, round_to=multiple,
        )  # fmt: skip
        return _masks(pruner, copied, full.config)


def _masks(pruner, copied, config):
    names = {module: name for name, module in copied.named_modules()}
    masks = {name: torch.ones(n, dtype=torch.bool) for name, n in sizes(config, ("qk", "v", "mlp")).items()}
    for group in pruner.step(interactive=True):
        for dependency, units in group:
            name, outputs = names.get(dependency.target.module, ""), "out" in dependency.handler.__name__
            if name.endswith("attn.qkv") and outputs:
                left = torch.ones(dependency.target.module.out_features, dtype=torch.bool)
                left[units] = False
                q, _, v = left.chunk(3)
                masks[name.replace("attn.qkv", "qk")] &= q
                masks[name.replace("attn.qkv", "v")] &= v
            elif name.endswith("mlp.fc1") and outputs:
                masks[name.replace("mlp.fc1", "mlp")][units] = False
        group.prune()
    return masks


def _timm(full):
    """timm's ViT with the blocks of `full`, on the CPU; its head is a plain one and plays no part here."""
    from timm.models.vision_transformer import VisionTransformer

    c = full.config
    if c.mlp != "plain" or len({(b.heads, b.hidden) for b in c.shapes}) != 1:
        raise ValueError("torch-pruning is compared on plain ViTs with equal blocks only")
    made = VisionTransformer(
        img_size=c.image_size, patch_size=c.patch_size, in_chans=c.in_chans, num_classes=c.num_classes,
        embed_dim=c.dim, depth=len(c.shapes), num_heads=c.shapes[0].heads[0][0],
        mlp_ratio=c.shapes[0].hidden / c.dim, qkv_bias=c.qkv_bias,
    )  # fmt: skip
    blocks = {k: v.cpu() for k, v in full.state_dict().items() if k.startswith("blocks.")}
    found = made.load_state_dict(blocks, strict=False)
    if found.unexpected_keys or any(k.startswith("blocks.") for k in found.missing_keys):
        raise ValueError(f"timm's ViT does not have these blocks: {found}")
    return made.eval()
