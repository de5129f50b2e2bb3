"""Format figures and results as text, for the page and for the card."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Interval, Proven, Share
from s2ap_deploy.formatting import exact_percent
from s2ap_deploy.gating.sample_checks import LEVEL, PairRange
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.reporting.run_facts import DENSE, PRUNED, Facts
from s2ap_deploy.spec import WeightCount

VERDICTS = {
    "pass": "Passed",
    "fail": "Failed",
    "inconclusive": "Inconclusive",
    None: "Not judged yet",
}
PROMISE = (
    "Robust accuracy under attack is an upper bound: a stronger attack may break more. It is not a formal "
    "guarantee. Only provably robust accuracy is a guarantee, and it is a lower bound."
)
CHOICE = (
    "Intervals are exact (Clopper-Pearson, 95%) and cover the choice of test images. They do not cover "
    "attacks that were not tried."
)
DENSE_FILE = (
    "Dense is the network before pruning. The dense file has its float32 weights and all channels; zeros "
    "stored in it change neither its size nor its time."
)
_NO_GAIN = "no latency gain"
_AS_FAST = 0.95


def role(name: str, facts: Facts) -> str:
    """Return the network's role, or a name that distinguishes a file's certificate from the others."""
    if name in (DENSE, PRUNED):
        return name
    return facts.path_of(name)


def share(value: Share | Interval | Proven | None) -> str:
    """Return ``91.7% [81.6%, 97.2%]``, rounded so that no difference is hidden."""
    if value is None:
        return "not measured"
    if isinstance(value, Interval):
        return f"between {exact_percent(value.low)} and {exact_percent(value.high)}, stopped early"
    low, high = value.interval
    middle = value.count / value.n if isinstance(value, Proven) else value.value
    return f"{exact_percent(middle)} [{exact_percent(low)}, {exact_percent(high)}]"


def size(number: float) -> str:
    """Return ``81,896 B``."""
    return f"{number:,.0f}\N{NO-BREAK SPACE}B"


def times(large: float, small: float) -> str:
    """Return ``8.1 times smaller``, or the fitting words if nothing shrank."""
    if small <= 0 or large <= 0:
        return "size unknown"
    if large >= small:
        return f"{large / small:.1f} times smaller"
    return f"{small / large:.1f} times larger"


def drop(pairs: PairRange) -> str:
    """Return lost and gained samples, and the upper bound on the drop in the worst open case."""
    worst = pairs.worst
    lost = f"{worst.lost}" if pairs.exact else f"{pairs.lost} to {worst.lost}"
    gained = f"{pairs.gained}" if pairs.exact else f"{pairs.gained} to {pairs.best.gained}"
    return (
        f"{lost} of {pairs.n} images lost, {gained} gained: observed drop {signed(worst.observed)}, "
        f"at most {signed(worst.bound('lower'))} (one-sided {100 * LEVEL:.0f}% bound on the same images)"
    )


def signed(value: float) -> str:
    """Return a difference of fractions in percentage points."""
    return f"{100 * value:+.1f} points".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0")


def latency(report: ExportReport) -> str:
    """Return the paired ratio with its interpretation; a ratio near 1 is reported as no difference."""
    if report.latency_ratio is None:
        return "not measured"
    said = f"{report.latency_ratio:.2f} of the dense file's time"
    if report.latency_ratio >= _AS_FAST:
        said += f": {_NO_GAIN}"
    return said + (f" ({report.latency_ms:.3g} ms an image)" if report.latency_ms is not None else "")


def ratio(report: ExportReport) -> str:
    """Return the paired ratio alone, for a heading."""
    if report.latency_ratio is None:
        return "not measured"
    return f"{report.latency_ratio:.2f}" + (f", {_NO_GAIN}" if report.latency_ratio >= _AS_FAST else "")


def robust_label(facts: Facts) -> str:
    """Return the label of robust accuracy; that of a randomized model is not an upper bound."""
    speaks = subject(facts)
    estimate = speaks is not None and speaks.protocol.startswith("rand")
    return f"Robust accuracy ({'estimate' if estimate else 'upper bound'})"


def asked(facts: Facts) -> list[tuple[str, str]]:
    """Return the run's settings as label and value, from the inputs of its stages."""
    first = next(iter(facts.certificates.values()), None)
    prune, certify = _table(facts.inputs("search"), "prune"), _table(facts.inputs("certify"), "certify")
    stages = [facts.inputs(name) for name in ("certify", "finetune", "search", "pretrain")]
    threat = next((found for inputs in stages if (found := _table(inputs, "threat"))), {})
    data = next((found for inputs in stages if (found := _table(inputs, "data"))), {})
    seed = next((inputs["seed"] for inputs in stages[1:] if "seed" in inputs), None)
    rows = {
        "Architecture": first.subject.arch if first else facts.inputs("pretrain").get("arch"),
        "Data": data.get("name"),
        "Threat model": f"{threat.get('norm')}, eps {threat.get('eps')}" if threat else None,
        "Method": _method(prune),
        "Sparsity": _sparsity(prune),
        "Seed": seed,
        "Attack protocol": first.protocol if first else certify.get("version"),
        "Test images": f"{first.n:,}" if first else certify.get("n"),
    }
    return [(label, str(value)) for label, value in rows.items() if value is not None]


def thresholds(facts: Facts) -> list[tuple[str, str]]:
    """Return the thresholds of the gate as options and values."""
    policy = _table(facts.inputs("gate"), "policy")
    return [
        (f"--{key.replace('_', '-')}", str(value)) for key, value in policy.items() if value not in (None, [])
    ]


def _table(inputs: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = inputs.get(key)
    return found if isinstance(found, dict) else {}


def _method(prune: Mapping[str, Any]) -> str | None:
    if not prune:
        return None
    s2ap = f" + S2AP (gamma {prune.get('gamma')})" if prune.get("s2ap") else ""
    parts = [f"{prune.get('method', 'unknown method')}{s2ap}"]
    parts += [f"{name} {prune[name]}" for name in ("budget", "granularity") if prune.get(name) is not None]
    return ", ".join(parts)


def _sparsity(prune: Mapping[str, Any]) -> str | None:
    if prune.get("keep_ratio") is not None:
        return f"{prune['keep_ratio']} of the channels kept"
    value = prune.get("sparsity")
    whose = "weights that can be pruned" if prune.get("allow_unpruned") else "weights"
    return f"{exact_percent(value)} of the {whose}" if isinstance(value, int | float) else None


def outside(count: WeightCount | None) -> str:
    """Return the number of weights that cannot be pruned, with their names."""
    if count is None:
        return "not counted"
    names = ", ".join(each.name for each in count.outside)
    return f"{count.counted - count.prunable:,} of {count.counted:,}" + (f": {names}" if names else "")


def sparsity(facts: Facts) -> str:
    """Return the achieved sparsity, as far as it is known."""
    certificate = facts.certificates.get(PRUNED)
    value = certificate.subject.sparsity if certificate else facts.results("search").get("sparsity")
    return exact_percent(value) if isinstance(value, int | float) and 0 <= value <= 1 else "not pruned"


def subject(facts: Facts) -> Certificate | None:
    """Return the certificate that represents the run: the pruned network's, or else the dense one's."""
    return facts.certificates.get(PRUNED) or facts.certificates.get(DENSE)


AGAIN = "again"
# Options that decide on bits or on what is found, and that belong to a machine or to a person's word.
VALUED = ("--arch", "--data-root", "--device", "--threads", "--precision", "--accumulate", "--devices")
FLAGS = ("--trust-pickle", "--compile")


def repetition(facts: Facts) -> tuple[str, ...]:
    """Return the commands that repeat the run, for the parent of the run folder; none without a recipe.

    The first runs the recipe, with the machine's options as the recorded commands last gave them; the second
    judges by the thresholds of the verdict, where there is one.
    """
    if facts.recipe is None:
        return ()
    words = ["s2ap-deploy", "run", f"{facts.name}/{facts.recipe_file}", "--run", AGAIN]
    lines = [shlex.join([*words, *_carried(facts.manifest.commands)])]
    policy = facts.inputs("gate").get("policy")
    asked = {key: value for key, value in policy.items() if value is not None} if policy else {}
    if facts.verdict is not None and asked:
        options = [
            part for key, value in asked.items() for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        lines.append(shlex.join(["s2ap-deploy", "gate", "--run", AGAIN, *options]))
    return tuple(lines)


def _carried(commands: tuple[str, ...]) -> list[str]:
    """Return the machine options, each with the value of the last command that set it."""
    said: dict[str, str | None] = {}
    for command in commands:
        said |= dict(_options(command))
    return [part for name, value in said.items() for part in (name, value) if part is not None]


def _options(command: str) -> Iterator[tuple[str, str | None]]:
    """Return the options of one command line that carry over, with their values."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unclosed quotation is not one of our commands
        return
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in FLAGS and not equals:
            yield name, None
            continue
        value = value if equals else after
        # A registered architecture is in the recipe; an import path is not.
        if name in VALUED and value and (name != "--arch" or ":" in value):
            yield name, value
