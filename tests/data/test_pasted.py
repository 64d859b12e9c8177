import pytest
import torch

from classact.data.imagenet_sample import photo_part
from classact.data.pasted import pasted_photos


def test_pasted_photos_are_where_their_boxes_say(real_data):
    for copies, size in ((1, (96, 144)), (2, (80, 112))):
        found = pasted_photos(0, seed=3, copies=copies, size=size)
        n = len(found.images)
        assert found.images.shape == (n, 3, 224, 224) and found.boxes.shape == (n, copies, 4)
        assert found.images.min() >= 0 and found.images.max() <= 1
        sides = found.boxes[..., 2:] - found.boxes[..., :2]
        assert torch.equal(sides[..., 0], sides[..., 1])
        assert size[0] <= sides.min() and sides.max() <= size[1]
        assert found.masks.sum(1).max() == 1  # copies do not overlap
        for masks, boxes in zip(found.masks, found.boxes, strict=True):
            for mask, (r0, c0, r1, c1) in zip(masks, boxes.tolist(), strict=True):
                assert mask[r0:r1, c0:c1].all() and mask.sum() == (r1 - r0) * (c1 - c0)
        detail = found.images.diff(dim=3).abs().mean(1)
        outside = ~found.masks.any(1)[..., 1:] & ~found.masks.any(1)[..., :-1]
        assert detail[~outside].mean() > 5 * detail[outside].mean()
    (r0, c0, r1, c1), (s0, d0, s1, d1) = found.boxes[5].tolist()
    assert torch.equal(found.images[5, :, r0:r1, c0:c1], found.images[5, :, s0:s1, d0:d1])


def test_pasted_photos_come_from_the_seed_and_parts_share_none(real_data):
    first, again, other = (pasted_photos(1, seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images) and not torch.equal(first.boxes, other.boxes)
    classes = torch.cat([photo_part(part)[1] for part in range(3)])
    assert len(classes.unique()) == len(classes) > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": 12}, "part must be from 0 to 11, got 12"),
        ({"copies": 3}, "copies must be 1 or 2, got 3"),
        ({"copies": 2, "size": (96, 144)}, r"size must be \(smallest, largest\) within 112 pixels, got \(96, 144\)"),
        ({"size": (100, 90)}, "size must be"),
    ],
)
def test_bad_pasted_photos(arguments, message):
    with pytest.raises(ValueError, match=message):
        pasted_photos(**{"part": 0, "seed": 0} | arguments)
