import errno
import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets

from s2ap_deploy.data import datasets, published
from s2ap_deploy.errors import DataError, StorageError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> Path:
    """A CIFAR-10 of 60 + 20 images in the published layout, with its own checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    stream = np.random.default_rng(0)

    def written(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / name)]

    def batch(n: int) -> dict[str, object]:
        return {
            "data": stream.integers(0, 256, (n, 3072), dtype=np.uint8),
            "labels": [k % 10 for k in range(n)],
        }

    theirs = torchvision.datasets.CIFAR10
    monkeypatch.setattr(theirs, "train_list", [written(f"data_batch_{k}", batch(30)) for k in (1, 2)])
    monkeypatch.setattr(theirs, "test_list", [written("test_batch", batch(20))])
    names = list(datasets.spec("cifar10").class_names)
    meta = dict(zip(("filename", "md5"), written("batches.meta", {"label_names": names}), strict=True))
    monkeypatch.setattr(theirs, "meta", {**meta, "key": "label_names"})
    return tmp_path


def test_mnist_is_the_real_one(shared) -> None:
    data = datasets.load("mnist", root=shared / "data")
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.test.ids[42] == "test/00042"
    assert data.test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert set(data.train.ids).isdisjoint(data.validation.ids)
    images, _ = data.train.tensors()
    assert images.shape == (54_000, 1, 28, 28)
    assert float(images.mean()) == pytest.approx(0.1307, abs=1e-3)
    assert float(images.std()) == pytest.approx(0.3081, abs=1e-3)


def test_mnist_validation_has_every_class_in_proportion(shared) -> None:
    data = datasets.load("mnist", root=shared / "data", seed=5)
    whole = data.train.labels.bincount() + data.validation.labels.bincount()
    assert (data.validation.labels.bincount() - whole / 10).abs().max() < 1


def test_a_flipped_bit_in_mnist_is_found(shared, tmp_path) -> None:
    shutil.copytree(shared / "data" / "MNIST", tmp_path / "MNIST", copy_function=shutil.copyfile)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[5_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, check=lambda error: error.code == "data-damaged") as caught:
        datasets.load("mnist", root=tmp_path)
    assert "--download" in (caught.value.hint or "")
    assert "t10k-images-idx3-ubyte" in caught.value.message


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn"])
def test_missing_data_says_which_options_help(name, tmp_path) -> None:
    with pytest.raises(DataError, match=name, check=lambda error: error.code == "data-missing") as caught:
        datasets.load(name, root=tmp_path)
    assert "--data-root" in (caught.value.hint or "")
    assert "--download" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DataError, check=lambda error: error.code == "data-missing"):
        datasets.load(name, root=tmp_path / "file")


def test_root_is_the_argument_then_the_environment_then_data(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("S2AP_DATA_ROOT", raising=False)
    assert published.data_root(None) == Path("data")
    monkeypatch.setenv("S2AP_DATA_ROOT", str(tmp_path))
    assert published.data_root(None) == tmp_path
    assert published.data_root(Path("here")) == Path("here")


def test_cifar_becomes_channels_first(cifar10) -> None:
    data = datasets.load("cifar10", root=cifar10)
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 20)
    stored = pickle.loads((cifar10 / "cifar-10-batches-py" / "test_batch").read_bytes())
    images, labels = data.test.tensors()
    assert torch.equal(images, torch.from_numpy(stored["data"]).view(20, 3, 32, 32) / 255)
    assert labels.tolist() == stored["labels"]
    assert (data.train.augmentation.padding, data.train.augmentation.flip) == (4, True)


def test_damaged_cifar_is_told_from_missing(cifar10) -> None:
    path = cifar10 / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, check=lambda error: error.code == "data-damaged") as caught:
        datasets.load("cifar10", root=cifar10)
    assert "--download" in (caught.value.hint or "")


def test_svhn_counts_zero_as_zero(tmp_path, monkeypatch) -> None:
    stream = np.random.default_rng(0)
    listed = {}
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        pixels = stream.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        scipy.io.savemat(path, {"X": pixels, "y": np.arange(20)[:, None] % 10 + 1})
        listed[part] = ["", path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    data = datasets.load("svhn", root=tmp_path)
    images, labels = data.test.tensors()
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert torch.equal(images[3], torch.from_numpy(pixels[..., 3]).permute(2, 0, 1) / 255)
    assert data.train.augmentation.flip is False


class Fetching:
    """Stands for a torchvision data set whose download fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, root: Path, **_: object) -> None:
        print("a mirror did not answer")
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "code", "hint"),
    [
        (RuntimeError("no network"), DataError, "data-download-failed", "network"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "disk-full", "--data-root"),
    ],
)
def test_a_failed_download(error, kind, code, hint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fetching(error))
    with pytest.raises(kind, check=lambda error: error.code == code) as caught:
        datasets.load("cifar100", root=tmp_path, download=True)
    assert hint in (caught.value.hint or "")
    assert capsys.readouterr().out == "", "stdout belongs to --json"
