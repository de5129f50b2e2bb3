"""Facts about the data sets that are known by name: size, classes, usual normalization and augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from s2ap_deploy.data.augmentation import Augmentation
from s2ap_deploy.spec import DataSpec, Normalization, Preprocessing

TEN_DIGITS = tuple("0123456789")

CIFAR10_LABELS = "airplane automobile bird cat deer dog frog horse ship truck"

# The hundred fine labels in their alphabetical order, which is the order of the label numbers.
CIFAR100_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class Facts:
    """``normalization`` holds mean and standard deviation per channel over the training images."""

    spec: DataSpec
    normalization: Normalization
    augmentation: Augmentation


def _facts(
    name: str,
    size: tuple[int, int, int],
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augmentation: Augmentation,
) -> Facts:
    preprocessing = Preprocessing(size=size, channel_order="L" if size[0] == 1 else "RGB")
    return Facts(
        DataSpec(name=name, preprocessing=preprocessing, class_names=class_names),
        Normalization(mean=mean, std=std),
        augmentation,
    )


# Digits are left alone (a mirrored 2 is no 2); house numbers may shift, photographs also be mirrored.
KNOWN = {
    facts.spec.name: facts
    for facts in (
        _facts("digits", (1, 8, 8), TEN_DIGITS, (0.3054,), (0.3758,), Augmentation()),
        _facts("mnist", (1, 28, 28), TEN_DIGITS, (0.1307,), (0.3081,), Augmentation()),
        _facts(
            "cifar10",
            (3, 32, 32),
            tuple(CIFAR10_LABELS.split()),
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            Augmentation(padding=4, flip=True),
        ),
        _facts(
            "cifar100",
            (3, 32, 32),
            tuple(CIFAR100_LABELS.split()),
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
            Augmentation(padding=4, flip=True),
        ),
        _facts(
            "svhn",
            (3, 32, 32),
            TEN_DIGITS,
            (0.4377, 0.4438, 0.4728),
            (0.1980, 0.2010, 0.1970),
            Augmentation(padding=4),
        ),
    )
}
