import copy
import dataclasses
import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.compress.pruning import structured
from vitlab.compress.tokens import controller, search
from vitlab.compress.tokens import reduction as tokens
from vitlab.compress.tokens.latency import TokenLatency
from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.schedule import bipartite_rounds, schedule
from vitlab.compress.tokens.scores import SCORES, SIGNED
from vitlab.models import vit
from vitlab.models.vit import ViT, ViTConfig

BASE = {"mlp": "conv", "stem": "conv", "pool": "mean"}  # the study's own baseline
KINDS = [{}, BASE, {"distilled": True, "mlp": "conv"}, {"pool": "mean", "pool_norm": "after", "mlp": "conv"}]


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = ViT(ViTConfig(**{"dim": 32, "depth": 4, "heads": 2, "mlp_dim": 48, "num_classes": 5} | options))
    for parameter in model.parameters():  # tokens that differ, so that scores do
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def pictures(n=3, seed=1, side=32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(2.0, [143, 137, 125, 106, 81, 54, 29, 12]), (1.5, [141, 130, 112, 88, 62, 38, 19, 8]),
     (1.2, [137, 121, 98, 72, 47, 27, 13, 5]), (1.0, [134, 114, 88, 61, 38, 21, 10, 4])],
)  # fmt: skip
def test_schedule_reproduces_the_published_lists(alpha, expected):
    assert schedule(145, 8, 0.6, alpha) == expected
    assert schedule(145, 8, 0.6, alpha, rule="exact") == expected


def test_schedule_has_floors_and_protected_blocks():
    assert schedule(17, 4, 0.9, 1.0, minimum=5) == [13, 7, 6, 6]
    assert schedule(17, 4, 0.5, 1.0, protect=(0, -1)) == [17, 13, 8, 8]
    assert schedule(10, 1, 0.3, 1.0, prefix=0) == [7]  # 10 * 0.7 is 6.999... in floating point
    for wrong in ({"r_max": 1.0}, {"alpha": 0}, {"rule": "x"}, {"minimum": 0}, {"protect": (9,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            schedule(17, 4, **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_is_the_plain_model_bit_for_bit(kind):
    model, images = small(**kind), pictures()
    for action in ACTIONS:
        assert torch.equal(reduce_tokens(model, r_max=0, action=action)(images), model(images))
    lean = reduce_tokens(model, r_max=0, pooled_last=True)
    torch.testing.assert_close(lean(images), model(images), atol=1e-6, rtol=1e-5)
    assert lean.macs() < vit.macs(model.config) or (kind.get("pool") == "mean" and "pool_norm" not in kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTIONS)
def test_lean_last_block_gives_the_same_logits(kind, action):
    model, images = small(**kind), pictures()
    for rule in ("exact", "published"):
        options = {"action": action, "rule": rule, "counts": (60, 40, 30, 30)}
        torch.testing.assert_close(
            reduce_tokens(model, pooled_last=True, **options)(images), reduce_tokens(model, **options)(images), atol=2e-6, rtol=1e-5
        )


def counted(model, images):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_counted_macs_equal_the_closed_form(kind):
    model, images = small(image_size=16, depth=3, **kind), pictures(1, side=16)
    cases = [*itertools.product(ACTIONS, ("cls",), ("exact", "published"), (False, True))]
    if kind in ({}, BASE):
        cases += [("drop", score, "exact", False) for score in SCORES]
    for action, score, rule, lean in cases:
        reduced = reduce_tokens(model, action=action, score=score, rule=rule, pooled_last=lean, alpha=1.0)
        assert reduced.macs() == counted(reduced, images), (action, score, rule, lean)
    drop = reduce_tokens(model, alpha=1.0)
    assert drop.macs() < reduce_tokens(model, alpha=1.0, rule="published").macs() < vit.macs(model.config) * 1.1


@pytest.mark.parametrize("kind", [{}, BASE])
def test_a_prediction_does_not_change_with_its_batch_mates(kind):
    model, mine = small(**kind), pictures(1)
    for action, score in [*itertools.product(ACTIONS, ("cls",)), ("drop", "random"), ("drop", "received-ema")]:
        reduced = reduce_tokens(model, action=action, score=score)
        alone = reduced(mine)
        for seed in (2, 3):
            crowd = reduced(torch.cat([mine, pictures(3, seed) * 3]))
            torch.testing.assert_close(crowd[:1], alone, atol=1e-5, rtol=1e-4)


def test_a_compiled_prediction_does_not_change_with_its_batch_mates():
    model = reduce_tokens(small(depth=2, image_size=16), action="drop", counts=(10, 6))
    torch.compiler.reset()  # dynamo counts the versions of one function over all models
    mine = pictures(1, side=16)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    crowds = [torch.cat([mine, pictures(2, seed, side=16) * 3]) for seed in (2, 3)]
    first, second = (compiled(crowd) for crowd in crowds)
    torch.testing.assert_close(first[:1], second[:1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first, model(crowds[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "action"), [({}, "merge"), (BASE, "drop"), (BASE, "edge"), (BASE, "fuse")])
def test_no_graph_break_anywhere(kind, action):
    torch.compiler.reset()
    model = reduce_tokens(small(depth=2, image_size=16, **kind), action=action, score="cls-ema", late=-1)
    images = pictures(2, side=16)
    traced = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(traced(images), model(images), atol=1e-5, rtol=1e-4)


def by_hand(model, images):
    """Scores of block 0 from the explicit attention map, in float64."""
    _, seen = model(images, intermediates=True)
    _, query_key = seen["attention"][0].double(), model.blocks[0]
    full = seen["attention"][0].double()  # B heads N N
    value = query_key.attn.split(query_key.norm1(seen["embed"]))[2].double().norm(dim=-1)
    prefix = model.config.prefix_tokens
    inner = full[:, :, prefix:, prefix:]
    others = inner * (1 - torch.eye(inner.shape[-1], dtype=torch.double))
    rows = full[:, :, prefix:]
    cls = full[:, :, 0, prefix:]
    return {
        "cls": cls.mean(1), "received": others.sum(2).mean(1) / (inner.shape[-1] - 1),
        "value": (cls * value[..., prefix:]).mean(1), "norm": value[..., prefix:].mean(1),
        "entropy": (rows * rows.log()).sum(-1).mean(1), "variance": inner.var(2, correction=0).mean(1),
        "cls-normalised": (cls / cls.amax(-1, keepdim=True)).mean(1), "cls-ema": cls.mean(1),
    }  # fmt: skip


def test_the_kept_positions_are_the_top_k_of_the_stated_score():
    model, images = small(), pictures(4)
    different = 0
    for score, values in by_hand(model, images).items():
        reduced = reduce_tokens(model, score=score, counts=(20, 20, 20, 20))
        reduced(images, intermediates=True)
        expected = values.argsort(1, descending=True)[:, :19].sort(1).values
        assert torch.equal(reduced.kept[0], expected), score
        different += not torch.equal(expected[0], expected[1])
    assert different  # each image loses its own positions
    mean = small(**BASE)
    reduced = reduce_tokens(mean, score="cls", counts=(20,) * 4)
    reduced(images, intermediates=True)
    expected = by_hand(mean, images)["received"].argsort(1, descending=True)[:, :20].sort(1).values
    assert torch.equal(reduced.kept[0], expected)


def test_a_second_choice_is_made_among_the_survivors_and_averages_over_blocks():
    model, images = small(), pictures(2)
    reduced = reduce_tokens(model, score="cls-ema", ema=0.75, counts=(30, 10, 10, 10), rule="published")
    _, seen = reduced(images, intermediates=True)
    first, block = by_hand(model, images)["cls"], model.blocks[1]
    now = block.attn.map(block.norm1(seen["tokens"][0])).double()[:, :, 0, 1:].mean(1)
    both = 0.75 * first.gather(1, reduced.kept[0]) + 0.25 * now
    expected = reduced.kept[0].gather(1, both.argsort(1, descending=True)[:, :9].sort(1).values)
    assert torch.equal(reduced.kept[1], expected)


def test_controls_are_fixed_by_their_seed_and_the_grid_is_even():
    model, images = small(), pictures(2)
    def kept(**options):
        reduced = reduce_tokens(model, **({"counts": (17,) * 4} | options))
        reduced(images, intermediates=True)
        return reduced.kept[0]
    one = kept(score="random", seed=1)
    assert torch.equal(one, kept(score="random", seed=1)) and not torch.equal(one, kept(score="random", seed=2))
    grid = kept(score="grid")[0]  # 16 of 64: one in each 2x2 cell
    assert len({(int(p) // 8 // 2, int(p) % 8 // 2) for p in grid}) == 16


def test_the_mode_is_one_however_it_is_set():
    reduced, images = reduce_tokens(small(distilled=True)), pictures()
    reduced.train()
    assert isinstance(reduced(images), tuple)  # logits of both heads
    for module in reduced.modules():
        module.training = False
    assert reduced(images).shape == (3, 5)


def test_training_and_state_dict_are_the_models_own():
    model, images = small(drop_path=0.2, dropout=0.1), pictures()
    reduced = reduce_tokens(model, action="edge")
    assert list(reduced.state_dict()) == list(model.state_dict())
    assert [n for n, _ in reduced.named_parameters()] == [n for n, _ in model.named_parameters()]
    reduced.train()
    assert model.training and model.blocks[0].training
    with torch.enable_grad():
        reduced(images).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters())
    reduced.to(torch.float64).eval()
    assert model.cls_token.dtype == torch.float64 and not model.training
    reduced.active = False
    assert torch.equal(reduced(images.double()), model(images.double()))


def test_copies_pickles_and_files_hold_the_whole_model(tmp_path):
    reduced, images = reduce_tokens(small(**BASE), action="merge", power=0.3, counts=(60, 40, 30, 12)), pictures()
    tokens.save(reduced, tmp_path / "small.safetensors")
    stored = tokens.load(tmp_path / "small.safetensors")
    for other in (pickle.loads(pickle.dumps(reduced)), copy.deepcopy(reduced), stored):
        assert torch.equal(other(images), reduced(images))
        assert other.token_config == reduced.token_config and other.config == reduced.config
        other.norm.weight.data.zero_()
        assert other.plain.norm.weight is other.norm.weight and reduced.norm.weight.any()
    with pytest.raises(ValueError, match="was not written by"):
        vit.save(reduced.plain, tmp_path / "plain.safetensors")
        tokens.load(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"score": "x"}, "score='x'"), ({"action": "x"}, "action='x'"), ({"rule": "x"}, "rule='x'"),
     ({"counts": (9, 9)}, "2 entries"), ({"counts": (9, 10, 9, 9)}, "at most the one before"),
     ({"counts": (9, 9, 9, 1)}, "always stay"), ({"late": 9}, "late=9"), ({"power": -1}, "power=-1"),
     *(({"action": "fuse", "score": score}, "not positive") for score in SIGNED)],
)  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(small(), **options)


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
    lean = reduce_tokens(model, r_max=0, pooled_last=True)
    torch.testing.assert_close(lean(images), model(images), atol=1e-6, rtol=1e-5)
    for action in ACTIONS:
        reduced = reduce_tokens(model, action=action)
        logits, seen = reduced(images, intermediates=True)
        assert [x.shape[1] for x in seen["tokens"]] == list(reduced.tokens)
        assert not torch.equal(logits, model(images))
        # a bias of zeros and sizes of one: the pieces, run one by one, still give timm's output
        assert seen["kept"][0].shape[1] == reduced.tokens[0] - reduced.adapter.prefix
    assert list(reduced.state_dict()) == list(model.state_dict())


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
        keep(torch.nn.Linear(2, 2))


def test_our_model_and_timms_with_the_same_weights_agree_when_reduced():
    source, images = timm_model(), pictures()
    ours = vit.from_timm(source).eval()
    for action in ACTIONS:
        torch.testing.assert_close(
            reduce_tokens(ours, action=action)(images), reduce_tokens(source, action=action)(images), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(("kind", "action"), [({}, "drop"), (BASE, "merge")])
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_runs_in_onnxruntime(kind, action):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = reduce_tokens(small(depth=2, image_size=16, **kind), action=action, pooled_last=True), pictures(2, side=16)
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(found, model(images).numpy(), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("action", ACTIONS)
def test_captured_as_a_cuda_graph(action):
    model, images = reduce_tokens(small(**BASE).cuda(), action=action), pictures().cuda()
    expected = model(images)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(images)
    graph.replay()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_bipartite_rounds_spend_what_one_round_cannot():
    assert bipartite_rounds(28, 11) == [(14, 14, 14), (7, 7, 3)]
    assert bipartite_rounds(5, 5) == []


class Curve(dict):
    """A history: names to values."""


def test_hooks_switch_and_adapt_and_resume():
    reduced = reduce_tokens(small(), r_max=0.6)
    full, hook = reduced.tokens, controller.PruneFrom(2, ramp=2)
    seen = []
    for epoch in range(5):
        hook(epoch, reduced, Curve())
        seen.append((reduced.active, round(reduced.token_config.r_max, 3)))
    assert seen == [(False, 0.0), (False, 0.0), (True, 0.3), (True, 0.6), (True, 0.6)]
    assert reduced.tokens == full
    other = controller.PruneFrom(2, ramp=2)
    other.load_state_dict(hook.state_dict())
    other(2, reduced, Curve())
    assert reduced.token_config.r_max == 0.3  # of the full 0.6, not of what is in force
    assert controller.slope([1, 3, 5]) == 2
    adapt, curve, rates = controller.SlopeSchedule(r_max=0.3, step=0.2, start=1), Curve(val_accuracy=[10.0]), []
    for epoch, value in enumerate([20, 30, 30, 30, 20, 10]):
        adapt(epoch, reduced, curve)
        rates.append(round(reduced.token_config.r_max, 3))
        curve["val_accuracy"].append(value)
    assert rates == [0.0, 0.2, 0.3, 0.3, 0.3, 0.1]


def levels():
    return [TokenConfig(r_max=r, alpha=1.0, protect=(0,)) for r in (0.0, 0.4, 0.8)]


def test_adaptive_model_gives_each_image_its_level_whoever_is_beside_it():
    model, images = reduce_tokens(small()), pictures(6)
    sharpness = controller.AdaptiveViT(model, levels(), (1.0, 0.5)).gaze(images)[0]
    assert ((sharpness > 0) & (sharpness <= 1 + 1e-6)).all()
    upper, lower = sharpness.sort().values[[3, 1]].tolist()
    adaptive = controller.AdaptiveViT(model, levels(), (upper + 1e-7, lower + 1e-7)).eval()
    found, (chosen, _) = adaptive(images), adaptive.level(images)
    assert adaptive.used == [2, 2, 2]
    for i in range(6):
        alone = reduce_tokens(model, levels()[chosen[i]])(images[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    adaptive.per = "batch"
    assert len(adaptive.train().level(images)[0].unique()) == 1
    with pytest.raises(ValueError, match="protect the first"):
        controller.AdaptiveViT(model, [TokenConfig(r_max=0.9, alpha=1.0)])


def test_learned_controller_follows_the_price():
    adaptive = controller.AdaptiveViT(reduce_tokens(small()), levels(), (0.9, 0.8)).eval()
    images, labels = pictures(24), torch.arange(24) % 5
    with torch.enable_grad():
        shares = [controller.fit_controller(adaptive, images, labels, price=p, epochs=40)[1]["share"] for p in (0, 1e3)]
    assert shares[1] == [0, 0, 1] and shares[0] != shares[1]
    assert adaptive(images).shape == (24, 5)


def test_controller_learns_from_images_what_a_share_of_tokens_buys():
    """The features tell which half of the images has to keep its tokens: a controller at half price finds it."""
    torch.manual_seed(0)
    seen, hard = torch.randn(200, 5), torch.arange(200) % 2 == 0
    seen[:, 1] += 4.0 * hard
    table = torch.stack([torch.full((200,), 0.1), torch.where(hard, 2.0, 0.1)], dim=1)  # gentle, strong
    shares = torch.tensor([1.0, 0.5])
    found, info = controller._fitted(table, seen, shares, 0.5, 200, 0.02, 0)
    assert (found(seen).argmax(1) == 1).eq(~hard).float().mean() > 0.95
    assert info["tokens"] == pytest.approx(0.75, abs=0.03)


def test_controller_meets_a_share_or_says_what_there_is():
    adaptive = controller.AdaptiveViT(reduce_tokens(small()), levels(), (0.9, 0.8)).eval()
    images, labels = pictures(24), torch.arange(24) % 5
    shares = [sum(r.counts) / (4 * 65) for r in adaptive.reducers]
    _, info = controller.fit_controller(adaptive, images, labels, share=sum(shares) / 3, epochs=30)
    assert min(shares) <= info["tokens"] <= max(shares) and info["price"] > 0
    for wrong in ({}, {"price": 1.0, "share": 0.5}, {"share": 1.5}, {"price": -1.0}):
        with pytest.raises(ValueError, match=r"price=|share="):
            controller.fit_controller(adaptive, images, labels, **wrong)


def test_calibration_meets_its_budget_and_beats_an_even_split():
    model, images = small(image_size=16), pictures(32, side=16)
    budget = 0.75 * vit.macs(model.config)
    config = search.calibrate(model, images, macs=budget, step=3, action="merge")
    even = search.fit_budget(model, budget, alpha=1.0, action="merge")
    assert reduce_tokens(model, config).macs() <= budget and reduce_tokens(model, even).macs() <= budget
    reference = model(images)
    chosen, fixed = (search.kl_divergence(reduce_tokens(model, c), reference, images) for c in (config, even))
    assert chosen <= fixed
    schedules = [search.fit_budget(model, budget, alpha=a, action="merge") for a in search.ALPHAS[:-1]]
    assert chosen <= min(search.kl_divergence(reduce_tokens(model, c), reference, images) for c in schedules)
    shielded = search.calibrate(model, images[:8], macs=budget, step=3, action="merge", protect=(0, 2)).counts
    assert shielded[0] == 17 and shielded[2] == shielded[1], "protected blocks remove nothing"
    assert search.kl_divergence(model, reference, images) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no schedule of 'drop' costs this little"):
        search.calibrate(model, images[:2], macs=1, step=8)


@pytest.mark.parametrize("options", [{"action": "drop"}, {"action": "ward"}, {"action": "ward", "pooled_last": True},
                                     {"action": "merge", "late": -1}, {"rule": "published"}])  # fmt: skip
@pytest.mark.parametrize("kind", [{}, {"pool": "mean", "mlp": "conv"}])
def test_timed_blocks_add_up_to_the_whole(options, kind):
    """With torch's counter of operations as the clock, the parts are exactly the whole, each timed once."""
    model, images = small(image_size=16, depth=3, **kind), pictures(2, side=16)

    def operations(run):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        return counter.get_total_flops()

    meter = TokenLatency(model, images, timer=operations, **options)
    prefix = 1 - bool(kind)
    for counts in ((16, 16, 16), (12, 9, 9), (10, 10, 4), (16, 9, 5)):
        counts = tuple(c + prefix for c in counts)
        reduced = reduce_tokens(model, counts=counts, **options)
        assert meter(counts) == operations(functools.partial(reduced, images)), counts
    before = dict(meter.timed)
    meter(counts)
    assert meter.timed == before
    with pytest.raises(ValueError, match="each must be at most the one before"):
        meter((9, 12, 4))


def test_blocks_of_one_shape_are_timed_once_timms_too():
    timm = pytest.importorskip("timm")
    vit_timm = timm.models.VisionTransformer(16, 4, 3, 5, embed_dim=32, depth=3, num_heads=2).eval()
    found = TokenLatency(vit_timm, pictures(1, side=16), timer=lambda run: run() is not None, action="merge")
    assert found((12, 12, 12)) == 4, "embedding and three blocks"
    clocked = TokenLatency(vit_timm.train(), pictures(1, side=16), seconds=0.0)
    assert clocked((12, 12, 8)) > 0 and set(clocked.timed) == {
        "embedding", (17, 12, (0, "drop")), (12, 12, (0, "drop")), (12, 8, ("last", "drop"))}  # fmt: skip
    assert vit_timm.training, "the model is as it was"


def test_calibration_to_a_clock_that_counts_operations_is_calibration_to_operations():
    model, images = small(image_size=16), pictures(16, side=16)
    reduced = reduce_tokens(model, action="ward")
    budget = 0.7 * vit.macs(model.config)
    options = {"step": 4, "passes": 12, "action": "ward"}
    by_clock = search.calibrate(model, images, latency=budget, meter=lambda counts: reduced.reduce_by(
        counts=counts).macs(), **options)  # fmt: skip
    assert by_clock == search.calibrate(model, images, macs=budget, **options)
    whole = reduce_tokens(model, r_max=0.0).tokens
    assert search.calibrate(model, images, latency=1.0, meter=lambda counts: 1.0).counts == whole, "nothing to gain"
    for wrong in ({}, {"macs": 1.0, "latency": 1.0, "meter": len}, {"latency": 1.0}, {"macs": 1.0, "meter": len}):
        with pytest.raises(ValueError, match=r"give macs=\.\.\., or latency=\.\.\. with meter"):
            search.calibrate(model, images, **wrong)
    with pytest.raises(ValueError, match=r"latency=0.5: no schedule of 'drop' costs this little"):
        search.calibrate(model, images[:2], latency=0.5, meter=lambda counts: 1.0)


def cut(kind):
    """(SlimViT with heads of unequal width, a ViT of full size that has zeros where channels were cut away)."""
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
    [{"action": "drop"}, {"action": "drop", "score": "value", "rule": "published"}, {"action": "fuse"},
     {"action": "ward", "pooled_last": True}, {"action": "edge", "metric": "input", "score": "received"}],
    ids=lambda o: "-".join(map(str, o.values())),
)  # fmt: skip
def test_a_pruned_model_is_reduced_like_the_whole_one_with_zeros(kind, options):
    slim, zeroed = cut(kind)
    images = pictures(3, side=16)
    torch.testing.assert_close(slim(images), zeroed(images), atol=1e-5, rtol=1e-4)
    fewer = reduce_tokens(slim, r_max=0.6, alpha=1.0, **options)
    torch.testing.assert_close(fewer(images), reduce_tokens(zeroed, fewer.token_config)(images), atol=1e-4, rtol=1e-3)
    assert torch.equal(reduce_tokens(slim, r_max=0.0)(images), slim(images))
    assert counted(fewer, images[:1]) == fewer.macs() < slim.config.macs()
    assert reduce_tokens(slim, r_max=0.0).macs() == slim.config.macs() == counted(slim, images[:1])


def test_a_pruned_and_reduced_model_is_saved_whole(tmp_path):
    slim, _ = cut(BASE)
    fewer = reduce_tokens(slim, r_max=0.5, action="ward")
    tokens.save(fewer, tmp_path / "x.safetensors")
    again = tokens.load(tmp_path / "x.safetensors")
    assert type(again.plain) is type(slim) and again.config == slim.config
    assert torch.equal(again(pictures(2, side=16)), fewer(pictures(2, side=16)))
    bare = structured.slim(small(image_size=16), {"blocks.1.v": torch.zeros(32), "blocks.2.mlp": torch.zeros(48)})
    with pytest.raises(ValueError, match="blocks without a head, blocks without MLP channels"):
        reduce_tokens(bare)


def test_search_is_shared_and_resumed(tmp_path):
    pytest.importorskip("optuna")

    def evaluate(config):
        return 1 - config.r_max**2, 1 - config.r_max + (config.action == "merge")

    options = {"storage": tmp_path / "deep" / "study.db", "name": "s", "choices": {"action": ("drop", "merge")}}
    first = search.search(evaluate, trials=3, **options)
    done = [t.params for t in first.trials]
    again = search.search(evaluate, trials=5, **options)
    assert len(done) == 3 and len(again.trials) == 5
    assert [t.params for t in again.trials[:3]] == done
    front = search.best(again)
    assert front == sorted(front, key=lambda row: -row["accuracy"])
    assert [row["latency"] for row in front] == sorted((row["latency"] for row in front), reverse=True)
