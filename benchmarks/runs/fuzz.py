"""Give commands mutated files of every kind that they read: exit codes, hangs, memory, wrong acceptance.

    python -m benchmarks fuzz --run s2ap-demo --cases 2000

``--run`` is a finished run folder with dense and pruned certificates and an export, such as the demo's. Each
case copies it, spoils one file and runs one command in a forked child. Bound files are those that a hash or a
recomputation holds: an exit code 0 although their content changed counts as ``accepted``.
"""

import collections
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

SECONDS = 60  # after which a case hangs
MOST_BYTES = 2**31  # peak resident memory of a case
GATE = ["gate", "--min-robust", "0", "--max-drop", "1", "--rule", "point", "--run", "RUN"]
FILES = ["verify", "RUN/certify/pruned.json", "--files"]
REPORT = ["report", "RUN", "--output", "OUT"]

# Kind → its file in the run folder, the commands that read it, and whether something binds it.
KINDS: dict[str, tuple[str, list[list[str]], bool]] = {
    "manifest": ("manifest.json", [GATE, FILES, REPORT], False),
    "dense certificate": ("certify/dense.json", [GATE, REPORT], True),
    "pruned certificate": ("certify/pruned.json", [GATE, FILES, REPORT], True),
    "baseline": ("base.json", [[*GATE, "--baseline", "RUN/base.json"]], False),
    "points": ("certify/pruned-points.safetensors", [GATE, FILES, REPORT], True),
    "export report": ("export/report.json", [GATE, REPORT], True),
    "exported file": (
        "export/model.onnx",
        [GATE, ["decode", "RUN/export/model.onnx", "--output", "OUT.onnx"]],
        True,
    ),
    "masks": ("search/masks.safetensors", [GATE, FILES, ["compare", "RUN", "RUN"]], True),
    "certified recipe": ("certify/recipe.yaml", [GATE, FILES], True),
    "recipe": ("recipe.yaml", [["gate", "--run", "RUN"], ["init", "RUN/recipe.yaml"]], False),
    "history": ("search/history.json", [GATE, REPORT], True),
    "verdict": ("gate/verdict.json", [REPORT], False),
    "checkpoint": ("finetune/model.safetensors", [GATE, ["inspect", "RUN/finetune/model.safetensors"]], True),
    "pickled checkpoint": ("model.pt", [["inspect", "RUN/model.pt"]], False),
    "custom code": (
        "net.py",
        [["inspect", "RUN/finetune/model.safetensors", "--arch", "RUN/net.py:make"]],
        False,
    ),
}
READERS = ("decode", "inspect", "compare", "report", "init")  # commands that show content and judge nothing


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


def prepared(run: Path, into: Path) -> Path:
    """Copy the run and add the kinds of file that it lacks."""
    import torch

    shutil.copytree(run, into, ignore=shutil.ignore_patterns(".lock"))
    shutil.copy(into / "certify" / "dense.json", into / "base.json")
    torch.save({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, into / "model.pt")
    (into / "net.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes=2):\n    return nn.Linear(2, num_classes)\n"
    )
    return into


def child(command: list[str], log: Path) -> tuple[int, int, str]:
    """Run the command in a forked process; return its exit code (-1: it hung), peak bytes and output."""
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

            sys.argv = ["s2ap-deploy", *command]
            code = run_cli(command)
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


def one(kind: str, source: Path, work: Path, draw: random.Random) -> dict[str, Any]:
    """Spoil one file of ``kind`` in a copy of ``source``, run one of its commands, and say what happened."""
    name, commands, bound = KINDS[kind]
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path, command = folder / name, draw.choice(commands)
    before = path.read_bytes()
    if draw.random() < 0.08:
        mutation, changed = special(path, draw), True
    else:
        chosen = draw.choice(MUTATIONS)
        after = chosen(before, draw)
        path.write_bytes(after)
        mutation, changed = chosen.__name__, after != before
    words = [each.replace("RUN", str(folder)).replace("OUT", str(work / "out")) for each in command]
    started = time.monotonic()
    code, used, told = child(words, work / "log")
    judged = command[0] not in READERS
    return {
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
    parser = arguments.parser(__doc__, "fuzz", "run", "seed")
    parser.add_argument("--cases", type=int, default=2000)
    args = parser.parse_args()
    import torch

    import s2ap_deploy.reporting.report.page
    import s2ap_deploy.stages.gate
    import s2ap_deploy.stages.verify  # noqa: F401

    torch.set_num_threads(1)
    draw, cases, started = random.Random(args.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = prepared(args.run, Path(folder) / "source")
        for number in range(args.cases):
            cases.append(one(list(KINDS)[number % len(KINDS)], source, Path(folder), draw))
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.write(
        args.name,
        {
            "seed": args.seed,
            "seconds": round(time.monotonic() - started),
            "parent_bytes": bare,
            **summary(cases),
        },
    )
