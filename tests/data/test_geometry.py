"""Crops, flips, rotations and erasing with the drawn boxes, against torchvision."""

import pytest
import torch
from augment_cases import SIZES, difference, pictures, seeded
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vitlab.data.geometry import Crop, Erase, Flip, ResizedCrop, Rotate


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_is_torchvisions_pad_and_crop(size):
    images, crop = pictures(100, size), Crop(4)
    top, left = crop.draw(images, seeded())
    found = crop.apply(images, top, left)
    padded = TF.pad(images, 4, padding_mode="reflect")
    for one, source, y, x in zip(found, padded, top.tolist(), left.tolist()):
        assert torch.equal(one, TF.crop(source, y, x, *size))
    assert set(top.tolist()) == set(left.tolist()) == set(range(9))


def test_flip_is_torchvisions_for_about_half():
    images, flip = pictures(4000, (4, 5)), Flip()
    (flipped,) = flip.draw(images, seeded())
    found = flip.apply(images, flipped)
    assert torch.equal(found[flipped], TF.hflip(images[flipped]))
    assert torch.equal(found[~flipped], images[~flipped])
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotate_is_torchvisions(size):
    images, rotate = pictures(200, size), Rotate(40)
    (degrees,) = rotate.draw(images, seeded())
    assert degrees.min() < -35 and degrees.max() > 35 and degrees.abs().max() <= 40
    found = rotate.apply(images, degrees)
    expected = torch.stack([TF.rotate(x, float(a)) for x, a in zip(images, degrees)])
    assert (found == expected).float().mean() > 0.998


def test_erase_is_torchvisions_with_the_drawn_boxes():
    images, erase = pictures(60, (24, 40)), Erase(p=0.7, mean=(0.2, 0.5, 0.8))
    params = erase.draw(images, seeded())
    found = erase.apply(images, *params)
    for n, (top, left, height, width) in enumerate(zip(*(p.tolist() for p in params))):
        fill = torch.tensor([51, 128, 204], dtype=torch.uint8).view(3, 1, 1)
        assert torch.equal(found[n], TF.erase(images[n], top, left, height, width, fill))


def test_erase_draws_by_torchvisions_rule():
    height, width, count = 32, 32, 2000
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    top, left, tall, wide = Erase(1.0).draw(images, seeded())
    assert ((tall > 0) & (top + tall <= height) & (left + wide <= width) & (top >= 0) & (left >= 0)).all()
    ours = torch.stack([top, left, tall, wide]).double()
    reference, state = v2.RandomErasing(1.0), torch.get_rng_state()
    torch.manual_seed(0)
    drawn = [reference.make_params([images[0]]) for _ in range(count)]
    torch.set_rng_state(state)
    theirs = torch.tensor([[d[k] for d in drawn] for k in "ijhw"], dtype=torch.float64)
    error = ((ours.var(1) + theirs.var(1)) / count).sqrt()
    assert ((ours.mean(1) - theirs.mean(1)).abs() < 4.5 * error).all()
    assert torch.allclose(ours.std(1), theirs.std(1), rtol=0.1)
    assert abs(float((Erase(0.25).draw(images, seeded())[2] > 0).double().mean()) - 0.25) < 0.05
    # a box that cannot fit in ten tries erases nothing
    assert not Erase(1.0).draw(images[:, :, :1, :1], seeded())[2].any()


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (20, 17), (9, 9)])
def test_resized_crop_is_torchvisions(size):
    images, crop = pictures(60, size), ResizedCrop(0.08, 1.0)
    boxes = crop.draw(images, seeded())
    found = crop.apply(images, *boxes)
    for n, box in enumerate(zip(*(b.tolist() for b in boxes))):
        assert difference(found[n], TF.resized_crop(images[n], *box, list(size), antialias=True)).max() <= 1
    assert found.dtype == torch.uint8


def test_resized_crop_draws_by_torchvisions_rule():
    images, count = torch.zeros(2000, 3, 32, 40, dtype=torch.uint8), 2000
    ours = torch.stack(ResizedCrop(0.08, 1.0).draw(images, seeded())).double()
    reference, state = v2.RandomResizedCrop(32, (0.08, 1.0)), torch.get_rng_state()
    torch.manual_seed(0)
    drawn = [reference.make_params([images[0]]) for _ in range(count)]
    torch.set_rng_state(state)
    theirs = torch.tensor([[d[k] for d in drawn] for k in ("top", "left", "height", "width")]).double()
    error = ((ours.var(1) + theirs.var(1)) / count).sqrt()
    assert ((ours.mean(1) - theirs.mean(1)).abs() < 4.5 * error).all()
    assert torch.allclose(ours.std(1), theirs.std(1), rtol=0.1)


def test_resized_crop_falls_back_on_the_whole():
    images = torch.zeros(3, 3, 40, 10, dtype=torch.uint8)
    box = torch.stack(ResizedCrop(1.0, 1.0).draw(images, seeded()))
    assert box.T.tolist() == [[0, 0, 40, 10]] * 3
    image = pictures(5)
    assert torch.equal(ResizedCrop().apply(image, *(torch.full((5,), v) for v in (0, 0, 32, 32))), image)
