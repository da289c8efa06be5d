"""Top-k attention: the mask, its relaxed gradient against finite differences, the forms of its eval pass; gates."""

import itertools

import pytest
import torch

from vitlab.metrics.counts import macs as counted
from vitlab.models.sparse import TopKAttention, _edge, gumbel, level, top_k_softmax
from vitlab.models.vit import ViT, ViTConfig

SMALL = {"image_size": 16, "patch_size": 2, "dim": 24, "depth": 2, "heads": 3, "num_classes": 5}  # 64 patches


def built(pool="mean", **arguments):
    torch.manual_seed(0)
    return ViT(ViTConfig(**SMALL, pool=pool, attention="topk", attention_args=arguments))


def layer(pool="mean", **arguments):
    attn = built(pool, **arguments).blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight.mul_(20)  # tables that are not flat
    return attn.eval()


def tokens(attn, batch=3):
    return torch.randn(batch, attn.tokens, 24, generator=torch.Generator().manual_seed(1))


def table(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relaxed(logits, scores, k, tau):
    """The function whose derivative the backward pass is to have, lambda by bisection."""
    low, high = scores.amin(-1, keepdim=True) - 30 * tau, scores.amax(-1, keepdim=True) + 30 * tau
    for _ in range(100):
        middle = (low + high) / 2
        more = ((scores - middle) / tau).sigmoid().sum(-1, keepdim=True) > k
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return ((scores - low) / tau).sigmoid()


@pytest.mark.parametrize("tau", [0.1, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(("n", "k"), [(9, 1), (64, 8), (197, 32), (197, 196)])
def test_the_relaxed_mask_sums_to_k(n, k, tau):
    scores = 3 * table(20, n) + gumbel(table(20, n))
    best = scores.topk(k + 1).values
    found = level(scores, k, tau, best[:, -2:].mean(-1, keepdim=True))
    assert (((scores - found) / tau).sigmoid().sum(-1) - k).abs().max() < 1e-3 * k


@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_edge_of_the_chosen_is_that_of_all_values_in_order(k):
    scores = table(5, 12)
    scores[0] = 1.0  # ties
    scores[1, :1] = torch.inf  # a prefix token
    after, least = _edge(scores, k)
    ordered = scores.sort(dim=-1, descending=True).values
    assert torch.equal(after, ordered[:, k : k + 1]) and torch.equal(least, ordered[:, k - 1 : k])


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_gradients_reach_the_scores_as_finite_differences_say(tau):
    """d loss / d score = sum over keys of (d loss / d mask) (d relaxed mask / d score), at the hard mask."""
    n, k, step = 12, 4, 1e-6
    logits, scores, wanted = table(1, 2, 3, n), table(1, 2, 3, n, seed=1), table(1, 2, 3, n, seed=2)
    logits.requires_grad_(), scores.requires_grad_()
    (top_k_softmax(logits, scores, k, tau) * wanted).sum().backward()
    hard = (scores >= scores.topk(k).values[..., -1:]).double().requires_grad_()
    free = logits.detach().clone().requires_grad_()
    mass = free.softmax(-1) * hard
    (mass / mass.sum(-1, keepdim=True) * wanted).sum().backward()
    torch.testing.assert_close(logits.grad, free.grad)
    slopes = torch.empty_like(scores)
    for j in range(n):
        shift = torch.zeros(n, dtype=torch.float64)
        shift[j] = step
        up, down = (relaxed(logits, scores.detach() + sign * shift, k, tau) for sign in (1, -1))
        slopes[..., j] = ((up - down) / (2 * step) * hard.grad).sum(-1).detach()
    torch.testing.assert_close(scores.grad, slopes, atol=1e-5, rtol=1e-3)
    left_out = scores.grad[hard == 0]
    assert (left_out != 0).all(), "a key that was left out must be able to come back"


@pytest.mark.parametrize("arguments", [{"score": "attention"}, {"score": "learned"}, {"block": 8}])
def test_training_teaches_what_ranks_the_keys(arguments, monkeypatch):
    """Without the way through the scores queries and keys get another gradient, and learned scores none."""
    images, found = torch.randn(4, 3, 16, 16), []
    scores = TopKAttention.scores
    for way in (scores, lambda *given: scores(*given).detach()):
        monkeypatch.setattr(TopKAttention, "scores", way)
        model = built(k=16, **arguments).train()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        found.append([block.attn for block in model.blocks])
    for attn, other in zip(*found):
        ours, theirs = (a.qkv.weight.grad[:48] for a in (attn, other))  # queries and keys
        assert (ours - theirs).norm() > 0.01 * theirs.norm()
        if arguments.get("score") == "learned":
            assert (attn.rank.grad != 0).all() and other.rank.grad is None


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("score", ["attention", "learned"])
def test_a_query_reads_k_keys_whose_weights_sum_to_one(pool, score):
    attn = layer(pool, k=7, score=score)
    x = tokens(attn)
    for training in (False, True):
        attn.training = training
        weights = attn.weights(*attn.split(x)[:2])
        assert ((weights > 0).sum(-1) == 7).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        if pool == "cls":
            assert (weights[..., 0] > 0).all(), "CLS is never left out"


def test_draws_differ_in_training_and_follow_the_scores():
    attn = layer(k=8).train()
    q, k, _ = attn.split(tokens(attn))
    one, two = (attn.weights(q, k) > 0 for _ in range(2))
    assert not torch.equal(one, two)
    logits = (q @ k.mT) * attn.scale
    assert logits[one].mean() > logits.mean() + 0.1


@pytest.mark.parametrize("arguments", [{}, {"score": "learned"}, {"block": 8}])
def test_eval_is_deterministic_and_needs_no_batch(arguments):
    model = built(k=16, gate="hard-concrete", **arguments).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        whole = model(images)
        assert torch.equal(whole, model(images))
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("k", [1.0, 64 + 1, 1000])
def test_all_keys_are_dense_attention(pool, k):
    model = built(pool, k=k)
    dense = ViT(ViTConfig(**SMALL, pool=pool))
    dense.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), dense(images), atol=1e-6, rtol=0)
    _, seen = model.eval()(images, intermediates=True)
    _, wanted = dense(images, intermediates=True)
    for ours, theirs in zip(seen["attention"], wanted["attention"]):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arguments", [{"k": 12}, {"k": 12, "score": "learned"}, {"k": 16, "block": 4}])
def test_what_runs_equals_the_masked_table(arguments):
    attn = layer(**arguments)
    x = tokens(attn)
    q, k, v = attn.split(x)
    torch.testing.assert_close(attn.attend(q, k, v), attn.weights(q, k) @ v, atol=1e-5, rtol=1e-5)
    assert torch.equal(attn.map(x), attn.weights(q, k)) and not attn.training


def test_blocks_are_chosen_whole():
    attn = layer(k=16, block=4)
    chosen = (attn.map(tokens(attn)) > 0).unflatten(-1, (16, 4)).unflatten(-3, (16, 4))  # B h 16 4 16 4
    assert torch.equal(chosen.any(-1), chosen.all(-1)) and torch.equal(chosen.any(3), chosen.all(3))
    assert (chosen.any(-1)[:, :, :, 0].sum(-1) == 4).all()


@pytest.mark.parametrize(
    ("pool", "arguments"),
    [("cls", {"k": 9}), ("cls", {"k": 9, "score": "learned"}), ("cls", {}), ("mean", {"k": 16, "block": 8})],
)
def test_closed_macs_are_the_counted_ones(pool, arguments):
    model = built(pool, **arguments)
    assert counted(model, (3, 16, 16)) == model.config.macs()


def test_k_as_a_number_or_a_share():
    attn = layer("cls", k=0.25)
    assert (attn.k, attn.keys(1), attn.keys(30), attn.keys(0.001), attn.keys(1.0)) == (16, 2, 30, 2, 65)
    assert [layer(block=8).keys(k) for k in (20, 0.5, 3, 64)] == [16, 32, 8, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"k": k}, "k=") for k in (0, -1, 1.5, 0.0, float("nan"), "8", True, None)]
    + [({"score": "best"}, "score='best'"), ({"gate": "l2"}, "gate='l2'"),
       ({"tau": 0}, "tau=0"), ({"block": 7}, "block=7"), ({"block": 0}, "block=0"), ({"keys": 3}, "no options keys")],
)  # fmt: skip
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        built(**arguments)


def test_blocks_and_dropout_where_they_cannot_be():
    with pytest.raises(ValueError, match="block=8"):
        built("cls", block=8)
    with pytest.raises(ValueError, match="attention_dropout=0"):
        ViT(ViTConfig(**SMALL, attention="topk", attention_dropout=0.1))


def test_gates_multiply_the_heads():
    attn = layer(k=8, gate="l1")
    x = tokens(attn)
    plain = attn(x)
    with torch.no_grad():
        attn.gate.copy_(torch.tensor([0.5, 0.0, -2.0]))
    assert attn.penalty() == 2.5
    folded = attn.proj.weight * attn.open().repeat_interleave(8)
    gated = attn(x)
    attn.gate = None
    assert torch.equal(attn(x), plain)
    attn.proj.weight = torch.nn.Parameter(folded)
    torch.testing.assert_close(attn(x), gated, atol=1e-6, rtol=1e-5)


def test_hard_concrete_gates_follow_their_distribution():
    attn = layer(gate="hard-concrete").train()
    with torch.no_grad():
        attn.gate.copy_(torch.tensor([-1.5, 0.0, 3.0]))
    draws = torch.stack([attn.open(noise=True) for _ in range(20000)])
    assert ((draws >= 0) & (draws <= 1)).all() and (draws == 0).any() and (draws == 1).any()
    assert (draws > 0).float().mean(0).sum().item() == pytest.approx(attn.penalty().item(), abs=0.02)
    torch.testing.assert_close(draws.median(0).values, attn.open(), atol=0.03, rtol=0)
    assert torch.equal(attn.open(), attn.open())


def test_a_penalty_without_gates_is_refused():
    with pytest.raises(ValueError, match="gate='none'"):
        layer(k=8).penalty()


@pytest.mark.parametrize("gate", ["l1", "hard-concrete"])
def test_gates_learn(gate):
    model = built(gate=gate).train()
    loss = model(torch.randn(8, 3, 16, 16)).square().sum() + sum(b.attn.penalty() for b in model.blocks)
    loss.backward()
    assert all((b.attn.gate.grad != 0).any() for b in model.blocks)


def test_it_runs_under_autocast_and_piece_by_piece(monkeypatch):
    attn = layer("cls", k=8)
    x, grads = tokens(attn), []
    for piece, dtype in itertools.product((2**19, 1), (torch.float32, torch.bfloat16)):
        monkeypatch.setattr("vitlab.models.sparse.PIECE", piece)
        attn.zero_grad()
        torch.manual_seed(0)
        attn.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            attn(x).float().square().sum().backward()
        grads.append(attn.qkv.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[2], atol=1e-4, rtol=1e-4)
    assert torch.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.9
    assert isinstance(attn, TopKAttention)
