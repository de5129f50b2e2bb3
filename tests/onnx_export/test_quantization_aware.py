"""Training that computes as the int8 file will: the file's answers, gradients, the mask, resuming."""

import numpy as np
import pytest
import torch
from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize
from s2ap_deploy.onnx_export.quantization_aware import QuantizationAware, per_channel, straight_through
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recipe.sections import TrainSection
from s2ap_deploy.recorder import NoSnapshots
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment, train


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    nn.init.uniform_(made[1].weight, -1.5, 1.5)  # folding also turns signs
    nn.init.uniform_(made[1].running_var, 0.5, 2.0)
    return made


def aware(epochs: int = 2, **section) -> QuantizationAware:
    images = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
    return QuantizationAware(epochs, images, ExportSection(**section))


def run(stripes, model, *, snapshots=None, masks=None, quantization=None, **section):
    return train(
        model,
        TrainingData(stripes(66), stripes(30)),
        TrainSection(**{"epochs": 4, "weight_decay": 5e-4, "batch_size": 16, **section}),
        Objective(ThreatModel(eps="0.1"), attack_steps=2),
        TrainingEnvironment(torch.device("cpu"), snapshots=snapshots or NoSnapshots()),
        stage="finetune",
        masks=masks,
        quantization=quantization or aware(),
    )


@pytest.mark.parametrize("weight_bits", [7, 8])
@pytest.mark.parametrize("calibration", ["minmax", "entropy"])
def test_it_answers_as_the_file_of_the_trained_weights(stripes, weight_bits, calibration) -> None:
    model = network()
    settings = {"weight_bits": weight_bits, "calibration": calibration}
    result = run(stripes, model, epochs=2, quantization=aware(**settings))
    twin, ranges = aware(**settings).prepare(model, result.ranges)
    assert {name: limits.tolist() for name, limits in ranges.items()} == {
        name: limits.tolist() for name, limits in result.ranges.items()
    }
    known = {name: (low, high) for name, (low, high) in ranges.items()}
    pixels = stripes(30).tensors()[0]
    traced = to_onnx(model.eval(), (1, 8, 8))
    file = quantize(traced, pixels.numpy(), weight_bits=weight_bits, ranges=known)
    expected = logits(session(file.SerializeToString()), pixels.numpy())
    with torch.no_grad():
        found = twin(pixels).numpy()
        unrounded = model(pixels).numpy()
    (layer,) = [each for each in twin.layers if isinstance(each.first, nn.Linear)]
    step = float(per_channel(layer.first.weight, twin.levels)[1].max()) * layer.step * twin.levels
    assert np.abs(found - expected).max() <= step  # one step of one activation
    assert np.median(np.abs(found - expected)) < 1e-5
    assert np.abs(unrounded - expected).max() > 1e-4


def test_gradients_pass_straight_through_the_rounding() -> None:
    values = torch.linspace(-1, 1, 41, requires_grad=True)
    rounded = straight_through(values, torch.tensor(0.25))
    assert torch.equal(rounded.detach(), (values.detach() / 0.25).round() * 0.25)
    rounded.square().sum().backward()
    assert torch.equal(values.grad, 2 * rounded.detach())


def test_every_weight_and_bias_learns() -> None:
    model = network()
    twin, _ = aware().prepare(model, {})
    twin(torch.rand(8, 1, 8, 8)).square().sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in model.named_parameters()}
    assert {name for name, _ in twin.named_parameters()} == {f"network.{name}" for name in learned}


def test_rows_use_their_whole_range_and_zeros_stay_zero() -> None:
    weight = torch.randn(5, 3, 3, 3) * (torch.rand(5, 3, 3, 3) > 0.9)
    weight[2] = 0
    rounded, scale = per_channel(weight, 64)
    assert not rounded[weight == 0].any()
    steps = (rounded / scale.view(-1, 1, 1, 1)).flatten(1).abs().amax(dim=1)
    assert steps.tolist() == pytest.approx([64, 64, 0, 64, 64])


def test_pruned_weights_never_leave_zero(stripes) -> None:
    model = network()
    mask = torch.zeros_like(model[4].weight, dtype=torch.bool)
    mask[:, ::7] = True
    before = model[4].weight.detach().clone()
    run(stripes, model, masks={"4.weight": mask}, quantization=aware(4), awp_gamma=0.01)
    assert not model[4].weight[~mask].any()
    assert not torch.equal(model[4].weight[mask], before[mask])


@pytest.mark.parametrize("lives", [1, 2, 3])
def test_it_resumes_to_the_same_bits(stripes, memory_snapshots, lives) -> None:
    straight, resumed = network(), network()
    whole = run(stripes, straight)
    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(stripes, network(), snapshots=snapshots)
    again = run(stripes, resumed, snapshots=snapshots)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [row.loss for row in again.history] == [row.loss for row in whole.history]
    assert again.best_epoch == whole.best_epoch > 2
    assert again.ranges.keys() == whole.ranges.keys()


def test_epochs_before_are_those_of_plain_training(stripes) -> None:
    plain = train(
        network(),
        TrainingData(stripes(66), stripes(30)),
        TrainSection(epochs=4, weight_decay=5e-4, batch_size=16),
        Objective(ThreatModel(eps="0.1"), attack_steps=2),
        TrainingEnvironment(torch.device("cpu")),
        stage="finetune",
    )
    rounded = run(stripes, network())
    losses = [[row.loss for row in result.history] for result in (plain, rounded)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]


def test_a_network_without_such_a_layer_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(64, 3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) @ self.matrix

    with pytest.raises(ArchitectureError, check=lambda error: error.code == "qat-unsupported"):
        aware().prepare(Plain(), {})
