"""Convert networks for the runtimes of devices, compare their answers, write the tables of docs/runtimes.md.

    python -m benchmarks device-runtimes --demo A --mnist B --channels C --work W
    python -m benchmarks device-runtimes --certify --demo A --work W
    python -m benchmarks device-runtimes --page

Needs the extras executorch, litert, ncnn, coreml and openvino, in one environment or in several: what is not
installed is left for another call. A is the demo's run, B the shared MNIST checkpoint at 90 %, C a run on
half of its channels, each of them certified. A CIFAR ResNet-18 and a MobileNetV2 with random weights and
zeros join them. With --certify the demo's files are attacked themselves, on --n images, and judged by the
gate. Every row is kept when it is measured, and not measured again: remove the result file to begin anew.
An hour on two cores.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import arguments, networks, results
from s2ap_deploy import api
from s2ap_deploy.errors import DeployError
from s2ap_deploy.onnx_export.export_onnx import ExportSource, export_onnx
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recorder import Silent
from s2ap_deploy.runtimes import runtime
from s2ap_deploy.stages import export_device

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"
RUNS = {"digits, 90 %": "demo", "MNIST, 90 %": "mnist", "MNIST, half of the channels": "channels"}
RANDOM = {
    "CIFAR ResNet-18, 90 %, random": "cifar-resnet18",
    "MobileNetV2 (224), 90 %, random": "torchvision/mobilenet_v2",
}
MIN_ROBUST = 0.4
JUDGES = ("onnxruntime", "openvino", "executorch", "litert", "ncnn", "c")
NAMES = ("onnxruntime", "openvino", "executorch", "litert", "ncnn", "coreml")
TITLES = {"onnxruntime": "ONNX Runtime", "c": "C sources"}
IMAGES = 64


def from_run(run: Path, name: str, int8: bool) -> ExportReport:
    """Export a run for a target, as the command line does."""
    label = f"{name}-{'int8' if int8 else 'float32'}"
    finished = run / f"export-{label}" / "report.json"
    if finished.exists():
        return ExportReport.load(finished)
    made = {"target": None} if name == "onnxruntime" else {"target": name}
    return api.export(run, int8=int8 or None, name=label, **made)


def from_network(arch: str, work: Path, name: str, int8: bool) -> ExportReport:
    """Export a random network at 90 % zeros, and convert it."""
    classifier = networks.pruned(arch, 0.9)
    size = networks.network(arch)[1]
    images = np.random.default_rng(0).random((IMAGES, *size), dtype=np.float32)
    section = ExportSection(batch=1, int8=int8, convert=None if name == "onnxruntime" else name)
    source = ExportSource(classifier, size, images, {}, calibration=images[:16] if int8 else None)
    file = work / f"{name}.onnx"
    report = export_onnx(source, section, file, Silent())
    if section.convert is None:
        return report
    converter = runtime.find(name)
    return export_device.add_device_file(file, converter, source, section, report, Silent())[0]


def row(report: ExportReport) -> dict[str, Any]:
    """Return the figures of one file; those of ONNX Runtime are against PyTorch, others against it."""
    device = report.device
    agreement = report.agreement if device is None else device.agreement
    checks = report.points_checks if device is None else device.points_checks
    found: dict[str, Any] = {
        "bytes": report.bytes if device is None else device.bytes,
        "onnx_bytes": report.bytes,
        "precision": "int8" if report.quantization is not None else "float32",
        "versions": report.versions if device is None else device.versions,
    }
    if device is None:
        found["versions"] = {"onnxruntime": report.versions["onnxruntime"]}
        found["stored"] = "encoded"
    else:
        found["seconds"] = device.seconds
        found["isolated"] = device.isolated
        of = runtime.find(device.runtime)
        found["stored"] = "encoded" if of.encoded else "sparse" if of.kept_bits else "dense"
    if agreement is not None:
        found |= {
            "n": agreement.n,
            "same": agreement.argmax_agree,
            "difference": agreement.max_logit_difference,
        }
    for each in checks:
        points = 2 * each.n
        found |= {"points": points, "points_same": points - each.disagreements, "survived": each.survived}
        found |= {"certified": each.n}
    return found


def measure(args: Any, figures: dict[str, Any]) -> None:
    for title, make in makers(args).items():
        for name in NAMES:
            for int8 in (False, True):
                key = f"{title} | {name} | {'int8' if int8 else 'float32'}"
                if key in figures["rows"] and "skipped" not in figures["rows"][key]:
                    continue
                started = time.monotonic()
                if args.finished and not finished(args, title, name, int8):
                    continue
                try:
                    figures["rows"][key] = row(make(name, int8))
                except DeployError as error:
                    if error.code == "extra-missing":
                        continue
                    figures["rows"][key] = {"failed": error.code, "message": error.message[:300]}
                print(f"{key}: {time.monotonic() - started:.0f} s, {figures['rows'][key]}", flush=True)
                results.write(args.name, figures)


def finished(args: Any, title: str, name: str, int8: bool) -> bool:
    """Return whether the file is there already, or would be refused at once."""
    kind = "int8" if int8 else "float32"
    if name != "onnxruntime" and kind not in runtime.find(name).bits:  # type: ignore[arg-type]
        return True
    return title in RUNS and (args.work / RUNS[title] / f"export-{name}-{kind}" / "report.json").exists()


def makers(args: Any) -> dict[str, Callable[[str, bool], ExportReport]]:
    found: dict[str, Callable[[str, bool], ExportReport]] = {}
    for title, option in RUNS.items():
        if getattr(args, option) is not None:
            run = args.work / option
            if not run.exists():
                shutil.copytree(getattr(args, option), run)
            found[title] = lambda name, int8, run=run: from_run(run, name, int8)
    if args.demo is not None:
        for title, arch in RANDOM.items():
            found[title] = lambda name, int8, arch=arch: from_network(arch, args.work, name, int8)
    return found


def certify(args: Any, figures: dict[str, Any]) -> None:
    """Attack the demo's files through their own runtimes, and let the gate judge each run."""
    run = args.work / "certify"
    if not run.exists():
        shutil.copytree(args.demo, run)
    for name in JUDGES:
        if name in figures["certified"]:
            continue
        try:
            report = from_run(run, name, False) if name != "c" else api.export(run, c=True, name="c")
        except DeployError as error:
            if error.code == "extra-missing":
                continue
            raise
        file = run / report.folder / (report.file if name == "onnxruntime" else name)
        found = api.certify(run, artifact=file, n=args.n).file
        assert found is not None
        attacked = found.subject.artifact
        assert attacked is not None
        figures["certified"][name] = {
            "n": found.n,
            "clean": found.survivors[0],
            "robust": found.survivors[1],
            "twin": attacked.twin.model_dump(),
            "flags": list(found.flags),
            "precision": found.environment.get("precision"),
            "broken": [each.id for each in found.samples if each.broken_by is not None],
        }
        print(name, figures["certified"][name], flush=True)
        results.write(args.name, figures)
    checks = api.gate(run, min_robust=MIN_ROBUST).checks
    figures["gate"] = [{"status": each.status, "message": each.message} for each in checks]
    results.write(args.name, figures)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def title(name: str) -> str:
    return TITLES.get(name) or runtime.find(name).title  # type: ignore[arg-type]


def pages(figures: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by their names."""
    rows = []
    order = [*RUNS, *RANDOM]
    places = {
        key: (order.index(network), NAMES.index(name), kind)
        for key in figures["rows"]
        for network, name, kind in [key.split(" | ")]
    }
    for key in sorted(places, key=places.__getitem__):
        each = figures["rows"][key]
        network, name, kind = key.split(" | ")
        if "failed" in each:
            rows.append([network, title(name), kind, f"**{each['failed']}**", "", "", "", ""])
            continue
        points = f"{each['points_same']} of {each['points']}" if "points" in each else "-"
        if "n" not in each:
            same, difference = "not run here", "-"
        else:
            same = points if "points" in each else f"{each['same']} of {each['n']} images"
            difference = f"{each['difference']:.1e}"
        robust = f"{each['survived']} of {each['certified']}" if "survived" in each else "-"
        size = [f"{each['bytes']:,}", each["stored"]]
        rows.append([network, title(name), kind, *size, same, robust, difference])
    head = [
        "network",
        "runtime",
        "arithmetic",
        "bytes",
        "weights",
        "same class",
        "robust",
        "largest difference",
    ]
    found = {"files": table(head, rows)}
    judged = [
        [
            title(name),
            f"{each['clean']} of {each['n']}",
            f"{each['robust']} of {each['n']}",
            "{equal_predictions} of {n}, {max_logit_difference:.1e}".format(**each["twin"]),
            ", ".join(each["flags"]) or "none",
        ]
        for name in JUDGES
        if (each := figures["certified"].get(name)) is not None
    ]
    head = ["judged by", "correct", "robust", "same class as the twin, difference", "flags"]
    found["verdicts"] = table(head, judged)
    said = [f"{each['status']}: {each['message']}" for each in figures["gate"]]
    found["gate"] = "\n".join(["```", *said, "```"])
    versions = {}
    for each in figures["rows"].values():
        versions |= each.get("versions", {})
    found["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return found


def write_page(figures: dict[str, Any]) -> None:
    """Replace what stands between the marks of each table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in pages(figures).items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = arguments.parser(__doc__, "device-runtimes")
    for option in (*RUNS.values(), "work"):
        parser.add_argument(f"--{option}", type=Path)
    parser.add_argument("--n", type=int, default=10, help="images of --certify")
    parser.add_argument("--certify", action="store_true", help="attack the demo's files themselves")
    parser.add_argument("--finished", action="store_true", help="collect only what is exported already")
    parser.add_argument("--page", action="store_true", help="only write the tables into docs/runtimes.md")
    args = parser.parse_args()
    path = results.FOLDER / f"{args.name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    figures = {name: known.get(name, {}) for name in ("rows", "certified")} | {"gate": known.get("gate", [])}
    if args.page:
        write_page(known)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    certify(args, figures) if args.certify else measure(args, figures)


if __name__ == "__main__":
    main()
