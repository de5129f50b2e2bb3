import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2ap_deploy.data import datasets
from s2ap_deploy.data.imagefolder import scan
from s2ap_deploy.data.splits import MemorySplit
from s2ap_deploy.errors import DataError, InputError
from s2ap_deploy.recorder import Silent

MakeFolder = Callable[..., Path]


def test_classes_and_ids_are_sorted_and_relative(make_folder) -> None:
    found = scan(make_folder(classes=("dog", "cat"), per_class=2))
    assert found.classes == ("cat", "dog")
    assert found.train.ids == ("train/cat/00.png", "train/cat/01.png", "train/dog/00.png", "train/dog/01.png")
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.ids[0] == "test/cat/00.png"
    assert found.name == "imagefolder:pets"
    assert len(found) == 8


def test_val_serves_as_test_when_there_is_no_test(make_folder) -> None:
    found = scan(make_folder(parts=("train", "val"), per_class=3))
    assert found.validation is None
    assert found.test.ids[0] == "val/cat/00.png"


def test_a_folder_with_all_three_parts_brings_its_own_validation(make_folder) -> None:
    data = datasets.load(f"imagefolder:{make_folder(parts=('train', 'val', 'test'), per_class=4)}")
    assert {one.split("/")[0] for one in data.validation.ids} == {"val"}
    assert len(data.train) == len(data.validation) == len(data.test) == 8


def test_hidden_files_and_other_files_are_passed_over(make_folder) -> None:
    folder = make_folder(per_class=2)
    (folder / "train" / "cat" / "._00.png").write_bytes(b"mac")
    (folder / "train" / "cat" / "notes.txt").write_text("x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "README").write_text("x")
    assert len(scan(folder).train.ids) == 4


def test_images_below_a_class_and_symbolic_links_count(make_folder, tmp_path) -> None:
    folder = make_folder(per_class=2)
    nested = folder / "train" / "cat" / "images"
    nested.mkdir()
    shutil.move(folder / "train" / "cat" / "00.png", nested / "00.png")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "train" / "dog", elsewhere)
    (folder / "train" / "dog").symlink_to(elsewhere)
    assert scan(folder).train.ids == (
        "train/cat/01.png",
        "train/cat/images/00.png",
        "train/dog/00.png",
        "train/dog/01.png",
    )


def test_validation_is_stratified_disjoint_and_seeded(make_folder) -> None:
    name = f"imagefolder:{make_folder(per_class=20)}"
    data, again, other = (datasets.load(name, seed=seed, validation_fraction=0.2) for seed in (0, 0, 1))
    assert data.validation.labels.bincount().tolist() == [4, 4]
    assert set(data.train.ids).isdisjoint(data.validation.ids)
    assert len(data.train) + len(data.validation) == 40
    assert data.validation.ids == again.validation.ids != other.validation.ids
    assert len(data.test) == 40


def test_size_comes_from_the_first_image(make_folder) -> None:
    folder = make_folder(shape=(8, 8))
    preprocessing = datasets.spec(f"imagefolder:{folder}").preprocessing
    assert preprocessing.size == (1, 8, 8)
    assert preprocessing.channel_order == "L"
    assert (preprocessing.resize, preprocessing.crop) == (8, 8)


def test_images_of_other_sizes_are_resized_to_a_square(make_folder) -> None:
    folder = make_folder(per_class=5)
    Image.new("RGB", (20, 13), (255, 0, 0)).save(folder / "test" / "cat" / "00.png")
    data = datasets.load(f"imagefolder:{folder}")
    images, _ = data.test.tensors()
    assert images.shape == (10, 3, 8, 8)
    assert images[0, 0].eq(1).all()


def test_size_is_the_models(make_folder) -> None:
    data = datasets.load(f"imagefolder:{make_folder()}", size=(1, 16, 16))
    assert data.spec.preprocessing.size == (1, 16, 16)
    assert data.train.tensors()[0].shape[1:] == (1, 16, 16)


def test_images_that_are_not_square_have_to_agree(make_folder) -> None:
    folder = make_folder(shape=(6, 9, 3), per_class=3)
    data = datasets.load(f"imagefolder:{folder}")
    assert data.spec.preprocessing.resize is None
    assert data.test.tensors()[0].shape == (6, 3, 6, 9)
    Image.new("RGB", (9, 7)).save(folder / "test" / "dog" / "01.png")
    with pytest.raises(DataError, check=lambda error: error.code == "image-size-mismatch"):
        datasets.load(f"imagefolder:{folder}")


def test_color_is_mirrored_and_shifted_gray_only_shifted(make_folder) -> None:
    color = datasets.load(f"imagefolder:{make_folder()}").train.augmentation
    gray = datasets.load(f"imagefolder:{make_folder(shape=(32, 32), name='signs')}").train.augmentation
    assert (color.padding, color.flip) == (1, True)
    assert (gray.padding, gray.flip) == (4, False)


def test_a_relative_folder_may_lie_in_the_data_root(make_folder, tmp_path, monkeypatch) -> None:
    folder = make_folder()
    remembered = datasets.spec(f"imagefolder:{folder}").name
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert datasets.load(remembered, root=tmp_path).train.ids
    with pytest.raises(DataError, match="pets", check=lambda error: error.code == "image-folder-missing"):
        datasets.load(remembered)
    monkeypatch.chdir(tmp_path)
    assert datasets.load(remembered).spec.name == remembered == "imagefolder:pets"


def renamed(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def removed(*names: str) -> Callable[[Path], object]:
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def not_utf8(folder: Path) -> None:
    where = os.fsencode(folder / "train" / "dog")
    os.rename(where + b"/00.png", where + b"/\xff.png")


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (removed("test"), "image-folder-part-missing", "train"),
        (removed("train"), "image-folder-part-missing", "test"),
        (removed("train", "test"), "image-folder-part-missing", "pets"),
        (removed("."), "image-folder-missing", "pets"),
        (renamed("test/dog", "test/fox"), "image-folder-classes-differ", "dog .*fox"),
        (removed("train/dog", "test/dog"), "class-count-too-small", "pets"),
        (renamed("test/dog/00.png", "test/dog/00.gif"), "image-folder-class-empty", "test/dog"),
        (lambda folder: (folder / "train/dog/00.png").write_bytes(b"x"), "image-unreadable", "dog/00.png"),
        pytest.param(
            not_utf8,
            "file-name-not-utf8",
            "dog",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="the system refuses such names"),
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(make_folder, change, code, named) -> None:
    folder = make_folder(per_class=1)
    change(folder)
    with pytest.raises(DataError, match=named, check=lambda error: error.code == code):
        datasets.load(f"imagefolder:{folder}")


def test_a_long_difference_is_cut(make_folder) -> None:
    folder = make_folder(classes=tuple(f"class{number}" for number in range(9)), per_class=1)
    removed(*(f"test/class{number}" for number in range(1, 8)))(folder)
    with pytest.raises(DataError, check=lambda error: error.code == "image-folder-classes-differ") as caught:
        scan(folder)
    assert "class6" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("", {}, "image-folder-path-missing"),
        ("~nobody-of-that-name/pets", {}, "image-folder-missing"),
        (__file__, {}, "image-folder-missing"),
        (None, {"size": (2, 8, 8)}, "image-size-invalid"),
        (None, {"size": (3, 0, 8)}, "image-size-invalid"),
        (None, {"workers": -1}, "worker-count-out-of-range"),
    ],
)
def test_paths_and_options_that_cannot_be_used(make_folder, path, options, code) -> None:
    with pytest.raises(InputError, check=lambda error: error.code == code):
        datasets.load(f"imagefolder:{make_folder() if path is None else path}", **options)


def test_a_folder_that_may_not_be_read(make_folder, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    folder = make_folder(per_class=1)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, check=lambda error: error.code == "image-folder-unreadable") as caught:
        scan(folder)
    assert caught.value.hint == "check its permissions"


@pytest.mark.slow
def test_real_photographs(shared, tmp_path) -> None:
    """The first 100 images of each CIFAR-10 class and part, out of the archive of all 60,000."""
    import tarfile

    with tarfile.open(shared / "data" / "cifar10-jpeg.tar.xz", "r|xz") as archive:
        for member in archive:
            if member.isfile() and int(Path(member.name).stem) < 100:
                archive.extract(member, tmp_path / "cifar", filter="data")
    data = datasets.load(f"imagefolder:{tmp_path / 'cifar'}")
    assert isinstance(data.train, MemorySplit)
    assert data.spec.class_names == datasets.spec("cifar10").class_names
    assert data.test.labels.bincount().tolist() == [100] * 10
    images, _ = data.train.tensors()
    assert images.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.03)


def test_one_gray_image_does_not_make_a_color_folder_gray(make_folder: Any) -> None:
    folder = make_folder()
    first = scan(folder).train.paths[0]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(first)
    assert scan(folder).spec(None).preprocessing.size == (3, 8, 8)


def test_files_that_are_no_images_are_counted_and_tiff_is_read(make_folder: Any) -> None:
    folder = make_folder()
    cats = folder / "train" / "cat"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(cats / "extra.tif")
    (cats / "notes.txt").write_text("x")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(cats / "moving.gif")
    found = scan(folder)
    assert found.unread == ("train/cat/moving.gif", "train/cat/notes.txt")
    assert "train/cat/extra.tif" in found.train.ids
    notes = Notes()
    data = datasets.load(f"imagefolder:{folder}", recorder=notes)
    assert data.train.tensors()[0].shape[1:] == (3, 8, 8)
    assert any("2 files" in note and "moving.gif" in note for note in notes.lines)


class Notes(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_exact_duplicates_between_training_and_test_images_are_found(make_folder: Any) -> None:
    folder = make_folder()
    shutil.copy(folder / "train" / "dog" / "03.png", folder / "test" / "cat" / "copied.png")
    data = datasets.load(f"imagefolder:{folder}")
    assert datasets.shared_images(data, data.test) == ["test/cat/copied.png"]
