"""Which models tokens can be taken from: timm's and pruned ones give their own outputs, or are refused by name."""

import copy
import dataclasses

import pytest
import torch
from vits import BASE, KINDS, operations, pictures, small

from vitlab.compress.pruning import structured
from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import reduce_tokens
from vitlab.models import checkpoint
from vitlab.models.timm import from_timm

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def timm_model(seed=0, distilled=False, **options):
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**TIMM | options)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


HANDLED = {
    "plain": {}, "mean": {"global_pool": "avg"}, "mean without CLS": {"global_pool": "avg", "class_token": False},
    "distillation token": {"distilled": True}, "register tokens": {"reg_tokens": 4, "no_embed_class": True},
    "LayerScale and QK-norm": {"init_values": 0.1, "qk_norm": True},
    "norms and drop-path": {"scale_attn_norm": True, "pre_norm": True, "drop_path_rate": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("name", HANDLED)
def test_timm_models_give_their_own_outputs(name):
    model, images = timm_model(**HANDLED[name]), pictures()
    assert torch.equal(reduce_tokens(model, r_max=0)(images), model(images))
    pooled = reduce_tokens(model, r_max=0, pooled_last=True)
    torch.testing.assert_close(pooled(images), model(images), atol=1e-6, rtol=1e-5)
    for action in ACTIONS:
        reduced = reduce_tokens(model, action=action)
        logits, seen = reduced(images, intermediates=True)
        assert [x.shape[1] for x in seen["tokens"]] == list(reduced.tokens)
        assert not torch.equal(logits, model(images))
        # a bias of zeros and sizes of one: the pieces, run one by one, still give timm's output
        assert seen["kept"][0].shape[1] == reduced.tokens[0] - reduced.adapter.prefix
    names = [name.replace("fc_norm", "norm") for name in model.state_dict()]
    assert sorted(reduced.state_dict()) == sorted(names)
    assert all(p is q for p, q in zip(reduced.parameters(), reduced.plain.parameters()))
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in reduced.parameters()} == shared  # so that tuning one tunes the other


@pytest.mark.parametrize("name", HANDLED)
def test_timm_blocks_run_piece_by_piece_are_timms(name):
    model, images = timm_model(**HANDLED[name]), pictures()
    reduced = reduce_tokens(model, r_max=0, action="merge")
    state = reduced.reducer.start(images)
    for layer, block in enumerate(model.blocks):
        expected = block(state.x)
        ones = torch.ones(state.x.shape[:2])
        pieces = reduced.reducer.block(layer, dataclasses.replace(state, size=ones))
        torch.testing.assert_close(pieces.x, expected, atol=1e-6, rtol=1e-5)
        state = dataclasses.replace(state, x=expected)
    torch.testing.assert_close(reduced.adapter.finish(state.x, ones), model(images), atol=1e-6, rtol=1e-5)


def test_what_timm_has_and_is_not_handled_is_refused_by_name():
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock

    for block in (ParallelScalingBlock, ParallelThingsBlock, ResPostBlock):
        with pytest.raises(ValueError, match=block.__name__):
            reduce_tokens(timm_model(block_fn=block))
    for options, message in [({"global_pool": "map"}, "attention pooling"), ({"global_pool": "max"}, "'max'"),
                             ({"patch_drop_rate": 0.5}, "patch dropout"), ({"attn_layer": "diff"}, "timm's Attention"),
                             ({"dynamic_img_size": True}, "dynamic")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            reduce_tokens(timm_model(**options))
    with pytest.raises(ValueError, match="Linear is neither"):
        reduce_tokens(torch.nn.Linear(2, 2))


def test_our_model_and_timms_with_the_same_weights_agree_when_reduced():
    source, images = timm_model(), pictures()
    ours = from_timm(source, share=False).eval()
    for action in ACTIONS:
        found = reduce_tokens(ours, action=action)(images)
        torch.testing.assert_close(found, reduce_tokens(source, action=action)(images), atol=1e-5, rtol=1e-4)


def cut(kind):
    """(a ViT with heads of unequal width, one of full size that has zeros where channels were cut away)."""
    model = small(dim=48, heads=3, image_size=16, **kind)
    draw = torch.Generator().manual_seed(3)
    masks, zeroed = {}, copy.deepcopy(model)
    for i, block in enumerate(zeroed.blocks):
        for name, n in (("qk", 48), ("v", 48), ("mlp", 48)):
            masks[f"blocks.{i}.{name}"] = torch.rand(n, generator=draw) < 0.7
        qk, v, mlp = (masks[f"blocks.{i}.{name}"] for name in ("qk", "v", "mlp"))
        rows = torch.cat([qk, qk, v])
        layers = [(block.attn.qkv, rows), (block.mlp.fc1, mlp)] + ([(block.mlp.conv, mlp)] if block.mlp.conv else [])
        for layer, left in layers:
            layer.weight.data[~left] = 0
            layer.bias.data[~left] = 0
    return structured.slim(model, masks).eval(), zeroed


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"action": "drop"}, {"action": "drop", "score": "cls-ema", "rule": "published"}, {"action": "fuse"},
     {"action": "size-priced", "pooled_last": True}, {"action": "merge", "metric": "input"},
     {"action": "fuse", "score": "received"}],
    ids=lambda o: "-".join(map(str, o.values())),
)  # fmt: skip
def test_a_pruned_model_is_reduced_like_the_whole_one_with_zeros(kind, options):
    slim, zeroed = cut(kind)
    images = pictures(3, side=16)
    torch.testing.assert_close(slim(images), zeroed(images), atol=1e-5, rtol=1e-4)
    fewer = reduce_tokens(slim, r_max=0.6, alpha=1.0, **options)
    torch.testing.assert_close(fewer(images), reduce_tokens(zeroed, fewer.token_config)(images), atol=1e-4, rtol=1e-3)
    assert torch.equal(reduce_tokens(slim, r_max=0.0)(images), slim(images))
    assert operations(fewer, images[:1]) == fewer.macs() < slim.config.macs()
    assert reduce_tokens(slim, r_max=0.0).macs() == slim.config.macs() == operations(slim, images[:1])


def test_a_pruned_and_reduced_model_is_saved_whole(tmp_path):
    slim, _ = cut(BASE)
    fewer = reduce_tokens(slim, r_max=0.5, action="size-priced")
    checkpoint.save(fewer, tmp_path / "x.safetensors")
    again = checkpoint.load(tmp_path / "x.safetensors")
    assert type(again.plain) is type(slim) and again.plain.config == slim.config
    assert torch.equal(again(pictures(2, side=16)), fewer(pictures(2, side=16)))
    bare = structured.slim(small(image_size=16), {"blocks.1.v": torch.zeros(32), "blocks.2.mlp": torch.zeros(48)})
    with pytest.raises(ValueError, match="blocks without a head, blocks without MLP channels"):
        reduce_tokens(bare)
