"""Networks that an attack says little about: each is told by name, and none passes a gate."""

import pytest
import torch

NETWORK = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, x):
        logits = self.layer(x.flatten(1))
        {body}


def make(classes=10):
    return Odd(classes)


make.input_size = (1, 8, 8)
"""


@pytest.mark.parametrize(
    ("body", "flag", "words"),
    [
        ("return logits.softmax(dim=1)", "not_logits", "returns probabilities"),
        ("return logits + torch.randn_like(logits)", "randomized", "for the same image vary"),
        ("return logits - logits.mean(dim=0)", "batch_dependent", "depend on the other images"),
        (
            "return logits if float(x.detach().max()) > 0.01 else -logits",
            "dynamic_control_flow",
            "control flow depends on the image",
        ),
        ("return 1000 * logits", "loss_of_precision", "float32 is too coarse"),
    ],
)
def test_a_doubtful_network_makes_the_gate_inconclusive(body, flag, words, s2ap, tmp_path) -> None:
    (tmp_path / "net.py").write_text(NETWORK.format(body=body))
    torch.manual_seed(0)
    torch.save({"layer.weight": torch.randn(10, 64), "layer.bias": torch.zeros(10)}, tmp_path / "model.pt")
    certify = ["certify", "model.pt", "--arch", "net.py:make", "--data", "digits", "--eps", "0.9", "--n", 10]
    done = s2ap.ok(*certify, "--threads", 1, "--workers", 1, "--json", cwd=tmp_path)
    assert flag in done.answer["certify"]["dense"]["flags"]
    assert f"reliability flag {flag}" in done.err
    gate = s2ap("gate", "--min-clean", 0, "--rule", "point", cwd=tmp_path)
    assert gate.code == 3, gate.out
    assert words in gate.out


def test_logits_that_are_not_finite_are_an_error_and_no_accuracy(s2ap, tmp_path) -> None:
    (tmp_path / "net.py").write_text(NETWORK.format(body="return logits / (x.max() < 0)"))
    torch.save({"layer.weight": torch.ones(10, 64), "layer.bias": torch.zeros(10)}, tmp_path / "model.pt")
    certify = ["certify", "model.pt", "--arch", "net.py:make", "--data", "digits", "--eps", "0.9", "--n", 10]
    s2ap.refused("logits-not-finite", *certify, "--threads", 1, "--workers", 1, cwd=tmp_path)
    assert not (tmp_path / "s2ap-run" / "certify" / "dense.json").exists()


def test_noise_is_named_before_any_work(s2ap, tmp_path) -> None:
    body = "return logits + torch.randn_like(logits)"
    (tmp_path / "net.py").write_text(NETWORK.format(body=body))
    torch.save({"layer.weight": torch.randn(10, 64), "layer.bias": torch.zeros(10)}, tmp_path / "model.pt")
    certify = ["certify", "model.pt", "--arch", "net.py:make", "--data", "digits", "--eps", "0.9", "--n", 10]
    done = s2ap(*certify, "--threads", 1, "--workers", 1, cwd=tmp_path)
    assert "the forward pass draws random numbers" in " ".join(done.err.split())


TRAINED = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head, self.kind = nn.Linear(64, 16), nn.Linear(16, 10), kind
        self.norm = nn.BatchNorm1d(16, track_running_stats=kind != "statistics")

    def forward(self, x):
        hidden = torch.relu(self.norm(self.layer(x.flatten(1))))
        logits = self.head(hidden)
        return {"tuple": (logits, hidden), "dict": {"logits": logits}}.get(self.kind, logits)
"""


@pytest.mark.parametrize(
    ("kind", "more", "code"),
    [
        ("statistics", (), "batch-statistics"),
        ("plain", ("--batch-size", 1), "batch-of-one"),
        ("tuple", (), "logits-invalid"),
        ("dict", (), "logits-invalid"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_any_work(kind, more, code, s2ap, tmp_path) -> None:
    factory = f"def make():\n    return Odd({kind!r})\n\n\nmake.input_size = (1, 8, 8)\n"
    (tmp_path / "net.py").write_text(TRAINED + "\n\n" + factory)
    space: dict[str, object] = {}
    exec(TRAINED, space)
    torch.save(space["Odd"](kind).state_dict(), tmp_path / "model.pt")  # type: ignore[operator]
    asked = ["--arch", "net.py:make", "--data", "digits", "--eps", "0.1", "--sparsity", 0.9, "--threads", 1]
    s2ap.refused(code, "prune", "model.pt", *asked, *more, cwd=tmp_path)
    assert not (tmp_path / "s2ap-run" / "search").exists()


UNCOVERED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.first(x.flatten(1))).cumsum(dim=1))


def make():
    return Net()


make.input_size = (1, 8, 8)
"""


def test_an_operator_without_counterpart_is_told_early_and_no_hint_leads_back(s2ap, tmp_path) -> None:
    (tmp_path / "net.py").write_text(UNCOVERED)
    space: dict[str, object] = {}
    exec(UNCOVERED, space)
    torch.save(space["make"]().state_dict(), tmp_path / "model.pt")  # type: ignore[operator]
    here, threads = ("--arch", "net.py:make"), ("--threads", 1)
    for form, told in ((("--int8",), True), (("--values", "float16"), True), ((), False)):
        plan = s2ap.json("plan", "model.pt", *here, "--sparsity", 0.5, *form, cwd=tmp_path)
        assert any("CumSum" in note for note in plan["notes"]) == told
    task = ("--data", "digits", "--eps", "0.05", *threads)
    s2ap.ok("certify", "model.pt", *here, *task, "--n", 5, "--workers", 1, cwd=tmp_path)
    exported = s2ap.ok("export", "--int8", *here, cwd=tmp_path)
    assert "CumSum" in exported.err
    assert "certify the file itself" not in exported.err
    file = next((tmp_path / "s2ap-run").glob("export*/*.onnx"))
    s2ap.refused("operator-unsupported", "certify", "--artifact", file, *threads, cwd=tmp_path)
    gate = s2ap("gate", "--min-clean", 0, "--rule", "point", cwd=tmp_path)
    assert gate.code == 3
    assert "export it in float32" in " ".join(gate.out.split())
