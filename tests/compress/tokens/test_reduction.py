"""Reduced models as models: outputs, batch-mates, compilation, training, files, export."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from vits import BASE, KINDS, pictures, small

from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.scores import SIGNED
from vitlab.models import checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_is_the_plain_model_bit_for_bit(kind):
    model, images = small(**kind), pictures()
    for action in ACTIONS:
        assert torch.equal(reduce_tokens(model, r_max=0, action=action)(images), model(images))
    pooled = reduce_tokens(model, r_max=0, pooled_last=True)
    torch.testing.assert_close(pooled(images), model(images), atol=1e-6, rtol=1e-5)
    assert pooled.macs() < model.config.macs() or kind.get("pool") == "mean"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTIONS)
def test_the_pooled_last_block_gives_the_same_logits(kind, action):
    model, images = small(**kind), pictures()
    for rule in ("exact", "published"):
        options = {"action": action, "rule": rule, "counts": (60, 40, 30, 30)}
        found = reduce_tokens(model, pooled_last=True, **options)(images)
        torch.testing.assert_close(found, reduce_tokens(model, **options)(images), atol=2e-6, rtol=1e-5)


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


@pytest.mark.parametrize(("kind", "action"), [({}, "merge"), (BASE, "drop"), (BASE, "size-priced"), (BASE, "fuse")])
def test_no_graph_break_anywhere(kind, action):
    torch.compiler.reset()
    model = reduce_tokens(small(depth=2, image_size=16, **kind), action=action, score="cls-ema")
    images = pictures(2, side=16)
    traced = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(traced(images), model(images), atol=1e-5, rtol=1e-4)


def test_the_former_name_of_the_size_priced_merge_is_read():
    old = TokenConfig(action="ward", r_max=0.3)
    assert old == TokenConfig(action="size-priced", r_max=0.3) and old.action == "size-priced"


def test_the_mode_is_one_however_it_is_set():
    reduced, images = reduce_tokens(small(distilled=True)), pictures()
    reduced.train()
    assert isinstance(reduced(images), tuple)  # logits of both heads
    for module in reduced.modules():
        module.training = False
    assert reduced(images).shape == (3, 5)


def test_training_and_state_dict_are_the_models_own():
    model, images = small(drop_path=0.2, dropout=0.1), pictures()
    reduced = reduce_tokens(model, action="size-priced")
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
    checkpoint.save(reduced, tmp_path / "small.safetensors")
    stored = checkpoint.load(tmp_path / "small.safetensors")
    for other in (pickle.loads(pickle.dumps(reduced)), copy.deepcopy(reduced), stored):
        assert torch.equal(other(images), reduced(images))
        assert other.token_config == reduced.token_config and other.config == reduced.config
        other.norm.weight.data.zero_()
        assert other.plain.norm.weight is other.norm.weight and reduced.norm.weight.any()
    assert stored.config.macs() == reduced.macs()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"score": "x"}, "score='x'"), ({"action": "x"}, "action='x'"), ({"rule": "x"}, "rule='x'"),
     ({"counts": (9, 9)}, "2 entries"), ({"counts": (9, 10, 9, 9)}, "at most the one before"),
     ({"counts": (9, 9, 9, 1)}, "always stay"), ({"power": -1}, "power=-1"),
     *(({"action": "fuse", "score": score}, "not positive") for score in SIGNED)],
)  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(small(), **options)


@pytest.mark.parametrize(("kind", "action"), [({}, "drop"), (BASE, "merge")])
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_runs_in_onnxruntime(kind, action):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = reduce_tokens(small(depth=2, image_size=16, **kind), action=action, pooled_last=True)
    images = pictures(2, side=16)
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
