"""Augmentation: every image is one of its allowed views, evenly drawn, whatever batch it comes in."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import pad

from conadv_lab.data.augment import alternating_flips, augment
from conadv_lab.data.hashing import image_keys


def keys(count, epoch=0):
    return image_keys(0, "augment", torch.tensor(epoch), torch.arange(count))


def pictures(count, channels=3, height=6, width=8):
    """Images in which every pixel differs from every other and from 0."""
    one = torch.arange(1, channels * height * width + 1, dtype=torch.uint8)
    return one.view(1, channels, height, width).repeat(count, 1, 1, 1)


def views(image, crop, padding):
    """All crops of one image and their mirror images, with the name (dy, dx, mirrored) of each."""
    mode = "constant" if padding == "zeros" else "reflect"
    padded = pad(image[None].double(), [crop] * 4, mode=mode)[0].to(image.dtype)
    _, height, width = image.shape
    found = {}
    for dy in range(2 * crop + 1):
        for dx in range(2 * crop + 1):
            view = padded[:, dy : dy + height, dx : dx + width]
            found[view.numpy().tobytes()] = (dy, dx, False)
            found[view.flip(2).contiguous().numpy().tobytes()] = (dy, dx, True)
    return found


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_results_are_crops_and_mirror_images_drawn_evenly(padding):
    n, images = 5000, pictures(5000)
    allowed = views(images[0], 2, padding)
    assert len(allowed) == 50
    moved = augment(images, keys(n), crop=2, padding=padding)
    seen = Counter(allowed[image.numpy().tobytes()] for image in moved)
    assert len(seen) == 50
    chi = sum((count - n / 50) ** 2 / (n / 50) for count in seen.values())
    assert abs(chi - 49) < 4.5 * (2 * 49) ** 0.5


def test_flip_alone_and_nothing_at_all():
    images = pictures(200)
    flipped = augment(images, keys(200), crop=0)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert 60 < mirrored.sum() < 140
    assert torch.equal(augment(images, keys(200), crop=0, flip=False), images)


def test_alternating_flips_mirror_each_image_in_every_second_epoch():
    n, indices = 400, torch.arange(400)
    flips = torch.stack([alternating_flips(3, torch.full((n,), epoch), indices) for epoch in range(4)])
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], ~flips[0])
    assert torch.equal(flips[3], flips[1])
    assert 160 < flips[0].sum() < 240  # 4 standard deviations
    assert not torch.equal(flips[0], alternating_flips(4, torch.zeros(n, dtype=torch.int64), indices))
    images = pictures(n)
    mirrored = augment(images, keys(n), crop=0, flip=flips[0])
    assert torch.equal(mirrored[flips[0]], images[flips[0]].flip(3))
    assert torch.equal(mirrored[~flips[0]], images[~flips[0]])


def test_cutout_blanks_a_square_that_may_reach_over_the_edge():
    n, side = 2000, 3
    cut = augment(pictures(n), keys(n), crop=0, flip=False, cutout=side)
    blank = (cut == 0).all(1)
    assert torch.equal((cut == 0).any(1), blank)
    assert torch.equal(cut[(~blank)[:, None].expand_as(cut)], pictures(n)[(~blank)[:, None].expand_as(cut)])
    rows, columns = blank.any(2).sum(1), blank.any(1).sum(1)
    assert torch.equal(rows * columns, blank.sum((1, 2)))
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3}
    share = (rows == 2).double().mean()
    assert abs(share - 2 / 6) < 4.5 * (2 / 6 * 4 / 6 / n) ** 0.5


def test_cutout_works_beside_crop_and_flip():
    moved = augment(pictures(300), keys(300), crop=2, cutout=3)
    plain = augment(pictures(300), keys(300), crop=2)
    blank = (moved == 0).all(1)
    assert torch.equal(moved, plain * ~augment(pictures(300), keys(300), 0, False, 3).eq(0))
    assert blank.flatten(1).any(1).all()


def test_views_depend_on_the_key_alone():
    images = torch.randint(
        0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    whole = augment(images, keys(50), cutout=2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(images[order], keys(50)[order], cutout=2), whole[order])
    assert torch.equal(augment(images[7:8], keys(50)[7:8], cutout=2), whole[7:8])
    assert not torch.equal(augment(images, keys(50, epoch=1), cutout=2), whole)
    assert torch.equal(augment(images.float() / 255, keys(50), cutout=2), whole.float() / 255)


def test_images_are_left_as_they_are():
    images = pictures(20)
    augment(images, keys(20), cutout=3)
    assert torch.equal(images, pictures(20))


@pytest.mark.gpu
def test_same_images_on_cuda():
    images = pictures(500)
    there = augment(images.cuda(), keys(500).cuda(), cutout=3)
    assert torch.equal(there.cpu(), augment(images, keys(500), cutout=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": -1}, "crop is -1; allowed: a whole number of at least 0"),
        ({"cutout": -2}, "cutout is -2"),
        ({"crop": 6, "padding": "reflect"}, "crop is 6; allowed: 0 to 5 with reflection of images of side 6"),
        ({"padding": "zero"}, r"unknown padding 'zero'.*Did you mean 'zeros'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        augment(pictures(2), keys(2), **settings)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"keys' shape is \(3,\); allowed: \(2,\)"):
        augment(pictures(2), keys(3))
    with pytest.raises(ValueError, match=r"images' shape is \(3, 6, 8\)"):
        augment(pictures(1)[0], keys(3))
