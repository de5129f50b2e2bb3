"""The libraries that the package needs, and the commands that install missing ones.

``gate`` and ``verify --files`` need three small libraries. This installs the package with only these::

    pip install --no-deps s2ap-deploy
    pip install --no-warn-conflicts $(python -m s2ap_deploy.requirements gate)
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

from s2ap_deploy.errors import ArchitectureError, UsageError

DISTRIBUTION = "s2ap-deploy"
# Distribution → the module by which it is imported.
MODULES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "torch": "torch",
    "torchvision": "torchvision",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "torch-pruning": "torch_pruning",
    "pyautoattack": "pyautoattack",
    "safetensors": "safetensors",
    "Pillow": "PIL",
    "click": "click",
    "rich": "rich",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "Jinja2": "jinja2",
    "MarkupSafe": "markupsafe",
    "packaging": "packaging",
}
# Extra → the distributions that it installs.
EXTRAS = {
    "tracking": ("tensorboard", "mlflow", "wandb"),
    "openvino": ("openvino",),
    "executorch": ("executorch", "torchao"),
    "litert": ("litert-torch", "ai-edge-litert"),
    "ncnn": ("ncnn", "pnnx"),
    "coreml": ("coremltools",),
    "signing": ("model-signing", "pyOpenSSL"),
    "timm": ("timm",),
    "transformers": ("transformers",),
    "ray": ("ray",),
}
GATE = ("click", "pydantic", "PyYAML")
"""The distributions that ``gate`` and ``verify --files`` import."""


def gate_requirements() -> list[str]:
    """List the requirements in :data:`GATE` with the version bounds that the package declares.

    Returns:
        One requirement per distribution, such as ``click<9,>=8.2``; bare names where the package is imported
        from a source tree without being installed.
    """
    found = {_name(requirement): requirement for requirement, marker in _declared() if "extra" not in marker}
    return [found.get(_name(name), name) for name in GATE]


def extra_requirements(extra: str) -> list[str]:
    """List the requirements of an extra with the version bounds that the package declares.

    Bare names where the package is imported from a source tree without being installed.
    """
    found = [requirement for requirement, marker in _declared() if marker == f"extra == '{extra}'"]
    # Metadata has the bounds in the order of their signs; people read the lower one first.
    return [re.sub(r"(<[^,]+),(>=[^,]+)$", r"\2,\1", each) for each in found] or list(EXTRAS[extra])


def install_incomplete(error: ImportError) -> UsageError | None:
    """Turn the failed import of a library in :data:`MODULES` into an error that says how to install it.

    Returns:
        The error, or None where the import failed for another reason.
    """
    distribution = next((name for name, module in MODULES.items() if module == error.name), None)
    if distribution is None or not isinstance(error, ModuleNotFoundError):
        return None
    hint = f"for all commands: pip install {DISTRIBUTION}"
    if distribution in GATE:
        listed = " ".join(f'"{each}"' for each in gate_requirements())
        hint += f"; for gate and verify --files: pip install --no-warn-conflicts {listed}"
    return UsageError(
        f"this command needs {distribution}, which is not installed", code="install-incomplete", hint=hint
    )


def extra_missing(extra: str, asked: str) -> ArchitectureError:
    """Return the error for a network of a library that is an extra of the package and not installed."""
    listed = " ".join(f'"{each}"' for each in extra_requirements(extra))
    return ArchitectureError(
        f"{asked} is a network of {extra}, which is not installed",
        code="extra-missing",
        hint=f"pip install {listed}: the extra {extra} of {DISTRIBUTION}",
    )


def _declared() -> list[tuple[str, str]]:
    """Return every declared requirement with its marker; nothing in a source tree that is not installed."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    parts = (each.partition(";") for each in declared)
    return [(requirement.strip(), marker.strip().replace('"', "'")) for requirement, _, marker in parts]


def _name(requirement: str) -> str:
    """Return the normalized name of a requirement: ``py-yaml`` for ``Py_YAML<7``."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def main(arguments: list[str]) -> int:
    """Print what ``gate`` needs, one requirement per line, and with ``signing`` what signatures need."""
    if arguments not in (["gate"], ["gate", "signing"]):
        sys.stderr.write("usage: python -m s2ap_deploy.requirements gate [signing]\n")
        return 2
    signing = extra_requirements("signing") if "signing" in arguments else []
    print("\n".join([*gate_requirements(), *signing]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
