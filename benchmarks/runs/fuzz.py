"""Give commands mutated files of every kind that they read: exit codes, hangs, memory, wrong acceptance.

    python -m benchmarks fuzz --run s2ap-demo --work work --cases 3000

``--run`` is a finished run folder with dense and pruned certificates and an export, such as the demo's. Each
case copies a folder, spoils one file and runs one command in a forked child; its random numbers follow from
its number. Every command is first run on sound files, where it must end with 0. ``--work`` keeps the finished
cases, and a repeated command continues after them, with those that reached the time limit once more.

Bound files are those that a hash or a recomputation holds: an exit code 0 although their content changed
counts as ``accepted``. In some cases every record is made to name the spoiled file, so that its content is
parsed; accepting it is then no fault.
"""

import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib import arguments, results
from s2ap_deploy import files
from s2ap_deploy.recipe import target as targets

SECONDS = 60  # after which a case hangs
MOST_BYTES = 2**31  # peak resident memory of a case
EASY = ["--min-robust", "0", "--max-drop", "1", "--max-clean-drop", "1", "--rule", "point"]
GATE = ["gate", *EASY, "--run", "ROOT/run"]
FILES = ["verify", "ROOT/run/certify/pruned.json", "--files"]
REPORT = ["report", "ROOT/run", "--output", "OUT"]
SHORT = ["--sparsity", "0.9", "--search-epochs", "1", "--finetune-epochs", "1", "--threads", "1"]
PRUNE = ["prune", "ROOT/NAME/model.safetensors", *SHORT, "--run", "ROOT/NAME/run", "--quiet"]
ATTACK = ["certify", "ROOT/attack/model.safetensors", "--n", "16", "--eps", "0.5", "--workers", "1"]
ATTACK += ["--run", "ROOT/attack/run", "--quiet"]
IMAGES = ["--data", "imagefolder:ROOT/images/data", "--arch", "digits-conv", "--eps", "0.1", "--quiet"]
PRETRAIN = ["pretrain", *IMAGES, "--epochs", "1", "--threads", "1", "--run", "ROOT/images/run"]
SWEEP = ["sweep", "ROOT/sweep/small.yaml", "--s2ap", "both", "--run", "ROOT/sweep/all", "--workers", "1"]
SWEEP += ["--threads", "1", "--quiet"]
SIGNED = ["gate", *EASY, "--public-key", "ROOT/signed/key.pub", "--run", "ROOT/signed/run"]
SMALL = """\
name: small
model: {arch: digits-conv}
data: {name: digits}
threat: {eps: 0.5}
pretrain: {epochs: 1, objective: {loss: fast}}
prune:
  sparsity: 0.9
  search: {epochs: 1, objective: {loss: fast}}
  finetune: {epochs: 1, objective: {loss: fast}}
  diagnostics: {every: 0}
certify: {n: 8}
"""

# Kind → the files of that kind (a pattern), the commands that read them, and what binds them: a hash or a
# recomputation (True), nothing (False), or the outcome, a file that must be the undisturbed one.
KINDS: dict[str, tuple[str, list[list[str]], bool | str]] = {
    "manifest": ("run/manifest.json", [GATE, FILES, REPORT], False),
    "dense certificate": ("run/certify/dense.json", [GATE, REPORT], True),
    "pruned certificate": ("run/certify/pruned.json", [GATE, FILES, REPORT], True),
    "baseline": ("single/base.json", [[*GATE, "--baseline", "ROOT/single/base.json"]], False),
    "points": ("run/certify/pruned-points.safetensors", [GATE, FILES, REPORT], True),
    "export report": ("run/export/report.json", [GATE, REPORT], True),
    "exported file": (
        "run/export/model.onnx",
        [GATE, ["decode", "ROOT/run/export/model.onnx", "--output", "OUT.onnx"]],
        True,
    ),
    "masks": ("run/search/masks.safetensors", [GATE, FILES, ["compare", "ROOT/run", "ROOT/run"]], True),
    "certified recipe": ("run/certify/recipe.yaml", [GATE, FILES], True),
    "recipe": (
        "run/recipe.yaml",
        [["gate", "--run", "ROOT/run"], ["run", "ROOT/run/recipe.yaml", "--dry-run", "--run", "OUT"]],
        False,
    ),
    "target": ("single/board.yaml", [["targets", "show", "ROOT/single/board.yaml"]], False),
    "history": ("run/search/history.json", [GATE, REPORT], True),
    "verdict": ("run/gate/verdict.json", [REPORT], False),
    "checkpoint": (
        "run/finetune/model.safetensors",
        [GATE, ["inspect", "ROOT/run/finetune/model.safetensors"]],
        True,
    ),
    "pickled checkpoint": ("single/model.pt", [["inspect", "ROOT/single/model.pt"]], False),
    "custom code": (
        "single/net.py",
        [["inspect", "ROOT/run/finetune/model.safetensors", "--arch", "ROOT/single/net.py:make"]],
        False,
    ),
    "snapshot of a search": (
        "search/run/search/snapshot.safetensors",
        [[word.replace("NAME", "search") for word in (*PRUNE, "--resume")]],
        "search/run/finetune/model.safetensors",
    ),
    "snapshot of fine-tuning": (
        "finetune/run/finetune/snapshot.safetensors",
        [[word.replace("NAME", "finetune") for word in (*PRUNE, "--resume")]],
        "finetune/run/finetune/model.safetensors",
    ),
    "record of an attack": (
        "attack/run/certify/record-*/*",
        [[*ATTACK, "--resume"]],
        "attack/run/certify/dense-points.safetensors",
    ),
    "image folder": ("images/data/*/*/*", [PRETRAIN], False),
    "sweep": ("sweep/all/sweep.json", [[*SWEEP, "--resume"]], "sweep/all/table.md"),
    "signature": ("signed/run/signature.json", [SIGNED], True),
    "public key": ("signed/key.pub", [SIGNED], False),
}
RELISTED = 0.3  # share of the cases of a bound file in which hashes are made to agree
READERS = ("decode", "inspect", "compare", "report")  # commands that show content and judge nothing


def bits(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def spliced(data: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 8, 512))
    return data[:at] + draw.randbytes(length) + data[at + draw.choice((0, length)) :]


def repeated(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[max(0, at - 64) :]


def other(data: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        (
            b"",
            b"\0" * len(data),
            draw.randbytes(len(data) % 4096),
            b"\xef\xbb\xbf" + data,
            b"{}",
            b"[" * 99_999,
        )
    )


def value(data: bytes, draw: random.Random) -> bytes:
    """Replace a value somewhere in a JSON file, or repeat a key."""
    try:
        content = json.loads(data)
    except ValueError:
        return bits(data, draw)
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return data
        key = draw.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.2:
            break
        place = place[key]
    new = draw.choice(
        (None, True, -1, 0, 10**40, 1.5, "", "x" * 9999, "../../etc/passwd", [], {}, [[]], "\u202e\0")
    )
    if isinstance(place, dict) and draw.random() < 0.2:
        return json.dumps(content).replace(f'"{key}":', f'"{key}": {json.dumps(new)}, "{key}":', 1).encode()
    place[key] = new
    return json.dumps(content).encode()


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    bits,
    bits,
    cut,
    spliced,
    repeated,
    other,
    value,
    value,
    value,
)


def parsed(data: bytes) -> Any:
    """Parse JSON as this tool does; anything else is compared byte by byte."""
    try:
        return files.parse_json(data)
    except ValueError:
        return data


def special(path: Path, draw: random.Random) -> str:
    """Put something else than a plain file there; return what."""
    path.unlink()
    what = draw.choice(("pipe", "socket", "device", "folder", "missing", "loop"))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as made, tempfile.TemporaryDirectory() as short:
            made.bind(f"{short}/s")
            shutil.move(f"{short}/s", path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    return what


def relist(run: Path, path: Path, before: bytes) -> None:
    """Let every record of the run name the spoiled file, as a forger would; what is in it is then parsed."""
    if not path.is_file():
        return
    changed = {hashlib.sha256(before).hexdigest(): files.sha256(path)}
    while changed:
        old, new = changed.popitem()
        for record in (*run.glob("certify/*.json"), *run.glob("export/*.json"), run / "manifest.json"):
            content = record.read_bytes() if record.is_file() else b""
            if old.encode() in content and record != path:
                record.write_bytes(content.replace(old.encode(), new.encode()))
                if record.name != "manifest.json":
                    changed[hashlib.sha256(content).hexdigest()] = files.sha256(record)


def prepared(run: Path, root: Path) -> Path:
    """Make the folders that are spoiled: the run, unfinished stages, images, a sweep, signatures."""
    import torch

    shutil.copytree(run, root / "run", ignore=shutil.ignore_patterns(".lock"))
    ours, single, log = root / "run", root / "single", root / "log"
    single.mkdir()
    shutil.copy(ours / "certify" / "dense.json", single / "base.json")
    torch.save({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, single / "model.pt")
    (single / "net.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes=2):\n    return nn.Linear(2, num_classes)\n"
    )
    shutil.copy(targets.shipped() / "onnxruntime-x86.yaml", single / "board.yaml")
    for stage in ("search", "finetune"):
        (root / stage).mkdir()
        shutil.copy(ours / "pretrain" / "model.safetensors", root / stage)
        child(words([each.replace("NAME", stage) for each in PRUNE], root), log, unfinished=stage)
    (root / "attack").mkdir()
    shutil.copy(ours / "pretrain" / "model.safetensors", root / "attack")
    child(words(ATTACK, root), log, unfinished="certify")
    (root / "sweep").mkdir()
    (root / "sweep" / "small.yaml").write_text(SMALL)
    child(words(SWEEP, root), log)
    pictures(root / "images" / "data")
    signatures(ours, root / "signed", log)
    for kind, (pattern, _, _) in KINDS.items():
        if not list(root.glob(pattern)):
            raise SystemExit(f"no file {pattern} for {kind}: {log.read_text()}")
    return root


def warm(source: Path, work: Path) -> dict[str, str]:
    """Run every command on files that are not spoiled; import here what it imported there.

    Return the hash of the outcome by kind. Raises SystemExit where a command does not end with 0.
    """
    modules, outcomes = work.with_name("modules"), {}
    for kind, command in [(kind, each) for kind, (_, commands, _) in KINDS.items() for each in commands]:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        code, _, told = child(words(command, work), work / "log", modules=modules)
        if code != 0:
            raise SystemExit(f"{command} ended with {code} on sound files: {told}")
        for name in modules.read_text().split():
            if name not in sys.modules and not name.startswith("s2ap_custom"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        if isinstance(bound := KINDS[kind][2], str):
            outcomes[kind] = files.sha256(work / bound)
    return outcomes


def words(command: list[str], root: Path) -> list[str]:
    return [each.replace("ROOT", str(root)).replace("OUT", str(root / "out")) for each in command]


def pictures(folder: Path) -> None:
    """Write four images of each of two classes in several formats."""
    from PIL import Image

    draw = random.Random(0)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for suffix in ("png", "jpg", "webp", "tif", "bmp", "ppm"):
                Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(
                    folder / part / label / f"0.{suffix}"
                )


def signatures(run: Path, folder: Path, log: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    shutil.copytree(run, folder / "run")
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(private)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)
    child(["sign", str(folder / "run"), "--private-key", str(folder / "key.pem")], log)


def child(
    command: list[str], log: Path, unfinished: str = "", modules: Path | None = None
) -> tuple[int, int, str]:
    """Run the command in a forked process; return its exit code (-1: it hung), peak bytes and output.

    The process dies where the stage ``unfinished`` would be recorded as finished; in the end it lists the
    modules that it has imported in ``modules``.
    """
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 70
        try:
            from s2ap_deploy.cli.main import run_cli
            from s2ap_deploy.runs.snapshot import Stage

            finish = Stage.finish

            def dies(stage: Stage, *results: Any) -> None:
                if stage.name == unfinished:
                    os._exit(0)
                finish(stage, *results)

            Stage.finish = dies  # type: ignore[method-assign]
            sys.argv = ["s2ap-deploy", *command]
            code = run_cli(command)
            if modules is not None:
                modules.write_text("\n".join(sys.modules))
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status, used = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return (
        (-1 if code == -signal.SIGALRM else code),
        used.ru_maxrss * 1024,
        log.read_text(errors="replace")[-400:],
    )


def one(number: int, seed: int, source: Path, work: Path, outcomes: dict[str, str]) -> dict[str, Any]:
    """Spoil one file in a copy of its folder, run a command that reads it, and say what happened."""
    draw, kind = random.Random(f"{seed}-{number}"), list(KINDS)[number % len(KINDS)]
    pattern, commands, bound = KINDS[kind]
    top = pattern.partition("/")[0]
    shutil.rmtree(work, ignore_errors=True)
    for name in {top, "run"} if top == "single" else {top}:
        shutil.copytree(source / name, work / name)
    path, command = draw.choice(sorted(work.glob(pattern))), draw.choice(commands)
    before = path.read_bytes()
    if draw.random() < 0.08:
        mutation, changed = special(path, draw), True
    else:
        chosen = draw.choice(MUTATIONS)
        after = chosen(before, draw)
        path.write_bytes(after)
        mutation, changed = chosen.__name__, parsed(after) != parsed(before)
    if bound is True and top == "run" and draw.random() < RELISTED:
        relist(work / top, path, before)
        mutation, bound = f"{mutation}, relisted", False
    started = time.monotonic()
    code, used, told = child(words(command, work), work / "log")
    if isinstance(bound, str):
        bound = code == 0 and files.sha256(work / bound) != outcomes[kind]
    judged = command[0] not in READERS
    return {
        "number": number,
        "kind": kind,
        "command": command[0],
        "mutation": mutation,
        "code": code,
        "seconds": round(time.monotonic() - started, 3),
        "bytes": used,
        "accepted": bound and judged and changed and code == 0,
        "told": told if code not in (0, 1, 2, 3) else "",
    }


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Count exit codes by kind, and what must not happen."""
    by_kind = {
        kind: dict(
            sorted(collections.Counter(str(case["code"]) for case in cases if case["kind"] == kind).items())
        )
        for kind in KINDS
    }
    wrong = [case for case in cases if case["code"] not in (0, 1, 2, 3) or case["accepted"]]
    return {
        "cases": len(cases),
        "codes": dict(sorted(collections.Counter(str(case["code"]) for case in cases).items())),
        "unexpected": sum(case["code"] not in (-1, 0, 1, 2, 3) for case in cases),
        "hangs": sum(case["code"] == -1 for case in cases),
        "accepted": sum(case["accepted"] for case in cases),
        "longest_seconds": max(case["seconds"] for case in cases),
        "peak_bytes": max(case["bytes"] for case in cases),
        "over_2_gib": sum(case["bytes"] > MOST_BYTES for case in cases),
        "by_kind": by_kind,
        "wrong": wrong[:50],
    }


def main() -> None:
    parser = arguments.parser(__doc__, "fuzz", "run", "work", "seed")
    parser.add_argument("--cases", type=int, default=3000)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    kept, source = args.work / f"cases-{args.seed}.jsonl", args.work / "source"
    if not source.exists():
        shutil.rmtree(args.work / "making", ignore_errors=True)
        prepared(args.run, args.work / "making").rename(source)
    outcomes = warm(source, args.work / "case")
    cases = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    late = [case["number"] for case in cases if case["code"] == -1]
    for number in late:  # on a busy machine a case may only have been slow
        cases[number] = one(number, args.seed, source, args.work / "case", outcomes)
    with open(kept, "a") as stream:
        for number in range(len(cases), args.cases):
            cases.append(one(number, args.seed, source, args.work / "case", outcomes))
            stream.write(json.dumps(cases[-1]) + "\n")
            stream.flush()
            if cases[-1]["code"] not in (0, 1, 2, 3) or cases[-1]["accepted"]:
                print(cases[-1], flush=True)
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(sum(case["seconds"] for case in cases))
    results.write(
        args.name,
        {"seed": args.seed, "seconds": seconds, "parent_bytes": bare, "repeated": late, **summary(cases)},
    )
