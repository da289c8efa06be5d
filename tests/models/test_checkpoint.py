"""The one file format: every kind of model goes in and comes out; nothing else does."""

import dataclasses
import json
import random

import pytest
import torch
from safetensors.torch import save_file

import vitlab
from vitlab.compress.pruning.gates import GatedConfig
from vitlab.compress.tokens.reduction import ReducedConfig, TokenConfig
from vitlab.models import checkpoint
from vitlab.models.checkpoint import from_dict, to_dict
from vitlab.models.resnet import ResNetConfig
from vitlab.models.vit import ViT, ViTConfig
from vitlab.utils.files import LATER, identity

SMALL = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=2)
OURS = dataclasses.replace(SMALL, stem="conv", mlp="conv", pool="mean", mlp_dim=64, attention_args={})


def random_config(draw, depth=0):
    """A config of any kind with fields drawn at random."""
    kind = draw.choice(["vit", "resnet", "gated", "reduced"] if depth < 2 else ["vit"])
    if kind == "resnet":
        widths = tuple(draw.choice((4, 8)) for _ in range(draw.randint(1, 3)))
        residual = tuple(i for i in range(len(widths)) if draw.random() < 0.5)
        return ResNetConfig(image_size=8, widths=widths, residual=residual, num_classes=draw.randint(2, 9))
    if kind in ("gated", "reduced"):
        base = vit_config(draw)
        if kind == "gated":
            gated = GatedConfig(base=base, kinds=tuple(draw.sample(("qk", "v", "mlp", "heads"), draw.randint(0, 4))))
            return gated.build().config
        tokens = TokenConfig(r_max=draw.random() * 0.9, action=draw.choice(("drop", "merge", "size-priced")),
                             protect=(0,) * draw.randint(0, 1), seed=draw.randint(0, 9))  # fmt: skip
        return ReducedConfig(base=base, tokens=tokens)
    attention = draw.choice(("softmax", "linear", "hydra"))
    arguments = {"softmax": (), "linear": (("phi", "elu"),), "hydra": (("branches", draw.randint(1, 3)),)}[attention]
    return dataclasses.replace(vit_config(draw), attention=attention, attention_args=arguments)


def vit_config(draw):
    heads, pool = draw.choice((1, 2, 4)), draw.choice(("cls", "mean"))
    return ViTConfig(
        image_size=8 * draw.randint(1, 2), num_classes=draw.randint(1, 9), dim=8 * heads, depth=draw.randint(1, 3),
        heads=heads, mlp_dim=draw.choice((None, 24)), mlp=draw.choice(("plain", "conv")),
        stem=draw.choice(("patch", "conv")), pos=draw.choice(("learned", "none")), pool=pool,
        distilled=pool == "cls" and draw.random() < 0.3, qkv_bias=draw.random() < 0.5,
        head_hidden=draw.choice((None, 8)), dropout=draw.choice((0.0, 0.1)), drop_path=draw.choice((0.0, 0.2)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_any_config_comes_back_from_plain_data_and_builds_the_same_model(seed):
    config = random_config(random.Random(seed))
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config and hash(again) == hash(config) and type(again) is type(config)
    first, second = config.build(), again.build()
    assert first.config == config
    second.load_state_dict(first.state_dict())
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        assert torch.equal(first.eval()(images), second.eval()(images))
    assert config.macs() == again.macs() > 0


@pytest.mark.parametrize("seed", range(100, 112))
def test_any_model_is_saved_and_loaded(seed, tmp_path):
    config = random_config(random.Random(seed))
    model = config.build().eval()
    checkpoint.save(model, tmp_path / "m.safetensors", about={"arm": "x", "history": [{"epoch": 1}]})
    stored, again = checkpoint.read(tmp_path / "m.safetensors"), checkpoint.load(tmp_path / "m.safetensors")
    assert stored.about == {"arm": "x", "history": [{"epoch": 1}]} and stored.config == again.config == config
    images = torch.randn(2, 3, config.image_size, config.image_size)
    assert torch.equal(again(images), model(images)) and not again.training


def test_buffers_are_kept_and_a_copy_in_half_precision_loads_as_float32(tmp_path):
    model = ViT(OURS).eval()
    model.patch_embed.layers[1].running_mean.normal_()
    checkpoint.save(model, tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(checkpoint.load(tmp_path / "m.safetensors")(images), model(images))
    checkpoint.save(model.half(), tmp_path / "h.safetensors")
    assert {t.dtype for t in checkpoint.read(tmp_path / "h.safetensors").tensors.values()} == {
        torch.float16, torch.int64}  # fmt: skip
    assert {p.dtype for p in checkpoint.load(tmp_path / "h.safetensors").parameters()} == {torch.float32}


def test_every_kind_is_registered_by_the_module_that_is_said_to():
    for kind in vitlab.KINDS:
        assert checkpoint.config_class(kind).kind == kind


def test_only_models_with_a_registered_config_are_saved(tmp_path):
    with pytest.raises(ValueError, match="Linear has no config"):
        checkpoint.save(torch.nn.Linear(2, 2), tmp_path / "x")
    model = torch.nn.Linear(2, 2)
    model.config = TokenConfig()
    with pytest.raises(ValueError, match="TokenConfig is not the config of a registered kind"):
        checkpoint.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"kind": "wings"}, "kind='wings': no such model; there are vit"),
        ({"kind": "vit", "dim": 32, "wings": 2}, "ViTConfig has no field wings"),
        ({"kind": "vit", "dim": "wide"}, "dim='wide'"),
        ({"kind": "reduced", "base": {"kind": "vit"}, "tokens": {"wings": 2}}, "TokenConfig has no field wings"),
        ({"kind": "reduced"}, "missing 1 required"),
        ({"dim": 32}, "a dictionary with a kind"),
        ([], "a dictionary with a kind"),
    ],
)
def test_unknown_kinds_fields_and_values_are_named(stored, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        from_dict(stored)
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": checkpoint.FORMAT, "config": json.dumps(stored), "about": "{}"})
    with pytest.raises(ValueError, match=said) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


def garbage(whole):
    """{what: bytes} that are no checkpoint, made from one that is."""
    size = int.from_bytes(whole[:8], "little")
    made = {"empty": b"", "JSON": b'{"key": "abc"}', "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
            "cut short": whole[:-7], "cut in the header": whole[: size // 2], "only a length": whole[:8]}  # fmt: skip
    draw = random.Random(0)
    for i in range(60):  # a bit of the header, of its length or of the weights turned over
        at = draw.randrange(8 + size if i < 40 else len(whole))
        made[f"flipped {i}"] = whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
    return made


def test_garbage_is_refused_with_the_files_name_or_is_still_the_model(tmp_path):
    path = tmp_path / "model.safetensors"
    model = ViT(SMALL)
    checkpoint.save(model, path, {"val_accuracy": 87.25})
    refused = 0
    for content in garbage(path.read_bytes()).values():
        (tmp_path / "broken.safetensors").write_bytes(content)
        try:  # a flipped bit in the very name of the checksum harms nothing else
            again, stored = (f(tmp_path / "broken.safetensors") for f in (checkpoint.load, checkpoint.read))
            assert again.config == SMALL and stored.about == {"val_accuracy": 87.25}
            assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
        except ValueError as error:
            assert "broken.safetensors" in str(error)
            refused += 1
    assert refused > 60
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        checkpoint.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors holds no model .* format is None"):
        checkpoint.read(path)


def test_identity_leaves_out_what_came_later_while_it_has_its_default():
    @dataclasses.dataclass(frozen=True)
    class First:
        lr: float = 0.1

    @dataclasses.dataclass(frozen=True)
    class Second(First):
        nesterov: bool = dataclasses.field(default=False, metadata=LATER)

    assert identity(Second()) == identity(First()) == {"lr": 0.1}
    assert identity(Second(nesterov=True)) == {"lr": 0.1, "nesterov": True}
    reduced = ReducedConfig(base=SMALL, tokens=TokenConfig(protect=(0,)))
    found = identity({"config": reduced, "at": (1, 2)})
    assert found["at"] == [1, 2] and found["config"]["kind"] == "reduced"
    assert found["config"]["base"] == {"kind": "vit"} | identity(SMALL) and found["config"]["tokens"]["protect"] == [0]
    assert json.loads(json.dumps(found)) == found
