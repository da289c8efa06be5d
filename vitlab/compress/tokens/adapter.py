"""A ViT in the pieces that token reduction runs one by one: the halves of its blocks, and its head."""

from vitlab.models.attention import Attention, attend
from vitlab.models.timm import as_vit


class Adapter:
    """`model`, a ViT or a timm VisionTransformer as ours. prefix: tokens that always stay; read: how many of them the
    head reads (0: the patches' mean); patches, depth: how many there are; grid: its side in patches; local: whether
    MLPs mix neighbours on it. ValueError names what it has that is not handled and would give wrong outputs.
    """

    def __init__(self, model):
        self.model = model = as_vit(model)
        config = model.config
        found = [f"{type(b.attn).__name__} (only softmax attention has the scores)"
                 for b in model.blocks if type(b.attn).forward is not Attention.forward][:1]  # fmt: skip
        found += [] if all(shape.heads for shape in config.shapes) else ["blocks without a head"]
        found += [] if all(shape.hidden for shape in config.shapes) else ["blocks without MLP channels"]
        if found:
            raise ValueError(f"token reduction does not handle {', '.join(found)}, which this model has")
        self.prefix, self.patches, self.depth = config.prefix_tokens, config.grid**2, len(model.blocks)
        self.grid, self.local = config.grid, config.mlp == "conv"
        self.read = 1 + config.distilled if config.pool == "cls" else 0

    @staticmethod
    def attention(block, query, key, value, bias):
        """What attention adds to the residual, B M D, for the given queries (B heads M d; unequal heads filled up)."""
        attn = block.attn
        mask = None if bias is None else bias.to(query.dtype)
        rate = attn.dropout if block.training else 0.0
        mixed = attend(query, key, value, mask=mask, dropout=rate, scale=attn.scale)
        return block.attended(attn.project(attn.joined(mixed.transpose(1, 2))))

    @staticmethod
    def mlp(block, x, mix=None):
        """What the MLP adds to the residual; mix (hidden tokens -> hidden tokens): in place of its convolution."""
        return block.mixed(block.mlp(block.norm2(x), mix))

    def finish(self, x, size=None):
        """tokens -> logits; with sizes (B N) the pooled mean counts each token as often as it stands for."""
        model = self.model
        if self.read or size is None:
            return model.classify(model.pool(x))
        if not model.config.pool_prefix:
            x, size = x[:, self.prefix :], size[:, self.prefix :]
        weight = (size / size.sum(1, keepdim=True))[..., None].to(x.dtype)
        if model.config.pool_norm == "after":
            return model.classify(model.norm((x * weight).sum(1)))
        return model.classify((model.norm(x) * weight).sum(1))
