"""The table of base methods in part on CIFAR-10's images, with a small network that two cores can train.

    python benchmarks/cifar_methods.py --shared ../shared --work work --sparsity 0.99 0.9 --seeds 0

The images are the shared JPEGs and the dense network is trained here first, so the figures are comparable
with each other only: neither with papers nor with a ResNet-18.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import method_table
import torch

from s2ap_deploy.data import datasets
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.evaluation import pgd_accuracy
from s2ap_deploy.training.loop import train
from s2ap_deploy.training.objective import Objective

ARCH = "cifar-conv"
THREAT = ThreatModel(norm="Linf", eps="4/255")
CPU = torch.device("cpu")


def main() -> None:
    parser = method_table.options(__doc__, images=10_000, tested=5_000)
    parser.add_argument("--dense-images", type=int, default=20_000)
    parser.add_argument("--dense-epochs", type=int, default=12)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.work / "cifar10"
    if not folder.exists():
        unpack(args.shared / "data/cifar10-jpeg.tar.xz", folder)
    base = method_table.Base(
        checkpoint=args.work / f"dense-{args.dense_images}-{args.dense_epochs}.safetensors",
        data=f"imagefolder:{folder}",
        root=None,
        threat=THREAT,
        step_size=THREAT.radius / 8,
        by_class=True,
    )
    if not base.checkpoint.exists():
        dense(base, args.dense_images, args.dense_epochs, args.attack_steps)
    accuracy = measured(base, args.tested)
    method_table.write_table(args, base, "cifar-methods", network=ARCH, dense=accuracy)


def unpack(archive: Path, folder: Path) -> None:
    """All images, into a folder that takes its name only when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    partial.rename(folder)


def dense(base: method_table.Base, count: int, epochs: int, attack_steps: int) -> None:
    """Adversarial training from scratch, kept as a checkpoint."""
    images = datasets.load(base.data, seed=0)
    subset = images.train.subset(choose(images.train.labels, count, seed=0))
    torch.manual_seed(0)
    classifier = Classifier(registry.build(ARCH, 10), None)
    train(
        classifier,
        subset,
        images.validation,
        stage="pretrain",
        objective=Objective(base.threat, attack_steps=attack_steps),
        epochs=epochs,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        batch_size=128,
        seed=0,
        device=CPU,
        snapshots=NoSnapshots(),
        recorder=Silent(),
    )
    info = CheckpointInfo(
        arch=ARCH, num_classes=10, preprocessing=images.spec.preprocessing, stage="pretrain", tool_version="0"
    )
    checkpoint.save(base.checkpoint, classifier, info)


def measured(base: method_table.Base, tested: int) -> dict[str, float]:
    """The dense network under the attack of the table."""
    classifier, _, _ = checkpoint.load(base.checkpoint)
    if not tested:
        return {}
    test = method_table.first(datasets.load(base.data, seed=0).test, tested, base.by_class)
    found = pgd_accuracy(
        classifier, test, threat=base.threat, steps=50, step_size=base.step_size, seed=0, device=CPU
    )
    return {"clean": found.clean_accuracy, "robust": found.robust_accuracy}


if __name__ == "__main__":
    main()
