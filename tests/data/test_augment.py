"""Specs, reproducibility, normalising and mixing."""

import pytest
import torch
import torch.nn.functional as F
from augment_cases import FULL, difference, pictures, seeded
from torchvision.transforms.v2 import functional as TF

from vitlab.data.augment import Augment, beta, draw_mix, mix, normalize
from vitlab.data.geometry import Crop, Erase, Flip, ResizedCrop
from vitlab.data.randaugment import RandAugment, TrivialAugment


def test_augment_is_reproducible_and_leaves_its_input_alone():
    augment, images = Augment(FULL), pictures(64)
    before = images.clone()
    first, second = augment(images, seeded(1)), augment(images, seeded(1))
    assert torch.equal(first, second) and torch.equal(images, before)
    assert first.dtype == torch.uint8 and first.shape == images.shape
    assert not torch.equal(first, augment(images, seeded(2)))


def test_an_image_does_not_depend_on_its_batch_mates():
    augment, images = Augment(FULL), pictures(16)
    others = images.clone()
    others[1:] = pictures(16, seed=5)[1:]
    assert torch.equal(augment(images, seeded())[0], augment(others, seeded())[0])


@pytest.mark.parametrize("part", FULL.split("+"))
def test_equal_images_are_drawn_differently(part):
    images = pictures(3)[2:].expand(64, 3, 32, 32)
    assert len(Augment(part)(images, seeded()).unique(dim=0)) > (1 if part == "flip" else 8)


def test_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    images = Augment(FULL)(pictures(8), seeded())
    mix(normalize(images, (0.5,), (0.5,)), torch.arange(8), 8, seeded(), mixup=0.8, cutmix=1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_spec_is_read_into_operations():
    operations = Augment(FULL).operations
    assert operations[:3] == [Crop(4), Flip(), RandAugment(2, 9)] and len(operations) == 8
    assert Augment(" rrc(0.5, 1) + trivial() ").operations == [ResizedCrop(0.5, 1), TrivialAugment()]
    assert Augment("crop+erase", mean=[0.1, 0.2, 0.3]).operations[1] == Erase(0.5, (0.1, 0.2, 0.3))
    images = pictures(4)
    assert Augment("")(images, seeded()) is Augment(" ")(images, seeded()) is images


@pytest.mark.parametrize(
    "spec,named",
    [
        ("crop(4)+blur(3)", "'blur(3)'"),
        ("crop(4)-flip", "'crop(4)-flip'"),
        ("crop(4)+", "unknown augmentation ''"),
        ("__import__('os').system('true')", "__import__"),
        ("crop(print(1))", "crop(print(1))"),
        ("crop(1,2,3,4)", "crop(1,2,3,4)"),
        ("crop(pad=4)", "crop(pad=4)"),
        ("crop(-1)", "padding must be a whole number of 0..1000, not -1"),
        ("crop(1.5)", "not 1.5"),
        ("erase(1.5)", "p must be a number of 0..1, not 1.5"),
        ("crop(4", "'crop(4'"),
        ("crop(4]", "'crop(4]'"),
        ("crop(4],[5)", "crop(4],[5)"),
        ("rotate(-3)", "-3"),
        ("randaugment(2,31)", "m must be a whole number of 0..30, not 31"),
        ("jitter(0.4,0.4,-0.6)", "-0.6"),
        ("jitter(hue=0.1)", "hue"),
        ("rotate('a')", "'a'"),
        ("erase(value='random')", "value"),
        ("rrc(0.08,1.5)", "high must be"),
        (("crop",), "('crop',)"),
    ],
)
def test_bad_specs_are_named(spec, named):
    with pytest.raises(ValueError) as error:
        Augment(spec)
    assert named in str(error.value)
    if isinstance(spec, str):
        assert "crop(padding)" in str(error.value) and "trivial()" in str(error.value)


def test_bad_batches_are_named():
    images = pictures(2)
    for bad, augment, named in [
        (images[0], "flip", "3, 32, 32"),
        (images.int(), "flip", "int32"),
        (images.float() / 255, "flip", "float32"),
        (images[:, :2], "trivial", "2"),
        (images, "crop(32)", "32x32"),
    ]:
        with pytest.raises(ValueError, match=named):
            Augment(augment)(bad, seeded())


@pytest.mark.parametrize("size", [None, 48, 20, 32])
def test_normalize_is_torchvisions(size):
    images, mean, std = pictures(8), (0.49, 0.48, 0.44), (0.2, 0.25, 0.3)
    expected = images.float() / 255
    if size is not None:
        expected = TF.resize(expected, [size, size], antialias=True)
    expected = TF.normalize(expected, mean, std)
    for source in (images, images.float() / 255):
        before = source.clone()
        assert torch.allclose(normalize(source, mean, std, size=size), expected, atol=1e-5)
        assert torch.equal(source, before)
    assert torch.equal(normalize(images, (0.5,), (0.2,)), normalize(images, (0.5,) * 3, (0.2,) * 3))


def test_smoothing_gives_torchs_loss():
    logits, labels = torch.randn(32, 10, generator=seeded()), torch.arange(32) % 10
    images = torch.rand(32, 3, 4, 4)
    same, targets = mix(images, labels, 10, seeded(), smoothing=0.1)
    assert same is images
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(F.cross_entropy(logits, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("mixup,cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("size", [(32, 32), (15, 20)], ids=str)
def test_targets_have_the_shares_of_the_pixels(mixup, cutmix, size):
    """Image n is n everywhere and of class n: its pixels and its target must tell the same mean."""
    count = 64
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(count, 3, *size).contiguous()
    mixed, targets = mix(images, torch.arange(count), count, seeded(), mixup=mixup, cutmix=cutmix)
    assert mixed.shape == images.shape and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-6)
    assert ((targets > 0).sum(1) <= 2).all() and (targets >= 0).all()
    told = targets.double() @ torch.arange(count).double()
    assert torch.allclose(mixed.double().mean((1, 2, 3)), told, atol=1e-4)
    assert (mixed != images).flatten(1).any(1).double().mean() > 0.5
    if not mixup:
        area = (mixed[:, 0] == images[:, 0]).sum((1, 2)).float() / (size[0] * size[1])
        own = targets.diagonal()
        assert torch.equal(own, area)
    _, smooth = mix(images, torch.arange(count), count, seeded(), mixup=mixup, cutmix=cutmix, smoothing=0.2)
    assert torch.allclose(smooth, targets * 0.8 + 0.2 / count, atol=1e-6)


def test_cutmix_swaps_one_box_of_the_partner():
    images = torch.rand(128, 3, 24, 32, generator=seeded())
    partner, own = draw_mix(images.shape, seeded(3), 0.0, 1.0)
    mixed, _ = mix(images, torch.zeros(128, dtype=torch.long), 2, seeded(3), cutmix=1.0)
    boxes = 0
    for n in range(128):
        inside = own[n, 0] == 0
        if not inside.any():
            continue
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        expected = images[n].clone()
        expected[:, *box] = images[partner[n]][:, *box]
        assert inside[box].all() and torch.equal(mixed[n], expected)
        boxes += 1
    assert boxes > 100
    assert torch.equal(partner.sort().values, torch.arange(128))


def test_each_image_has_its_own_share_and_kind():
    _, own = draw_mix((4000, 3, 16, 16), seeded(), 0.8, 1.0)
    cut = ((own == 0) | (own == 1)).flatten(1).all(1)
    assert abs(cut.double().mean() - 0.5) < 0.06  # cutmix boxes of no pixel or of all look like either
    shares = own[~cut][:, 0, 0, 0]
    assert (own[~cut] == shares.view(-1, 1, 1, 1)).all() and len(shares.unique()) == len(shares)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0])
def test_beta_is_the_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    drawn = beta(alpha, 20_000, seeded())
    assert drawn.isfinite().all() and (drawn >= 0).all() and (drawn <= 1).all()
    # the smallest and largest are not told apart from 0 and 1 in float64 near 1, so compare in the lower half
    lower = drawn[drawn < 0.5]
    assert abs(len(lower) / len(drawn) - 0.5) < 0.02
    half = stats.kstest(lower.numpy(), lambda x: 2 * stats.beta(alpha, alpha).cdf(x))
    assert half.pvalue > 1e-3
    assert torch.equal(drawn, beta(alpha, 20_000, seeded()))
    assert beta(1e-3, 10_000, seeded()).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_pixels_for_the_same_draws_without_waiting():
    images = pictures(128)
    device = torch.device("cuda")
    augment = Augment(FULL)
    augment(images.to(device), torch.Generator(device))  # fills the caches of constants
    for operation in augment.operations:
        params = operation.draw(images, seeded())
        moved = [p.to(device) for p in params]
        found = operation.apply(images.to(device), *moved).cpu()
        off = difference(found, operation.apply(images, *params))
        assert (off <= 1).float().mean() > 0.998, operation
    on_device, generator = images.to(device), torch.Generator(device).manual_seed(0)
    labels = torch.zeros(128, dtype=torch.long, device=device)
    normalize(on_device, (0.5,), (0.5,))
    torch.cuda.set_sync_debug_mode("error")
    try:
        floats = normalize(augment(on_device, generator), (0.5,), (0.5,), size=48)
        mix(floats, labels, 10, generator, mixup=0.8, cutmix=1.0, smoothing=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
