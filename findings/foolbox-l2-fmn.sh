#!/usr/bin/env bash
# foolbox 3.3.4: L2FMNAttack (fast minimum norm, Pintor et al., 2021) never projects onto its L2 ball.
#
# Expected: on a linear classifier, where the distance to the nearest class is known exactly, the attack comes close
#   to it, and closer with more steps.
# Seen: the median answer is about three times the exact distance, and the same for 50, 200 and 1000 steps. The L-inf
#   version of the same attack and the L2 Carlini-Wagner attack of the same package stay within 5 %.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet foolbox==3.3.4 torch==2.13.0 numpy
cd "$work"
env/bin/python - <<'PY'
import warnings

import foolbox
import torch

warnings.filterwarnings("ignore")
torch.manual_seed(0)
images = 0.2 + 0.6 * torch.rand(16, 3, 12, 12)
linear = torch.nn.Linear(432, 10, bias=False)
linear.weight.data = torch.randn(10, 432) / 432**0.5
network = torch.nn.Sequential(torch.nn.Flatten(), linear).eval()
logits = network(images).detach()
labels = logits.argmax(1)
rows = linear.weight.detach()


def exact(dual):
    """Distance of every image to the nearest half-space of another class (no pixel bound is active)."""
    margin = logits.gather(1, labels[:, None]) - logits
    slope = torch.linalg.vector_norm(rows[labels][:, None] - rows, ord=dual, dim=2)
    return (margin / slope).masked_fill(torch.nn.functional.one_hot(labels, 10).bool(), torch.inf).amin(1)


def ratio(attack, norm, dual):
    _, found, success = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), images, labels, epsilons=None)
    assert success.all()
    return float(((found - images).flatten(1).norm(p=norm, dim=1) / exact(dual)).median())


l2 = [ratio(foolbox.attacks.L2FMNAttack(steps=steps), 2, 2) for steps in (50, 200, 1000)]
linf = ratio(foolbox.attacks.LInfFMNAttack(steps=50), torch.inf, 1)
peer = ratio(foolbox.attacks.L2CarliniWagnerAttack(steps=200, binary_search_steps=5), 2, 2)
print("foolbox", foolbox.__version__, "| distance found over exact distance, median of 16 images")
print("L2FMNAttack with 50, 200, 1000 steps:", *(f"{value:.3f}" for value in l2))
print(f"LInfFMNAttack {linf:.3f}, L2CarliniWagnerAttack {peer:.3f}")
assert max(linf, peer) < 1.05, "the controls changed"
raise SystemExit(0 if min(l2) > 2 and max(l2) == min(l2) else "the behavior changed")
PY
