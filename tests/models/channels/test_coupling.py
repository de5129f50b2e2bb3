"""Groups of channels of every family, and of networks built to mislead."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.layer_channels import ChannelGroup, Coupling, macs, macs_kept, weights_kept
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.models.used_weights import prunable
from s2ap_deploy.spec import Normalization

Size = tuple[int, int, int]


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }


def check_partition(network: nn.Module, coupling: Coupling) -> None:
    """Every row of a prunable weight lies in one group, is a logit, or its weight is named with a reason."""
    tensors = tensors_of(network)
    owners = {
        (name, dim): torch.zeros(size, dtype=torch.int64)
        for name, tensor in tensors.items()
        for dim, size in enumerate(tensor.shape[:2])
    }
    for group in coupling.groups:
        assert all(touched.dim == 0 for touched in group.writers)
        assert all(touched.dim == 1 for touched in group.readers)
        for touched in (*group.writers, *group.readers):
            assert touched.index.dtype == torch.int64
            assert len(touched.index) == group.channels
            owners[touched.parameter, touched.dim].index_add_(
                0, touched.index.flatten(), torch.ones(touched.index.numel(), dtype=torch.int64)
            )
    assert max((int(owner.max()) for owner in owners.values() if owner.numel()), default=0) <= 1
    assert len({group.name for group in coupling.groups}) == len(coupling.groups)
    skipped = dict(coupling.skipped)
    assert all(skipped.values())
    assert set(coupling.weights) >= {*skipped, *coupling.classifier}
    for name in coupling.weights:
        complete = bool(owners[name, 0].all())
        assert complete != (name in skipped or name in coupling.classifier), name


def check_independence(network: nn.Module, size: Size, coupling: Coupling) -> None:
    """Where nobody reads a channel, what writes it does not matter; where it is read, it does."""
    noise = torch.Generator().manual_seed(1)
    tensors = tensors_of(network)
    written = {name: tensor.clone() for name, tensor in tensors.items()}
    columns: list[tuple[str, Tensor]] = []
    for group in coupling.groups:
        gone = torch.randperm(group.channels, generator=noise)[: (group.channels + 1) // 2]
        for touched in group.writers:
            rows = touched.index[gone].flatten()
            old = written[touched.parameter][rows]
            # Above 0, because running variances must stay so.
            written[touched.parameter][rows] = (
                old.abs() * 1.5 + torch.rand(old.shape, generator=noise) * old.std().nan_to_num(1.0) + 0.1
            )
        columns += [(touched.parameter, touched.index[gone].flatten()) for touched in group.readers]
    images = torch.rand(2, *size, generator=noise)

    def logits(changed: dict[str, Tensor], *, unread: bool) -> Tensor:
        changed = dict(changed)
        for name, positions in columns if unread else ():
            changed[name] = changed[name].index_fill(1, positions, 0.0)
        with torch.no_grad():
            answer: Tensor = functional_call(network, changed, images)
        return answer

    assert torch.equal(logits(tensors, unread=True), logits(written, unread=True))
    if coupling.groups:
        assert not torch.allclose(logits(tensors, unread=False), logits(written, unread=False))


def check_counts(network: nn.Module, size: Size, coupling: Coupling) -> None:
    """Counts by group agree with counting the weights that are left one by one."""
    keep = {group.name: (group.channels + 2) // 3 for group in coupling.groups}
    alive = {name: torch.ones_like(network.get_parameter(name)) for name in coupling.weights}
    for group in coupling.groups:
        for touched in (*group.writers, *group.readers):
            if touched.parameter in alive:
                gone = touched.index[keep[group.name] :].flatten()
                alive[touched.parameter].index_fill_(touched.dim, gone, 0.0)
    left = {name: int(mask.sum()) for name, mask in alive.items()}
    assert weights_kept(coupling, keep, network) == sum(left.values())
    assert macs_kept(coupling, keep, network) == sum(
        left[name] * count for name, count in coupling.positions.items()
    )
    assert macs_kept(coupling, {}, network) == macs(network, size)


def check(network: nn.Module, size: Size) -> Coupling:
    coupling = channel_groups(network, size)
    check_partition(network, coupling)
    check_independence(network.eval(), size, coupling)
    check_counts(network, size, coupling)
    return coupling


# Families without fixed shapes: every channel is in a group or a logit.
COMPLETE = ("mnist-conv", "digits-conv", "cifar-resnet18", "torchvision/mobilenet_v2", "cifar-resnet50")
COMPLETE += ("cifar-preact-resnet18-final-bn", "cifar-vgg16-bn", "torchvision/densenet121")
COMPLETE += ("torchvision/efficientnet_b0", "torchvision/googlenet")


def test_every_family_has_sound_groups(family, request) -> None:
    coupling = check(*family)
    if any(f"[{name}]" in request.node.name for name in COMPLETE):
        assert coupling.skipped == ()
        assert len(coupling.classifier) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", "torchvision/convnext_tiny"])
def test_families_whose_channels_cannot_go_have_sound_groups(build_family, name) -> None:
    check(*build_family(name, 32))


@pytest.fixture(scope="module")
def coupled(build_family):
    """``coupled("digits-conv", 8)``: a network, its input size and its groups, found once."""

    @functools.cache
    def find(name: str, side: int) -> tuple[nn.Module, Size, Coupling]:
        network, size = build_family(name, side)
        return network, size, channel_groups(network, size)

    return find


def by_name(coupling: Coupling) -> dict[str, ChannelGroup]:
    return {group.name: group for group in coupling.groups}


def weights_in(group: ChannelGroup, coupling: Coupling) -> tuple[list[str], list[str]]:
    """Names of the convolutions and linear layers that write and read, without ``.weight``."""
    sides = (group.writers, group.readers)
    writers, readers = (
        [
            touched.parameter.removesuffix(".weight")
            for touched in side
            if touched.parameter in coupling.weights
        ]
        for side in sides
    )
    return writers, readers


def test_a_residual_stream_is_one_group(coupled) -> None:
    _, _, coupling = coupled("cifar-resnet18", 8)
    stream = by_name(coupling)["conv1.weight"]
    assert stream.channels == 64
    writers, readers = weights_in(stream, coupling)
    assert writers == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert readers == ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"]
    assert {"bn1.running_mean", "bn1.running_var", "bn1.weight", "bn1.bias", "layer1.1.bn2.weight"} <= {
        touched.parameter for touched in stream.writers
    }
    assert len(coupling.groups) == 4 + 8
    assert coupling.skipped == ()
    assert coupling.classifier == ("linear.weight",)


def test_a_flattened_map_gives_every_channel_its_pixels(coupled) -> None:
    _, _, coupling = coupled("mnist-conv", 28)
    assert [(group.name, group.channels) for group in coupling.groups] == [
        ("0.weight", 16),
        ("2.weight", 32),
        ("5.weight", 100),
    ]
    (reader,) = by_name(coupling)["2.weight"].readers
    assert reader.parameter == "5.weight"
    assert torch.equal(reader.index, torch.arange(32 * 49).reshape(32, 49))
    assert coupling.classifier == ("7.weight",)


def test_a_depthwise_convolution_belongs_to_its_channels(coupled) -> None:
    _, _, coupling = coupled("torchvision/mobilenet_v2", 32)
    inner = by_name(coupling)["features.2.conv.0.0.weight"]
    writers, readers = weights_in(inner, coupling)
    assert writers == ["features.2.conv.0.0", "features.2.conv.1.0"]
    assert readers == ["features.2.conv.2"]
    assert coupling.skipped == ()


def test_concatenated_channels_are_read_behind_an_offset(coupled) -> None:
    groups = by_name(coupled("torchvision/squeezenet1_1", 64)[2])
    expand = groups["features.3.expand3x3.weight"]
    columns = {touched.parameter: touched.index for touched in expand.readers}
    assert torch.equal(columns["features.4.squeeze.weight"], torch.arange(64, 128).reshape(64, 1))


def test_shortcuts_that_pad_by_a_fixed_number_are_left_out_by_name(coupled) -> None:
    """Torch-Pruning takes a padding of channels for an element-wise operation."""
    _, _, coupling = coupled("cifar-resnet20", 8)
    streams = ["conv1.weight", *(f"layer{i}.{j}.conv2.weight" for i in (1, 2, 3) for j in range(3))]
    assert [name for name, _ in coupling.skipped] == streams
    assert [group.name for group in coupling.groups] == [
        f"layer{i}.{j}.conv1.weight" for i in (1, 2, 3) for j in range(3)
    ]


def test_a_classifier_keeps_its_normalization(coupled) -> None:
    network, size, bare = coupled("cifar-resnet20", 8)
    wrapped = Classifier(network, Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)))
    coupling = check(wrapped, size)
    assert [group.name for group in coupling.groups] == [f"network.{group.name}" for group in bare.groups]
    assert coupling.classifier == ("network.linear.weight",)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_network_stays_as_it_was(build_family, mode) -> None:
    network, size = build_family("digits-conv", 8)
    network = nn.Sequential(nn.BatchNorm2d(1), network).train()
    network[1].eval()
    for number, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = weights_hash(network)
    identities = [id(parameter) for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with mode():
        coupling = channel_groups(network, size)
    assert torch.equal(torch.rand(2), expected)
    assert len(coupling.groups) == 3
    assert weights_hash(network) == before
    assert [id(parameter) for parameter in network.parameters()] == identities
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == [i % 2 == 0 for i in range(len(identities))]
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_groups_do_not_depend_on_the_weights(build_family) -> None:
    network, size = build_family("digits-conv", 8)
    dense = channel_groups(network, size)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    empty = channel_groups(network, size)
    assert [group.name for group in empty.groups] == [group.name for group in dense.groups]


def test_a_network_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "network-cannot-run"):
        channel_groups(registry.build("digits-conv"), (3, 8, 8))


SIZE = (3, 6, 6)


class Custom(nn.Module):
    """Layers and a forward pass of a test's own; ``head`` reads the mean of a map."""

    def __init__(self, forward: Callable[[Custom, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def read(network: Custom, features: Tensor) -> Tensor:
    logits: Tensor = network.head(features.mean((2, 3)))
    return logits


def test_a_layer_used_twice_ties_what_it_writes_to_what_it_reads() -> None:
    network = Custom(
        lambda net, x: read(net, net.again(net.again(net.stem(x).relu()).relu()).relu()),
        stem=conv(3, 6),
        again=conv(6, 6),
        head=nn.Linear(6, 4),
    )
    coupling = check(network, SIZE)
    (group,) = coupling.groups
    assert weights_in(group, coupling) == (["stem", "again"], ["again", "head"])
    assert weights_kept(coupling, {"stem.weight": 2}, network) == 3 * 2 + 2 * 2 + 2 * 4
    assert macs_kept(coupling, {"stem.weight": 2}, network) == 36 * (3 * 2 + 2 * 2 * 2) + 2 * 4


def test_two_layers_of_one_weight_lose_the_same_channels() -> None:
    network = Custom(
        lambda net, x: read(net, net.d(net.c(net.b(net.a(x).relu()).relu()).relu()).relu()),
        a=conv(3, 6),
        b=conv(6, 8),
        c=conv(8, 6),
        d=conv(6, 8),
        head=nn.Linear(8, 4),
    )
    network.d.weight = network.b.weight
    coupling = check(network, SIZE)
    inputs, outputs = coupling.groups
    assert weights_in(inputs, coupling) == (["a", "c"], ["b"])
    assert weights_in(outputs, coupling) == (["b"], ["c", "head"])
    assert {touched.parameter for touched in outputs.writers} == {"b.weight", "b.bias", "d.bias"}


def test_a_sum_over_a_concatenation_splits_its_writer() -> None:
    network = Custom(
        lambda net, x: read(net, torch.cat([net.a(x), net.b(x)], 1) + net.both(x)),
        a=conv(3, 6),
        b=conv(3, 4),
        both=conv(3, 10),
        head=nn.Linear(10, 5),
    )
    coupling = check(network, SIZE)
    assert [(group.name, group.channels) for group in coupling.groups] == [("a.weight", 6), ("b.weight", 4)]
    offsets = {
        group.name: touched.index.flatten().tolist()
        for group in coupling.groups
        for touched in group.writers
        if touched.parameter == "both.weight"
    }
    assert offsets == {"a.weight": [0, 1, 2, 3, 4, 5], "b.weight": [6, 7, 8, 9]}


def test_groups_that_begin_in_the_same_weight_have_names_of_their_own() -> None:
    network = Custom(
        lambda net, x: read(net, net.both(x) + torch.cat([net.a(x), net.b(x)], 1)),
        both=conv(3, 10),
        a=conv(3, 6),
        b=conv(3, 4),
        head=nn.Linear(10, 5),
    )
    coupling = check(network, SIZE)
    assert [group.name for group in coupling.groups] == ["both.weight[0]", "both.weight[6]"]


def test_a_channel_that_is_concatenated_twice_has_two_columns() -> None:
    network = Custom(
        lambda net, x: read(net, net.b(torch.cat([y := net.a(x).relu(), y], 1)).relu()),
        a=conv(3, 4),
        b=conv(8, 5),
        head=nn.Linear(5, 4),
    )
    first, _ = check(network, SIZE).groups
    assert first.readers[0].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_gate_belongs_to_the_channels_that_it_opens() -> None:
    def run(net: Custom, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        gate = net.up(net.down(y.mean((2, 3))).relu()).sigmoid()
        return read(net, net.b(y * gate[:, :, None, None]).relu())

    network = Custom(
        run, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), b=conv(8, 5), head=nn.Linear(5, 4)
    )
    coupling = check(network, SIZE)
    assert weights_in(by_name(coupling)["a.weight"], coupling) == (["a", "up"], ["down", "b"])
    assert coupling.skipped == ()


def sandwich(between: Callable[[Tensor], Tensor], outputs: int = 6, inputs: int = 6) -> Custom:
    """A convolution ``a``, something between, and a convolution ``b`` that reads it."""

    def run(net: Custom, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        # A module is called by its name, so that a copy of the network calls its own.
        y = net.between(y) if isinstance(between, nn.Module) else between(y)
        return read(net, net.b(y).relu())

    layers = {"between": between} if isinstance(between, nn.Module) else {}
    return Custom(run, a=conv(3, outputs), **layers, b=conv(inputs, 5), head=nn.Linear(5, 4))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


HIDDEN = {
    "channel mean": sandwich(lambda x: x * x.mean(1, keepdim=True)),
    "softmax": sandwich(lambda x: x.softmax(1)),
    "gated halves": sandwich(lambda x: F.glu(x, 1), outputs=12),
    "product of halves": sandwich(lambda x: torch.mul(*x.chunk(2, 1)), outputs=12),
    "flip": sandwich(lambda x: x + x.flip(1)),
    "shuffle": sandwich(lambda x: x + x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
    "pixel shuffle": sandwich(lambda x: F.pixel_shuffle(x, 2), outputs=8, inputs=2),
    "padding": sandwich(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), outputs=4),
    "cut": sandwich(lambda x: x[:, 1:5], inputs=4),
    "sort": sandwich(lambda x: x.sort(1)[0]),
    "constant per channel": sandwich(lambda x: x * torch.arange(6).reshape(6, 1, 1)),
    "fixed width": sandwich(lambda x: x.view(-1, 6, 6, 6)),
    "detached": sandwich(lambda x: x.detach()),
    "grouped convolution": sandwich(conv(6, 6, groups=2)),
    "depthwise with two rows each": sandwich(conv(6, 12, groups=6), inputs=12),
    "group normalization": sandwich(nn.GroupNorm(3, 6)),
    "parameter of no layer": sandwich(Scale()),
    "transposed convolution": sandwich(nn.ConvTranspose2d(6, 6, 1)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_channels_that_cannot_vanish_alone_are_skipped_by_name(spread_norms, name) -> None:
    coupling = check(spread_norms(HIDDEN[name]), SIZE)
    assert [group.name for group in coupling.groups] == ["b.weight"]
    grouped = {"between.weight"} & set(coupling.weights)
    assert {name for name, _ in coupling.skipped} == {"a.weight"} | grouped


def test_reasons_say_what_is_in_the_way() -> None:
    def why(name: str) -> str:
        return dict(channel_groups(HIDDEN[name], SIZE).skipped)["a.weight"]

    assert "the grouped convolution between.weight" in why("grouped convolution")
    assert "GroupNorm" in why("group normalization")
    assert "between.gamma" in why("parameter of no layer")
    assert "does not run" in why("fixed width")
    assert "changes what the others compute" in why("flip")


def test_attention_is_left_out_and_what_lies_between_its_blocks_is_not() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 3, stride=3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up = nn.Linear(8, 12)
            self.down = nn.Linear(12, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
            tokens = tokens + self.down(self.up(tokens).relu())
            logits: Tensor = self.head(tokens.mean(1))
            return logits

    coupling = check(Attention(), SIZE)
    assert [(group.name, group.channels) for group in coupling.groups] == [("up.weight", 12)]
    assert [name for name, _ in coupling.skipped] == [
        "patches.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "down.weight",
    ]
    assert "MultiheadAttention" in dict(coupling.skipped)["patches.weight"]


def test_weights_that_are_computed_are_not_touched() -> None:
    network = Custom(
        lambda net, x: read(net, net.b(net.a(x).relu()).relu()),
        a=conv(3, 6),
        b=nn.utils.parametrizations.weight_norm(conv(6, 5)),
        head=nn.Linear(5, 4),
    )
    coupling = check(network, SIZE)
    assert coupling.groups == ()
    assert [name for name, _ in coupling.skipped] == ["a.weight", "b.parametrizations.weight.original1"]


def test_the_image_and_the_logits_stay_whole() -> None:
    added = Custom(lambda net, x: read(net, x + net.a(x)), a=conv(3, 3), head=nn.Linear(3, 4))
    coupling = check(added, SIZE)
    assert coupling.groups == ()
    assert [name for name, _ in coupling.skipped] == ["a.weight"]
    depthwise = Custom(lambda net, x: read(net, net.a(x)), a=conv(3, 3, groups=3), head=nn.Linear(3, 4))
    assert check(depthwise, SIZE).groups == ()
    for network in (nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), nn.Sequential(conv(3, 4), Mean())):
        coupling = check(network, SIZE)
        assert (coupling.groups, coupling.skipped) == ((), ())
        assert coupling.classifier == coupling.weights


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_two_heads_are_both_classifiers() -> None:
    network = Custom(
        lambda net, x: torch.cat([read(net, y := net.a(x).relu()), net.other(y.mean((2, 3)))], 1),
        a=conv(3, 6),
        head=nn.Linear(6, 4),
        other=nn.Linear(6, 3),
    )
    coupling = check(network, SIZE)
    assert coupling.classifier == ("head.weight", "other.weight")
    assert weights_in(coupling.groups[0], coupling) == (["a"], ["head", "other"])


def test_a_network_without_weights_has_no_groups() -> None:
    coupling = channel_groups(Mean(), SIZE)
    assert (coupling.groups, coupling.skipped, coupling.weights) == ((), (), ())
    assert weights_kept(coupling, {}, Mean()) == macs_kept(coupling, {}, Mean()) == 0


def test_layers_that_no_forward_pass_reaches_do_not_count(build_family) -> None:
    network, size = build_family("digits-conv", 8)
    expected = channel_groups(network, size).weights
    network.add_module("spare", nn.Identity())
    network.spare.add_module("layer", nn.Linear(5, 5))
    coupling = check(network, size)
    assert coupling.weights == expected == prunable(network, size)
    assert coupling.skipped == ()
