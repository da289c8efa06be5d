"""FaViT and its three teams, against dense attention with masks, the formula of Informer and counted operations."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vitlab.metrics import measure
from vitlab.models import checkpoint
from vitlab.models.factorized import probsparse, sparsity, window_attention
from vitlab.models.favit import VARIANTS, FaViT, FaViTConfig

SMALL = FaViTConfig(image_size=32, stem=(3, 2), dims=(32, 64), depths=(1, 2), heads=(1, 2), mlp_ratios=(2, 2),
                    reductions=(4, 2), window=4, samples=8, top=2.0)  # fmt: skip


def model(config=SMALL, seed=0, **changes):
    torch.manual_seed(seed)
    return FaViT(replace(config, **changes)).eval()


# ------------------------------------------------------------------------------------------ windows


def same_window(side, window, dilated):
    """N x N, True where two tokens of a side x side grid belong together; straight from the definition."""
    step = side // window
    part = (lambda i: i % step) if dilated else (lambda i: i // window)
    groups = [(part(i), part(j)) for i in range(side) for j in range(side)]
    return torch.tensor([[a == b for b in groups] for a in groups])


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize(("side", "window", "heads"), [(8, 4, 2), (6, 3, 1), (4, 4, 3)])
def test_window_attention_is_masked_dense_attention(side, window, heads, dilated):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, side, side, 6 * heads, dtype=torch.float64)
    dense = [x.flatten(1, 2).unflatten(-1, (heads, 6)).transpose(1, 2) for x in (q, k, v)]
    wanted = sdpa(*dense, attn_mask=same_window(side, window, dilated)).transpose(1, 2).reshape(q.shape)
    found = window_attention(q, k, v, window=window, heads=heads, dilated=dilated)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_one_window_is_the_same_local_or_dilated():
    q, k, v = torch.randn(3, 1, 4, 4, 8)
    near, far = (window_attention(q, k, v, window=4, heads=1, dilated=d) for d in (False, True))
    torch.testing.assert_close(near, far)


# --------------------------------------------------------------------------------------- ProbSparse


def by_the_formula(q, k, v, top):
    """Informer, eq. 3-4 with every key sampled: loops in float64, one query at a time."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = [[float(qi @ kj) / math.sqrt(len(qi)) for kj in k[b, h]] for qi in q[b, h]]
            measure_m = [max(row) - sum(row) / len(row) for row in logits]
            chosen = sorted(range(len(logits)), key=lambda i: -measure_m[i])[:top]
            for i, row in enumerate(logits):
                weights = torch.tensor(row, dtype=torch.float64).softmax(0) if i in chosen else None
                out[b, h, i] = v[b, h].mean(0) if weights is None else weights @ v[b, h]
    return out


def test_probsparse_is_informers_formula():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 2, n, 5, dtype=torch.float64) for n in (12, 9, 9))
    found, chosen = probsparse(q, k, v, top=4)
    torch.testing.assert_close(found, by_the_formula(q, k, v, 4), rtol=1e-10, atol=1e-10)
    assert chosen.shape == (2, 2, 4)


def test_probsparse_with_all_queries_is_dense():
    q, k, v = torch.randn(3, 2, 2, 16, 8, dtype=torch.float64)
    torch.testing.assert_close(probsparse(q, k, v, top=16, samples=16)[0], sdpa(q, k, v))


def test_a_query_that_looks_at_one_key_is_chosen_first():
    """A query along one of orthogonal keys is sharp, the zero query looks at all alike: M is largest and exactly 0."""
    k = 10 * torch.eye(8).view(1, 1, 8, 8)
    q = torch.zeros(1, 1, 8, 8)
    q[0, 0, 3] = k[0, 0, 5]
    found = sparsity(q, k, 1.0)[0, 0]
    assert found[3] == pytest.approx(100 - 100 / 8) and (found[[i for i in range(8) if i != 3]] == 0).all()
    assert probsparse(q, k, k, top=1)[1].item() == 3


def test_no_table_of_all_queries_and_keys_is_made():
    """Peak allocation at n = 4096 stays far below the n x n table of one head (64 MiB)."""
    from vitlab.metrics.meters import peak_memory

    q, k, v = torch.randn(3, 1, 1, 4096, 16)
    used = peak_memory(lambda a: probsparse(a, k, v, top=40, samples=25), q).activations
    assert used < 4096**2 * 4 / 8


# ---------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("changes", [
    {}, {"global_attention": "full"}, {"samples": None}, {"teams": ("local",)}, {"teams": ("global",)},
    {"teams": ("global", "dilated")}, {"teams": ("local", "dilated")}, {"window": 16}, {"image_size": 64},
])  # fmt: skip
def test_macs_are_those_counted(changes):
    config = replace(SMALL, **changes)
    assert config.macs() == measure.macs(FaViT(config), (3, config.image_size, config.image_size))


@pytest.mark.parametrize(("name", "published"), [("b0", 3.17), ("b1", 12.45), ("b2", 24.41), ("b3", 47.99)])
def test_published_parameter_counts(name, published):
    with torch.device("meta"):
        count = sum(p.numel() for p in FaViT(VARIANTS[name]).parameters())
    assert count / 1e6 == pytest.approx(published, rel=0.02)


def test_published_geometry():
    config = VARIANTS["b1"]
    assert [s * s for s in config.sides] == [3136, 784, 196, 49]
    assert [config.top_queries(i) for i in range(4)] == [40, 33, 26, 19]
    assert config.team_widths(0) == {"global": 8, "local": 28, "dilated": 28}
    assert config.team_widths(3) == {"global": 8, "local": 56}
    assert config.macs() / 1e9 == pytest.approx(2.35, rel=0.02)


def test_eval_is_deterministic_and_independent_of_the_batch():
    net, images = model(), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        together, again = net(images), net(images)
        alone = torch.cat([net(image[None]) for image in images])
    assert torch.equal(together, again)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_training_draws_other_keys_and_reaches_every_weight():
    net, images = model(samples=2).train(), torch.randn(2, 3, 32, 32)
    first = net(images)
    assert not torch.equal(first, net(images))
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_probsparse_chose_is_told():
    net = model()
    _, seen = net(torch.randn(3, 3, 32, 32), intermediates=True)
    assert [g.shape for g in seen["stages"]] == [(3, 16, 16, 32), (3, 8, 8, 64)]
    assert [c.shape for c in seen["chosen"]] == [(3, 1, SMALL.top_queries(0)), (3, 2, SMALL.top_queries(1))]
    _, without = model(teams=("local",))(torch.randn(1, 3, 32, 32), intermediates=True)
    assert without["chosen"] == [None, None]


def test_switching_a_team_off_moves_its_channels_to_the_others():
    counts = {teams: sum(p.numel() for p in model(teams=teams).parameters())
              for teams in (("global", "local", "dilated"), ("local", "dilated"), ("global",))}  # fmt: skip
    every, near, only = counts.values()
    # keys and values of a team of c channels take 2 c^2 weights: fewer, larger teams have more of them
    assert every < near < only
    assert sum(replace(SMALL, teams=("local", "dilated")).team_widths(0).values()) == 32


def test_where_the_grid_is_one_window_the_dilated_team_stands_in_for_a_local_one_that_is_off():
    config = replace(SMALL, window=8)  # the second stage's whole grid
    assert config.team_widths(1) == {"global": 4, "local": 28}
    assert replace(config, teams=("global", "dilated")).team_widths(1) == {"global": 4, "dilated": 28}


@pytest.mark.parametrize(("changes", "words"), [
    ({"image_size": 36}, "image_size=36.*nearest sizes that are: 32 and"),
    ({"window": 5}, "window"),
    ({"dims": (32,)}, "one entry"),
    ({"dims": (24, 64)}, "multiple of 16"),
    ({"teams": ("near",)}, "teams="),
    ({"teams": ()}, "teams="),
    ({"window": 0}, "window=0"),
    ({"samples": 0}, "samples=0"),
    ({"samples": 2.5}, "samples=2.5"),
    ({"top": float("nan")}, "top=nan"),
    ({"top": 0.0}, "top=0.0"),
    ({"global_attention": "sparse"}, "probsparse, full"),
    ({"stem": (2, 4)}, "stem="),
    ({"depths": (1, 0)}, "depths="),
])  # fmt: skip
def test_bad_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


def test_the_sizes_that_a_refusal_names_do():
    for size in range(8, 120):
        try:
            replace(SMALL, image_size=size)
        except ValueError as refused:
            for named in str(refused).rpartition(": ")[2].split(" and "):
                assert replace(SMALL, image_size=int(named)).image_size == int(named)


def test_a_file_gives_the_same_model_back(tmp_path):
    net, images = model(teams=("global", "local")), torch.randn(2, 3, 32, 32)
    checkpoint.save(net, tmp_path / "favit.safetensors")
    again = checkpoint.load(tmp_path / "favit.safetensors")
    assert again.config == net.config and torch.equal(again(images), net(images))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        model()(torch.randn(1, 3, 48, 48))


def test_timm_makes_it_once_vitlab_is_imported():
    code = "import timm, vitlab; print(type(timm.create_model('favit_b1', num_classes=7)).__name__)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.strip() == "FaViT", said.stderr


def test_timm_makes_each_variant_and_knows_its_images():
    import timm

    from vitlab.models.favit import register_with_timm

    register_with_timm()
    net = timm.create_model("favit_b0", num_classes=7, img_size=224)
    assert isinstance(net, FaViT) and net.config.num_classes == 7
    assert timm.get_pretrained_cfg("favit_b3").input_size == (3, 224, 224)
    with pytest.raises(ValueError, match="no weights"):
        timm.create_model("favit_b0", pretrained=True)
