import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.data.splits import Augmentation

IMAGES = torch.randint(1, 256, (6, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(st.integers(0, 4), st.booleans(), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_a_move_is_pad_crop_and_mirror(padding, flip, seed) -> None:
    augmentation = Augmentation(padding, flip)
    moves = augmentation.draw(len(IMAGES), torch.Generator().manual_seed(seed))

    moved = augmentation.apply(IMAGES, moves)

    for image, (row, column, mirrored), result in zip(IMAGES, moves.tolist(), moved, strict=True):
        assert 0 <= row <= 2 * padding
        assert 0 <= column <= 2 * padding
        expected = F.pad(image, [padding] * 4)[:, row : row + 5, column : column + 7]
        assert torch.equal(result, expected.flip(-1) if mirrored else expected)


def test_no_shift_gives_the_image_back() -> None:
    moves = torch.tensor([[4, 4, 0]] * len(IMAGES))
    assert torch.equal(Augmentation(padding=4).apply(IMAGES, moves), IMAGES)


def test_every_offset_and_both_orientations_occur() -> None:
    moves = Augmentation(padding=2, flip=True).draw(2_000, torch.Generator().manual_seed(0))
    assert moves[:, 0].unique().tolist() == moves[:, 1].unique().tolist() == [0, 1, 2, 3, 4]
    assert 0.45 < moves[:, 2].float().mean() < 0.55


def test_flip_off_never_mirrors() -> None:
    assert not Augmentation(padding=2).draw(500, torch.Generator().manual_seed(0))[:, 2].any()


def test_nothing_to_do_copies_nothing() -> None:
    still = Augmentation()
    assert still.apply(IMAGES, still.draw(len(IMAGES), torch.Generator())) is IMAGES
