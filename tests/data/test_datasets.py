import hashlib

import pytest
import torch
from sklearn.datasets import load_digits

from s2ap_deploy.data import datasets, published
from s2ap_deploy.data.published import KNOWN
from s2ap_deploy.errors import DataError, UsageError
from s2ap_deploy.spec import DataSpec


def test_digits_counts_and_balance() -> None:
    data = datasets.load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1_167, 130, 500)
    every = (*data.train.ids, *data.validation.ids, *data.test.ids)
    assert len(set(every)) == 1_797
    for part in (data.train, data.validation, data.test):
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 6


def test_digits_test_set_never_moves() -> None:
    sets = [datasets.load("digits", seed=seed, validation_fraction=0.3).test.ids for seed in (0, 7)]
    assert sets[0] == sets[1]
    assert hashlib.sha256(",".join(sets[0]).encode()).hexdigest().startswith("af525ba50855bfad")


def test_digits_are_those_of_scikit_learn() -> None:
    bundled = load_digits()
    train, test = published.load_digits()
    for part in (train, test):
        rows = [int(name.removeprefix("digits/")) for name in part.ids]
        levels = torch.from_numpy(bundled.images[rows])
        assert torch.equal(part.images, levels.mul(255 / 16).round().to(torch.uint8).unsqueeze(1))
        assert torch.equal(part.labels, torch.from_numpy(bundled.target[rows]).long())


def test_validation_moves_with_the_seed_only() -> None:
    first, again, other = (datasets.load("digits", seed=seed).validation.ids for seed in (0, 0, 1))
    assert first == again != other


def test_suggested_normalization_is_that_of_the_digits() -> None:
    data = datasets.load("digits")
    images = torch.cat([data.train.tensors()[0], data.validation.tensors()[0]])
    assert data.suggested is not None
    assert data.suggested.mean[0] == pytest.approx(float(images.mean()), abs=1e-4)
    assert data.suggested.std[0] == pytest.approx(float(images.std(correction=0)), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        ("digits", (1, 8, 8), 10),
        ("mnist", (1, 28, 28), 10),
        ("cifar10", (3, 32, 32), 10),
        ("cifar100", (3, 32, 32), 100),
        ("svhn", (3, 32, 32), 10),
    ],
)
def test_facts_without_files(name, size, classes) -> None:
    facts = datasets.spec(name)
    assert isinstance(facts, DataSpec)
    assert facts.preprocessing.size == size
    assert facts.preprocessing.channel_order == ("L" if size[0] == 1 else "RGB")
    assert facts.num_classes == len(set(facts.class_names)) == classes
    assert len(KNOWN[name].normalization.mean) == len(KNOWN[name].normalization.std) == size[0]


def test_class_order_is_alphabetical_where_it_is_published_so() -> None:
    for name in ("cifar10", "cifar100"):
        names = datasets.spec(name).class_names
        assert list(names) == sorted(names)


def test_a_model_of_another_size_is_told_both() -> None:
    for ask in (datasets.spec, datasets.load):
        with pytest.raises(DataError, check=lambda error: error.code == "data-size-mismatch") as caught:
            ask("mnist", size=(3, 32, 32))
        assert "imagefolder:PATH" in (caught.value.hint or "")
    assert datasets.spec("mnist", size=(1, 28, 28)) == datasets.spec("mnist")


def test_unknown_names_get_the_nearest_or_all() -> None:
    with pytest.raises(DataError, check=lambda error: error.code == "data-unknown") as near:
        datasets.load("cifar")
    assert near.value.hint == "did you mean cifar10?"
    with pytest.raises(DataError, check=lambda error: error.code == "data-unknown") as far:
        datasets.spec("x")
    assert ", ".join(datasets.NAMES) in (far.value.hint or "")


def test_impossible_validation_fraction() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "validation-fraction-out-of-range"):
        datasets.load("digits", validation_fraction=1.0)
