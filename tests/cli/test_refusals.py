"""Refusals: exit code 2, one error with its code, no traceback, nothing half-written."""

import json
import os
import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

# One refusal per line: the code of the error, and the command.
# In a folder with a model, a foreign checkpoint, recipes and files that must not be lost.
DESK = """
option-invalid                prune model.pt --sparsity 1.0
option-invalid                prune model.pt --sparsity -0.1
option-invalid                prune model.pt --sparsity 0
option-invalid                prune model.pt --sparsity abc
option-invalid                prune model.pt --sparsity nan
option-invalid                prune nowhere.pt --sparsity 2
option-invalid                prune model.pt --sparsity 0.9 --eps 8/0
option-invalid                prune model.pt --sparsity 0.9 --eps -1
option-invalid                prune model.pt --sparsity 0.9 --norm L3
option-invalid                prune model.pt --sparsity 0.9 --gamma -1
option-invalid                prune model.pt --sparsity 0.9 --gamma nan
option-invalid                prune model.pt --sparsity 0.9 --search-epochs 0
option-invalid                prune model.pt --sparsity 0.9 --mean 0.5 --std half
option-invalid                prune model.pt --sparsity 0.9 --data minst
option-invalid                prune model.pt --sparsity 0.9 --seed -1
option-invalid                prune model.pt --sparsity 0.9 --granularity 4:2
option-invalid                prune model.pt --sparsity 0.9 --method hydr
option-invalid                prune model.pt --sparsity 0.9 --arch net.py
option-invalid                demo --sparsity 1.0
option-invalid                pretrain --data digits --arch digits-conv --eps 0.1 --learning-rate 0
option-invalid                export --opset 11
option-invalid                export --batch 0
option-invalid                export --batch 1025
option-invalid                export --batch -1
option-invalid                export --batch ²
option-invalid                export --batch many
option-invalid                export --values f8
option-invalid                export --encoding huffman
option-invalid                export --opset 11 --encoding gaps
option-invalid                gate --min-robust 40
option-invalid                gate --min-robust nan
option-invalid                gate --max-drop -0.1
option-invalid                gate --max-age soon
option-unknown                prune model.pt --sparsity 0.9 --sparsty 0.9
option-unknown                demo --nonsense
option-missing                prune
option-missing                pretrain
option-missing                pretrain --data digits --eps 0.1
option-missing                pretrain --arch digits-conv
usage                         recipes --json list
command-unknown               nonsense
command-unknown               prnue model.pt
sparsity-missing              prune model.pt
gamma-zero                    prune model.pt --sparsity 0.9 --gamma 0
s2ap-epochs-invalid           prune model.pt --sparsity 0.9 --s2ap-epochs 3:2
s2ap-epochs-invalid           prune model.pt --sparsity 0.9 --s2ap-epochs 2:99
s2ap-epochs-invalid           prune model.pt --sparsity 0.9 --s2ap-epochs 2:3 --warmup-epochs 1
option-invalid                prune model.pt --sparsity 0.9 --s2ap-epochs 2-3
option-invalid                prune model.pt --sparsity 0.9 --gamma automatic
start-unused                  prune model.pt --sparsity 0.9 --loss free --attack-start uniform
cover-classes-unused          prune model.pt --granularity 2:4 --method hydra --cover-classes
warmup-too-long               prune model.pt --sparsity 0.9 --warmup-epochs 20
key-missing                   prune model.pt --sparsity 0.9 --mean 0.5
normalization-invalid         prune model.pt --sparsity 0.9 --mean 0.5 --std 0
normalization-invalid         prune model.pt --sparsity 0.9 --mean nan --std 1
normalization-channel-mismatch prune model.pt --sparsity 0.9 --mean 0.5,0.5 --std 1,1
steps-not-rising              prune model.pt --sparsity 0.9 --steps 0.9,0.8
s2ap-needs-learned-scores     prune model.pt --sparsity 0.9 --method magnitude --s2ap
gate-with-full                certify --full --min-robust 0.1
first-with-sample-seed        certify --first --sample-seed 1
artifact-with-network-options certify model.pt --artifact x.onnx
artifact-with-network-options certify --artifact x.onnx --curve
entry-missing                 certify --ap-method X
entry-incomplete              certify --ap-benchmark-entry e.json
entry-needs-pruned-run        certify model.pt --ap-benchmark-entry e.json --ap-method X --ap-paper p
model-missing                 plan
normalization-incomplete      init model.pt --mean 0.5
s2ap-needs-learned-scores     prune model.pt --sparsity 0.9 --method random --s2ap
budget-unfit                  prune model.pt --sparsity 0.9 --method hydra --budget learned
budget-unfit                  prune model.pt --sparsity 0.9 --method harp --budget erk
sparsity-contradicts-pattern  prune model.pt --sparsity 0.9 --granularity 2:4
budget-unfit                  prune model.pt --sparsity 0.9 --granularity channel --budget erk
budget-unfit                  prune model.pt --sparsity 0.9 --budget macs
steps-need-finetuning         prune model.pt --sparsity 0.9 --method rst --steps 0.5
keep-ratio-unused             prune model.pt --keep-ratio 0.5
steps-not-rising              prune model.pt --steps 0.9,0.5 --sparsity 0.95
data-missing                  prune foreign.pth --sparsity 0.9 --eps 0.1
facts-missing                 prune foreign.pth --sparsity 0.9
facts-missing                 prune foreign.pth
eps-missing                   prune foreign.pth --sparsity 0.9 --data digits
data-size-mismatch            prune model.pt --sparsity 0.9 --data mnist
image-folder-missing          prune model.pt --sparsity 0.9 --data imagefolder:nowhere
architecture-unknown          prune model.pt --sparsity 0.9 --arch digit-conv
architecture-mismatch         prune model.pt --sparsity 0.9 --arch mnist-conv
architecture-file-missing     prune model.pt --sparsity 0.9 --arch nowhere.py:net
device-unusable               prune model.pt --sparsity 0.9 --device cuda:99
run-folder-is-file            prune model.pt --sparsity 0.9 --run model.pt
folder-not-created            prune model.pt --sparsity 0.9 --run model.pt/below
run-folder-foreign            prune model.pt --sparsity 0.9 --run thesis
data-size-mismatch            pretrain --data digits --arch cifar-resnet18 --eps 0.1
run-missing                   certify
run-missing                   export --onnx
run-missing                   gate --min-robust 0.4
checkpoint-missing            inspect nowhere.pt
sparsity-missing              plan --arch digits-conv
option-invalid                plan --arch digits-conv --sparsity 1.5
option-invalid                plan --arch digits-conv --granularity 5:4
align-unused                  plan --arch digits-conv --sparsity 0.9 --align 8
option-invalid                plan --arch digits-conv --sparsity 0.9 --input-size 3,32
network-cannot-run            plan --arch digits-conv --sparsity 0.9 --input-size 3,8,8
option-invalid                plan --arch digits-conv --sparsity 0.9 --num-classes 1
target-unknown                plan --arch digits-conv --sparsity 0.9 --target arm64
keep-ratio-too-low            plan --arch digits-conv --granularity channel --keep-ratio 0.001
keep-ratio-unused             plan --arch digits-conv --granularity channel --keep-ratio 0.5 --sparsity 0.5
architecture-unknown          plan --arch digit-conv --sparsity 0.9
checkpoint-missing            plan nowhere.pt --sparsity 0.9
target-unknown                targets show nope
usage                         targets shwo
checkpoint-missing            init nowhere.pt
output-format-unknown         init model.pt --output recipe.txt
folder-missing                init model.pt --output no/recipe.yaml
option-invalid                init model.pt --data imagenet
option-invalid                init model.pt --eps 0
keep-unused                   init model.pt --keep 0.5
option-invalid                init model.pt --sparsity 1
output-exists                 pretrain --data digits --arch digits-conv --eps 0.1 --output old.pt
output-format-unknown         pretrain --data digits --arch digits-conv --eps 0.1 --output x.onnx
folder-missing                pretrain --data digits --arch digits-conv --eps 0.1 --output no/x.pt
recipe-unknown                run dmeo
recipe-unknown                recipes nonsense
recipe-missing                run nowhere.yaml
key-unknown                   run bad.yaml
key-unknown                   recipes bad.yaml
architecture-not-registered   run own-code.yaml
architecture-not-registered   run demo --set model.arch=file.py:net
value-invalid                 run demo --set prune.sparsity=abc
value-invalid                 run demo --set prune.sparsity=1.0
key-unknown                   run demo --set prune.sparsty=0.9
override-malformed            run demo --set sparsity
arch-already-decided          run demo --arch digits-conv
option-invalid                sweep demo --seeds 0
recipe-unknown                recipes dmeo
recipe-missing                recipes show nowhere.yaml
option-missing                recipes show
value-invalid                 recipes show demo --set prune.sparsity=7
usage                         recipes --json show demo
option-unknown                recipes --nonsense
option-invalid                sweep small.yaml --sparsity 0.9,,0.5
option-invalid                sweep small.yaml --sparsity 0.9,2
option-invalid                sweep small.yaml --method hydra,hrap
combinations-impossible       sweep small.yaml --method random --s2ap on
prune-section-missing         sweep small.yaml --set prune=null
arch-already-decided          sweep small.yaml --arch digits-conv
option-invalid                inspect model.pt --arch net.py
option-invalid                init model.pt --arch net.py
option-invalid                plan model.pt --arch net.py
option-invalid                run model.pt --arch net.py
output-exists                 init model.pt --output bad.yaml
option-invalid                pretrain --data digits --arch digits-conv --eps 0.1 --precision fp8
option-unknown                certify --precision bf16
run-missing                   report nowhere
run-missing                   compare nowhere nowhere
runs-too-few                  compare nowhere
option-missing                compare
run-folder-is-file            export --torch --run old.pt
"""
# Beside a finished run.
FINISHED = """
already-decided               certify --data mnist
already-decided               certify --eps 0.2 --norm L2
arch-already-decided          certify --arch digits-conv
option-invalid                certify --n 0
stage-inputs-changed          certify --n 501
gate-with-full                certify --full --min-robust 0.5
gate-with-full                certify --full --gate point
threshold-missing             certify --gate point
option-invalid                certify --min-robust nan
threshold-unprovable          certify --max-drop 0
stage-inputs-changed          certify --n 41
run-holds-pruned-network      certify model.pt --eps 0.5 --n 40
folder-missing                certify --ap-benchmark-entry no/e.json --ap-method X_Li2022Pruning --ap-paper p
benchmark-model-unknown       certify --ap-benchmark-entry e.json --ap-method X_Li2022Pruning --ap-paper p
arch-already-decided          export --arch digits-conv
stage-inputs-changed          export --opset 21
output-exists                 export --output s2ap-run/export/model.onnx
folder-missing                export --output no/model.onnx
output-format-unknown         export --output model.tflite
threshold-missing             gate
threshold-unprovable          gate --min-robust 1.0
report-place-invalid          gate --min-robust 0.4 --junit s2ap-run/x.xml
folder-missing                gate --min-robust 0.4 --junit no/x.xml
reports-share-file            gate --min-robust 0.4 --junit x --sarif x
output-inside-run             verify s2ap-run/certify/pruned.json --in-toto s2ap-run/s.json
stage-inputs-changed          prune model.pt --sparsity 0.95 --search-epochs 1 --finetune-epochs 1 --eps 0.5
folder-not-created            report s2ap-run --output model.pt
file-not-read                 decode none.onnx --output d.onnx
file-not-onnx                 decode garbage.onnx --output d.onnx
file-not-onnx                 decode empty.onnx --output d.onnx
file-not-read                 decode folder --output d.onnx
file-not-onnx                 decode torn.onnx --output d.onnx
output-format-unknown         decode garbage.onnx --output d.pt
folder-missing                decode garbage.onnx --output no/d.onnx
folder-missing                decode garbage.onnx --output empty.onnx/d.onnx
option-missing                decode garbage.onnx
option-missing                decode
output-exists                 decode s2ap-run/export/model.onnx --output garbage.onnx
certificate-missing           verify nowhere.json
certificate-missing           verify s2ap-run
run-folder-missing            verify s2ap-run/certify/pruned.json --run nowhere
record-kind-wrong             verify s2ap-run/manifest.json --run s2ap-run
record-not-json               verify s2ap-run/recipe.yaml --run s2ap-run
record-version-unknown        verify old.json --run s2ap-run
record-invalid                verify odd.json --run s2ap-run
run-folder-missing            verify odd.json
option-invalid                verify s2ap-run/certify/pruned.json --k -1
folder-missing                verify s2ap-run/certify/pruned.json --in-toto no/st.json
output-format-unknown         verify s2ap-run/certify/pruned.json --in-toto st.txt
output-inside-run             verify s2ap-run/certify/pruned.json --in-toto s2ap-run/certify/pruned.json
verify-files-excludes-attacks verify s2ap-run/certify/pruned.json --files --k 5
verify-files-excludes-attacks verify s2ap-run/certify/pruned.json --files --in-toto st.json
arch-already-decided          verify s2ap-run/certify/pruned.json --arch digits-conv
device-unusable               verify s2ap-run/certify/pruned.json --device cuda:99
option-missing                verify
values-with-int8              export --values float16 --int8 --overwrite
channels-not-pruned           export --keep-ratio 0.5 --overwrite
channels-not-pruned           export --align 8 --overwrite
channels-not-pruned           export --torch --overwrite
target-pattern-missing        export --target tensorrt-2-4 --overwrite
target-budget-missing         export --target microcontroller --overwrite
target-dtype-unsupported      export --target microcontroller --values float16 --overwrite
target-encoding-unsupported   export --target openvino --encoding coo --overwrite
target-unknown                export --target opnvino --overwrite
option-invalid                certify --track aim
"""
# Beside a run made of records alone, for the gate.
RECORDS = """
option-invalid                gate --max-age soon
option-invalid                gate --min-sparsity 90
option-invalid                gate --max-latency-ms 0
option-invalid                gate --max-latency-ratio nan
option-invalid                gate --max-bytes 0
option-invalid                gate --min-robust inf
threshold-missing             gate --max-age 30d
threshold-missing             gate --rule point
threshold-unprovable          gate --min-proven 1
threshold-unprovable          gate --max-class-drop 0
threshold-unprovable          gate --max-clean-drop 0
file-not-read                 gate --min-robust 0.5 --baseline nowhere.json
file-not-read                 gate --min-robust 0.5 --baseline .
report-place-invalid          gate --min-robust 0.5 --junit s2ap-run/manifest.json
report-place-invalid          gate --min-robust 0.5 --sarif s2ap-run/certify/dense.json
report-place-invalid          gate --min-robust 0.5 --summary s2ap-run/gate/verdict.json
report-place-invalid          gate --min-robust 0.5 --junit .
report-place-invalid          gate --min-robust 0.5 --sarif /dev/stdout
report-place-invalid          gate --min-robust 0.5 --sarif link
folder-missing                gate --min-robust 0.5 --junit nowhere/g.xml
reports-share-file            gate --min-robust 0.5 --junit g --sarif ./g
option-invalid                gate --plan 3 --min-robust 2
"""
# Beside a finished run that was pruned by channel.
CHANNELS = """
option-invalid                export --keep-ratio 0 --overwrite
option-invalid                export --keep-ratio -1 --overwrite
option-invalid                export --keep-ratio 1.5 --overwrite
option-invalid                export --keep-ratio nan --overwrite
option-invalid                export --keep-ratio half --overwrite
option-invalid                export --align 0 --overwrite
option-invalid                export --align 2000 --overwrite
compact-required              export --keep-ratio 0.25 --no-compact --overwrite
compact-required              export --align 8 --no-compact --overwrite
keep-ratio-too-low            export --keep-ratio 0.001 --overwrite
keep-ratio-too-high           export --keep-ratio 0.6 --overwrite
align-unaffordable            export --keep-ratio 0.25 --align 64 --overwrite
"""


def refusals() -> list[tuple[str, str, str]]:
    """Return (place, code, command) for every line of the tables."""
    places = {"desk": DESK, "finished": FINISHED, "records": RECORDS, "channels": CHANNELS}
    return [
        (place, *row.split(maxsplit=1))
        for place, table in places.items()
        for row in table.splitlines()
        if row
    ]


def weights(model: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(model, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items() if "network" in name}


RECIPE = """\
name: mine
model: {{{model}}}
data: {{name: digits}}
threat: {{eps: 0.5}}
prune: {{method: hydra, {sparsity}: 0.9}}
"""


@pytest.fixture
def desk(digits_model, tmp_path) -> Path:
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    torch.save(weights(digits_model), tmp_path / "foreign.pth")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "old.pt").write_text("precious")
    (tmp_path / "small.yaml").write_text(RECIPE.format(model="checkpoint: model.pt", sparsity="sparsity"))
    (tmp_path / "bad.yaml").write_text(RECIPE.format(model="arch: digits-conv", sparsity="sparsty"))
    (tmp_path / "own-code.yaml").write_text(RECIPE.format(model="arch: 'file.py:net'", sparsity="sparsity"))
    return tmp_path


@pytest.fixture
def finished(digits_model, own_run) -> Path:
    folder = own_run.parent
    (folder / "model.pt").write_bytes(digits_model.read_bytes())
    (folder / "garbage.onnx").write_bytes(b"\x89PNG and more of it")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "folder").mkdir()
    (folder / "torn.onnx").write_bytes((own_run / "export" / "model.onnx").read_bytes()[:-3000])
    certificate = json.loads((own_run / "certify" / "pruned.json").read_text())
    (folder / "old.json").write_text(json.dumps({**certificate, "schema_version": 0}))
    (folder / "odd.json").write_text(json.dumps({**certificate, "n": 41}))
    return folder


@pytest.fixture
def records(make_run, tmp_path) -> Path:
    make_run()
    (tmp_path / "link").symlink_to("target")
    return tmp_path


@pytest.fixture
def channels(own_channel_run) -> Path:
    return own_channel_run.parent


def stages(files: dict[str, bytes]) -> Any:
    """Stages of the manifest; a refused command may leave the folder that it locked, and no work."""
    return json.loads(files["s2ap-run/manifest.json"])["stages"] if "s2ap-run/manifest.json" in files else {}


@pytest.fixture
def refuse(s2ap, files_in) -> Callable[..., None]:
    """Run a refused command and compare every file with what was there before."""

    def run(code: str, *words: object, cwd: Path) -> None:
        before = files_in(cwd)
        s2ap.refused(code, *words, cwd=cwd)
        after = files_in(cwd)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed <= {"s2ap-run/manifest.json", "s2ap-run/.lock"}
        assert stages(before) == stages(after)

    return run


@pytest.mark.parametrize(("place", "code", "line"), refusals())
def test_a_refused_command_leaves_everything_as_it_was(place, code, line, request, refuse) -> None:
    words = shlex.split(line)
    if place == "desk" and words[0] == "prune" and len(words) > 1:
        words += ["--data-root", "no-data"]
    refuse(code, *words, cwd=request.getfixturevalue(place))


def test_an_age_ends_with_its_unit(refuse, records) -> None:
    refuse("option-invalid", "gate", "--max-age", "30d\n", "--min-robust", "0.4", cwd=records)


class RunsCode:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def dangerous(model: Path, path: Path, **options: Any) -> None:
    torch.save({"state_dict": weights(model), "extra": RunsCode(path.parent / "marker")}, path, **options)


def not_finite(model: Path, path: Path) -> None:
    state = weights(model)
    state["2.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)


def seven_classes(model: Path, path: Path) -> None:
    state = weights(model)
    torch.save({**state, "7.weight": state["7.weight"][:7], "7.bias": state["7.bias"][:7]}, path)


@pytest.mark.parametrize(
    ("code", "build"),
    [
        ("checkpoint-damaged", lambda model, path: path.write_bytes(model.read_bytes()[:300_000])),
        ("checkpoint-is-text", lambda model, path: path.write_text("these are no weights\n")),
        ("checkpoint-empty", lambda model, path: path.write_bytes(b"")),
        ("checkpoint-is-folder", lambda model, path: path.mkdir()),
        ("pickle-unsafe", dangerous),
        ("pickle-unsafe", lambda model, path: dangerous(model, path, _use_new_zipfile_serialization=False)),
        (
            "pickle-unsafe",
            lambda model, path: path.write_bytes(pickle.dumps(RunsCode(path.parent / "marker"))),
        ),
        ("weights-nonfinite", not_finite),
        ("classes-differ", seven_classes),
        ("architecture-unmatched", lambda model, path: torch.save({"some.weight": torch.zeros(3, 4)}, path)),
    ],
)
@pytest.mark.parametrize("command", ["prune --sparsity 0.9", "certify"])
def test_checkpoints_that_cannot_be_used(command, code, build, refuse, digits_model, tmp_path) -> None:
    build(digits_model, tmp_path / "bad.pt")
    refuse(code, *command.split(), "bad.pt", "--data", "digits", "--eps", "0.1", cwd=tmp_path)
    assert not (tmp_path / "marker").exists()


def test_a_trusted_pickle_is_run(s2ap, digits_model, tmp_path) -> None:
    dangerous(digits_model, tmp_path / "bad.pt")
    answer = s2ap.json("inspect", "bad.pt", "--trust-pickle", cwd=tmp_path)
    assert (tmp_path / "marker").exists()
    assert "posix.system" in json.dumps(answer["notes"])


def test_without_json_a_refusal_is_text_with_a_hint(s2ap, desk) -> None:
    done = s2ap("prune", "foreign.pth", "--sparsity", "0.9", "--eps", "0.1", cwd=desk)
    assert (done.code, done.out) == (2, "")
    first, second = done.err.splitlines()
    assert first.startswith("error: foreign.pth ")
    assert second.startswith("  hint: add --data")


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("prune foreign.pth", ["--data", "--eps", "--sparsity"]),
        ("prune foreign.pth --eps 0.1", ["--data", "--sparsity"]),
        ("prune foreign.pth --granularity 2:4", ["--data", "--eps"]),
        ("certify foreign.pth", ["--data", "--eps"]),
        ("prune other.pth --data digits", ["--eps", "--sparsity", "--arch"]),
        ("prune other.pth --eps 0.1 --sparsity 0.9", ["--data", "--arch"]),
    ],
)
def test_one_refusal_lists_every_missing_fact(s2ap, desk, line, options) -> None:
    torch.save(nn.Linear(64, 7).state_dict(), desk / "other.pth")
    hints = s2ap.refused("facts-missing", *shlex.split(line), cwd=desk).answer["hint"].splitlines()
    assert [re.search("--[a-z]+", hint)[0] for hint in hints] == options


@pytest.mark.parametrize(
    ("line", "options"),
    [("pretrain", ["--arch", "--data", "--eps"]), ("pretrain --data digits", ["--arch", "--eps"])],
)
def test_one_refusal_lists_every_missing_option(s2ap, line, options) -> None:
    message = s2ap.refused("option-missing", *shlex.split(line)).answer["error"]
    assert re.findall("--[a-z]+", message) == options


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("sparsity-unaffordable", "--sparsity 0.99999"),
        ("sparsity-unaffordable", "--granularity channel --sparsity 0.99999"),
        ("keep-ratio-too-low", "--granularity channel --keep-ratio 0.001"),
        ("pattern-fits-no-layer", "--granularity 3:7"),
        ("file-not-read", "--sparsity 0.9 --scores-from nowhere"),
    ],
)
def test_what_needs_the_network_is_refused_before_the_search_begins(
    code, options, s2ap, digits_model, tmp_path
) -> None:
    s2ap.refused(code, "prune", digits_model, *options.split(), cwd=tmp_path)
    assert list(json.loads((tmp_path / "s2ap-run" / "manifest.json").read_text())["stages"]) == ["pretrain"]
