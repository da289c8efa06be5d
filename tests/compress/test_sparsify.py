"""Sparse training: removal of heads equals their gates at zero, schedules, resumption in the middle, shares of keys."""

import itertools

import pytest
import torch

from vitlab.compress import sparsify
from vitlab.compress.sparsify import HeadPenalty, Progressive, allocate, best_heads, folded, importance
from vitlab.data.datasets import Dataset, Split
from vitlab.metrics.counts import macs as counted
from vitlab.models import checkpoint
from vitlab.models.attention import Attention
from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.loop import History, Recipe, cross_entropy, fit
from vitlab.utils import rng
from vitlab.utils.files import described

SMALL = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "num_classes": 4}
RECIPE = Recipe(epochs=4, batch=16, lr=5e-3, ema=0.9, augment="crop(2)+flip")


def built(seed=0, **arguments):
    torch.manual_seed(seed)
    return ViT(ViTConfig(**SMALL, attention="topk", attention_args={"gate": "l1"} | arguments))


def drawn(model, seed=0, low=-1.0):
    """Random gates."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.gate.uniform_(low, 2.0, generator=draw)
            block.attn.proj.weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8) // 2 + (labels * 30).byte()[:, None, None, None]
    part = Split(images, labels)
    return Dataset(
        name="toy", train=part, val=part, test=part, classes=tuple("abcd"), mean=(0.5,) * 3, std=(0.25,) * 3, key="toy"
    )


@pytest.mark.parametrize("arguments", [{}, {"k": 5, "score": "learned"}, {"k": 5, "gate": "hard-concrete"}])
@pytest.mark.parametrize("count", [9, 7, 4, 1, 0])
def test_removed_heads_equal_gates_at_zero(tmp_path, arguments, count):
    for seed in range(3):
        model = drawn(built(**arguments), seed)
        kept, images = best_heads(model, count=count), torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            masked = sparsify.silenced(model, kept)
            assert all((gate[~mask] == 0).all() for gate, mask in zip(importance(masked), kept))
            wanted = masked(images)
            assert count == 9 or not torch.allclose(model(images), wanted, atol=1e-3)
            sizes, names = (model.config.macs(), model.config.parameters()), model.config.attention_args
            sparsify.remove_heads(model, kept)
            torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)
            assert [len(g) for g in importance(model)] == [int(mask.sum()) for mask in kept]
            smaller = (model.config.macs(), model.config.parameters())
            assert smaller == sizes if count == 9 else all(a < b for a, b in zip(smaller, sizes))
            assert (counted(model, (3, 16, 16)), model.config.attention_args) == (model.config.macs(), names)
            checkpoint.save(model, tmp_path / "model.safetensors")
            torch.testing.assert_close(checkpoint.load(tmp_path / "model.safetensors")(images), wanted)
            torch.testing.assert_close(folded(model)(images), wanted, atol=1e-5, rtol=1e-5)


def test_a_block_may_lose_all_its_heads():
    model = drawn(built(k=5))
    images = torch.randn(2, 3, 16, 16)
    sparsify.remove_heads(model, [torch.tensor([True, False, True]), torch.zeros(3) > 0, torch.ones(3) > 0])
    before = model(images)
    assert [block.attn.heads for block in model.blocks] == [2, 0, 3]
    assert not hasattr(model.blocks[1].attn, "qkv") and model.blocks[1].attn.map(before) is None
    sparsify.remove_heads(model, [torch.tensor([False, True]), torch.zeros(0) > 0, torch.ones(3) > 0])
    assert [block.attn.heads for block in model.blocks] == [1, 0, 3]
    model.train()(images).sum().backward()
    assert all((p.grad is not None) == p.requires_grad == (p.numel() > 0) for p in model.parameters())


def test_what_is_left_of_dense_heads_is_the_plain_vit():
    model = drawn(built(gate="hard-concrete"), low=-6.0)
    images, plain = torch.randn(2, 3, 16, 16), folded(model)
    assert plain.config.attention == "softmax" and type(plain.blocks[0].attn) is Attention
    assert sum(len(shape.each_head) for shape in plain.config.shapes) < 9
    torch.testing.assert_close(plain(images), model(images), atol=1e-5, rtol=1e-5)


def test_which_heads_are_best():
    model = built()
    with torch.no_grad():
        for block, gates in zip(model.blocks, ([0.1, -0.9, 0.2], [0.3, 0.0, 0.4], [1.0, 0.5, 0.6])):
            block.attn.gate.copy_(torch.tensor(gates))
    masks = lambda **by: [m.int().tolist() for m in best_heads(model, **by)]  # noqa: E731
    assert masks(count=3) == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert masks(threshold=0.25) == [[0, 1, 0], [1, 0, 1], [1, 1, 1]]
    assert masks(threshold=0.0) == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("wrong", [{}, {"count": 10}, {"count": -1}, {"count": 1.5}, {"threshold": -0.1},
                                   {"threshold": float("nan")}, {"count": 1, "threshold": 0.1}])  # fmt: skip
def test_bad_counts_and_thresholds_are_named(wrong):
    with pytest.raises(ValueError, match="|".join(f"{k}=" for k in wrong or ["count"])):
        best_heads(built(), **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"until": -1}, "until=-1"), ({"until": 1.5}, "until=1.5"), ({"curve": "step"}, "curve='step'"),
     ({"tau": (1.0, 0.0)}, "tau="), ({"tau": (1.0,)}, "tau="), ({"heads": {1: -2}}, "heads="),
     ({"heads": {-1: 2}}, "heads="), ({"heads": {1: "few"}}, "heads="), ({"heads": {1: float("nan")}}, "heads="),
     ({"heads": {1: True}}, "heads=")],
)  # fmt: skip
def test_bad_schedules_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Progressive(**wrong)


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="attention='softmax'"):
        Progressive()(0, ViT(ViTConfig(**SMALL)), History())


@pytest.mark.parametrize(("gate", "heads", "message"), [("none", {2: 4}, "gate='none'"), ("l1", {2: 10}, "10 heads")])
def test_what_a_model_cannot_do_is_said_before_it_trains(gate, heads, message):
    with pytest.raises(ValueError, match=message):
        Progressive(heads=heads)(0, built(gate=gate), History())


def test_a_hook_serves_one_run_after_the_other_and_no_threshold_stops_a_later_count():
    hook = Progressive(heads={1: 0.5, 2: 4})
    for gate in (1.0, 0.1):
        model = built()
        with torch.no_grad():
            model.blocks[0].attn.gate.fill_(gate)
            model.blocks[1].attn.gate.fill_(0.1)
            model.blocks[2].attn.gate[:2] = 0.1
        for epoch in range(3):
            hook(epoch, model, History())
        assert [block.attn.heads for block in model.blocks] == [3 * (gate == 1), 0, 1]


@pytest.mark.parametrize("curve", sparsify.CURVES)
def test_k_and_temperature_follow_the_schedule(curve):
    model, hook, seen = built(k=3), Progressive(until=4, curve=curve, tau=(1.6, 0.1)), []
    for epoch in range(6):
        assert hook(epoch, model, History()) is None
        seen.append((model.blocks[1].attn.k, model.blocks[1].attn.tau))
    ks, taus = zip(*seen)
    assert (ks[0], taus[0]) == (17, pytest.approx(1.6)) and ks[4:] == (3, 3) and taus[5] == pytest.approx(0.1)
    assert list(ks) == sorted(ks, reverse=True) and list(taus) == sorted(taus, reverse=True)
    assert ks[2] == {"linear": 10, "cosine": 10, "cubic": 5}[curve]


def trained(data, *, stop=None, path=None, optimizer="adamw"):
    """A run with both schedules and all options, which fails at the step `stop`."""
    left = itertools.count()

    class Penalty(HeadPenalty):
        def forward(self, model, batch):
            if next(left) == stop:
                raise KeyboardInterrupt
            return super().forward(model, batch)

    rng.seed_all(1)
    model = built(k=4, score="learned", gate="hard-concrete")
    hook = Progressive(until=3, curve="linear", heads={1: 6, 3: 2})
    rest = 5e-3 if optimizer == "muon" else None
    recipe = Recipe(**{**vars(RECIPE), "optimizer": optimizer, "rest_lr": rest})
    history = fit(model, data, recipe, objective=Penalty(0.01), on_epoch=[hook], checkpoint=path, save_every=0,
                  save_within=0, log=None)  # fmt: skip
    return model, history


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("stop", [4, 6, 11, 12, 14])
def test_stopped_in_the_middle_of_the_schedule_a_run_ends_bit_identical(data, tmp_path, stop, optimizer):
    whole, history = trained(data, optimizer=optimizer)
    assert sum(block.attn.heads for block in whole.blocks) == 2 and whole.blocks[0].attn.k == 4
    with pytest.raises(KeyboardInterrupt):
        trained(data, stop=stop, path=tmp_path / "run", optimizer=optimizer)
    again, resumed = trained(data, path=tmp_path / "run", optimizer=optimizer)
    assert again.config == whole.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    told = lambda h: [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in h.rows]  # noqa: E731
    assert told(history) == told(resumed)
    alive = [sum(gate is not None for block in row["heads"] for gate in block) for row in history.rows[:-1]]
    # every removal is seen with the gates that led to it, of the heads that went too
    assert alive == [9, 6, 6] and len(history.rows[0]["heads"]) == 3
    assert [sum(map(len, row["kept"])) for row in history.rows[:-1]] == [6, 6, 2]
    assert all(history.rows[1]["heads"][b][i] is not None for b, ids in enumerate(history.rows[2]["kept"]) for i in ids)


def test_the_penalty_is_added_and_told(data):
    model, batch = built(), None
    with torch.no_grad():
        model.blocks[0].attn.gate.fill_(-2.0)
    plain = lambda m, b: (torch.zeros(()), {})  # noqa: E731
    loss, logs = HeadPenalty(0.1, plain)(model, batch)
    assert loss.item() == pytest.approx(0.1 * (6 + 3 + 3)) and logs["l1"] == 12
    keys = [described(HeadPenalty(w)) for w in (0.1, 0.2)] + [described(Progressive(until=u)) for u in (1, 2)]
    assert len({str(k) for k in keys}) == 4 and keys[0] == described(HeadPenalty(0.1, cross_entropy))


def test_keys_are_shared_out_where_they_keep_most():
    torch.manual_seed(0)
    model = ViT(ViTConfig(**SMALL))
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(60)  # sharp: a few keys have it all
    images = torch.randn(4, 3, 16, 16)
    ks = allocate(model, images, 24)
    assert sum(ks) == 24 and min(ks) >= 2 and ks[1] < ks[0] and ks[1] < ks[2]

    _, seen = model.eval()(images, intermediates=True)
    mass = lambda ks: sum(m.topk(k).values.sum(-1).mean().item() for m, k in zip(seen["attention"], ks))  # noqa: E731
    others = [c for c in itertools.product(range(2, 18), repeat=3) if sum(c) == 24]
    assert mass(ks) == pytest.approx(max(mass(c) for c in others))
    sparse = ViT(ViTConfig(**SMALL, attention="topk", attention_args={"k": ks}))
    assert [block.attn.k for block in sparse.blocks] == list(ks)
    again = checkpoint.from_dict(checkpoint.to_dict(sparse.config))
    assert again == sparse.config and again.macs() == sparse.config.macs() == counted(sparse, (3, 16, 16))
    for total in (5, 52):
        with pytest.raises(ValueError, match=f"total={total}"):
            allocate(model, images, total)
    with pytest.raises(ValueError, match="k="):
        ViTConfig(**SMALL, attention="topk", attention_args={"k": (4, 4)})
