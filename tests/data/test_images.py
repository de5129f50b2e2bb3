import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from s2ap_deploy.data import imagefolder
from s2ap_deploy.errors import DataError
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import Preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


def as_it_is(channels: int, height: int, width: int) -> Preprocessing:
    return Preprocessing(size=(channels, height, width), channel_order="L" if channels == 1 else "RGB")


def squared(channels: int, side: int) -> Preprocessing:
    return as_it_is(channels, side, side).model_copy(update={"resize": side, "crop": side})


def saved(folder: Path, pixels: np.ndarray, name: str = "image.png") -> str:
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def test_pixels_come_channels_first_and_unchanged(tmp_path) -> None:
    decoded = imagefolder.decode(saved(tmp_path, PIXELS), as_it_is(3, 9, 14))
    assert np.array_equal(decoded, PIXELS.transpose(2, 0, 1))


def test_gray_and_color_follow_the_asked_channels(tmp_path) -> None:
    gray, color = PIXELS[..., 0], PIXELS
    assert np.array_equal(imagefolder.decode(saved(tmp_path, gray), as_it_is(1, 9, 14))[0], gray)
    assert np.array_equal(imagefolder.decode(saved(tmp_path, gray), as_it_is(3, 9, 14)), np.stack([gray] * 3))
    luma = np.asarray(Image.fromarray(color).convert("L"))
    assert np.array_equal(imagefolder.decode(saved(tmp_path, color), as_it_is(1, 9, 14))[0], luma)


@pytest.mark.parametrize(("height", "width"), [(9, 14), (14, 9), (33, 20), (6, 6), (1, 40)])
@pytest.mark.parametrize("side", [6, 7, 32])
def test_resize_and_crop_equal_torchvision(tmp_path, height, width, side) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])(Image.fromarray(pixels))
    assert np.array_equal(imagefolder.decode(saved(tmp_path, pixels), squared(3, side)), theirs.numpy())


@pytest.mark.parametrize("side", [1, 5, 8, 21])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_resize_and_crop_are_bilinear_and_centered(tmp_path, name, side) -> None:
    """The pixels are written into hashes of certificates, so that another torchvision must not move them."""
    for height, width in ((9, 14), (14, 9), (8, 8), (5, 40)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = saved(tmp_path, pixels, name)
        image = Image.open(path).convert("RGB")
        long = int(side * max(height, width) / min(height, width))
        shape = (side, long) if width < height else (long, side)
        if min(height, width) != side:
            image = image.resize(shape, Image.Resampling.BILINEAR)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        expected = np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
        assert np.array_equal(imagefolder.decode(path, squared(3, side)), expected)


def test_what_has_its_size_needs_no_torchvision(tmp_path, monkeypatch) -> None:
    def refused() -> None:
        raise AssertionError("imported")

    square = saved(tmp_path, PIXELS[:9, :9], "square.png")
    monkeypatch.setattr(imagefolder, "_transforms", refused)
    assert imagefolder.decode(square, squared(3, 9)).shape == (3, 9, 9)
    with pytest.raises(AssertionError, match="imported"):
        imagefolder.decode(square, squared(3, 8))


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.bmp", "a.webp", "a.ppm"])
def test_every_format_opens(tmp_path, name) -> None:
    path = saved(tmp_path, PIXELS, name)
    assert imagefolder.image_size(path) == (3, 9, 14)
    assert imagefolder.decode(path, as_it_is(3, 9, 14)).shape == (3, 9, 14)


def test_size_counts_gray_as_one_channel(tmp_path) -> None:
    assert imagefolder.image_size(saved(tmp_path, PIXELS[..., 0], "a.pgm")) == (1, 9, 14)
    Image.fromarray(PIXELS).quantize(8).save(tmp_path / "palette.png")
    assert imagefolder.image_size(str(tmp_path / "palette.png")) == (3, 9, 14)


def test_another_size_without_resize_is_named(tmp_path) -> None:
    with pytest.raises(DataError, check=lambda error: error.code == "image-size-mismatch") as caught:
        imagefolder.decode(saved(tmp_path, PIXELS), as_it_is(3, 9, 15))
    assert "square size" in (caught.value.hint or "")
    assert "9x14" in caught.value.message
    assert "9x15" in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"P6\n9 14\n", b"BM" + b"\xff" * 60]
)
def test_rubbish_is_named(tmp_path, content) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, check=lambda error: error.code == "image-unreadable") as caught:
        imagefolder.decode(str(path), as_it_is(3, 9, 14))
    assert caught.value.hint == "repair or remove the file"
    assert "broken.png" in caught.value.message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "a.ppm"])
def test_damaged_files_never_raise_anything_else(tmp_path, name) -> None:
    whole = Path(saved(tmp_path, PIXELS, name)).read_bytes()
    stream = np.random.default_rng(2)
    path = tmp_path / f"damaged{Path(name).suffix}"
    for _ in range(150):
        damaged = bytearray(whole[: stream.integers(1, len(whole) + 1)])
        for position in stream.integers(0, len(damaged), 3):
            damaged[position] = stream.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert imagefolder.decode(str(path), squared(3, 8)).shape == (3, 8, 8)


def test_truncated_jpeg_is_refused(tmp_path) -> None:
    path = Path(saved(tmp_path, np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)), "a.jpg"))
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(DataError, match=r"a\.jpg", check=lambda error: error.code == "image-unreadable"):
        imagefolder.decode(str(path), squared(3, 8))


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path) -> None:
    path = saved(tmp_path, PIXELS[..., 0].astype(np.uint16) * 257)
    with pytest.raises(DataError, check=lambda error: error.code == "image-depth-unsupported") as caught:
        imagefolder.decode(path, as_it_is(1, 9, 14))
    assert "8 bits" in (caught.value.hint or "")


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"gone\.png", check=lambda error: error.code == "image-unreadable"):
        imagefolder.image_size(str(tmp_path / "gone.png"))


class Counter(Silent):
    def __init__(self) -> None:
        self.total = self.done = 0

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.total = total

    def advance(self, steps: int = 1) -> None:
        self.done += steps


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_all_files_keep_their_order(tmp_path, threads) -> None:
    paths = [saved(tmp_path, np.full((4, 4), value, np.uint8), f"{value}.png") for value in range(150)]
    recorder = Counter()
    decoded = imagefolder.decode_all(paths, as_it_is(1, 4, 4), threads=threads, recorder=recorder)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, torch.arange(150).byte()[:, None, None, None].expand(150, 1, 4, 4))
    assert recorder.total == recorder.done == 150


def test_an_error_in_a_thread_arrives(tmp_path) -> None:
    paths = [saved(tmp_path, PIXELS, f"{number}.png") for number in range(70)]
    Path(paths[66]).write_bytes(b"")
    with pytest.raises(DataError, match=r"66\.png", check=lambda error: error.code == "image-unreadable"):
        imagefolder.decode_all(paths, as_it_is(3, 9, 14), threads=2, recorder=Silent())
