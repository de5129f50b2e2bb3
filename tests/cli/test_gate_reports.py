"""What CI gets besides the exit code, through a real process, the composite action and the documentation."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import pytest
import yaml

from s2ap_deploy.cli.verdict_commands import gate_command as command

ROOT = Path(__file__).parents[2]
ACTION = ROOT / ".github" / "actions" / "gate" / "action.yml"
Make = Callable[..., Path]
PASS, FAIL, UNSURE = ["--min-robust", "0.5"], ["--min-robust", "0.95"], ["--max-drop", "0.001"]


def process(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "s2ap_deploy", "gate", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment,
        timeout=60,
    )


@pytest.mark.parametrize(("policy", "code"), [(PASS, 0), (FAIL, 1), (UNSURE, 3), ([], 2)])
def test_exit_codes_and_reports_of_a_real_process(policy, code, make_run, tmp_path) -> None:
    make_run(pruned=900)
    reports = ["--junit", "gate.xml", "--sarif", "gate.sarif", "--summary", "gate.md"]
    done = process(*policy, *reports, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    suite = ET.parse(tmp_path / "gate.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("errors")) == {
        0: ("0", "0"), 1: ("1", "0"), 3: ("0", "1"), 2: ("0", "1")
    }[code]  # fmt: skip
    (run,) = json.loads((tmp_path / "gate.sarif").read_text())["runs"]
    assert run["invocations"][0]["exitCode"] == code
    assert f"Exit code: {code}." in (tmp_path / "gate.md").read_text(encoding="utf-8")


def test_a_process_on_github_annotates_and_adds_to_the_steps_summary(make_run, tmp_path) -> None:
    make_run()
    (tmp_path / "summary.md").write_text("before\n")
    there = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    done = process(*FAIL, cwd=tmp_path, **there)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith("::error title=gate%3A robust accuracy under AutoAttack")
    told = process(*FAIL, "--json", cwd=tmp_path, **there)
    assert json.loads(told.stdout)["exit_code"] == 1
    assert told.stderr.startswith("::error ")
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.count("### s2ap-deploy gate: ❌ failed") == 2
    quiet = process(*FAIL, "--quiet", cwd=tmp_path, **there)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (1, "", "")
    assert "::" not in process(*FAIL, "--no-annotations", cwd=tmp_path, **there).stdout


def test_a_summary_that_github_cannot_take_changes_no_verdict(make_run, tmp_path) -> None:
    make_run()
    done = process(*PASS, cwd=tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "nowhere" / "summary.md"))
    assert done.returncode == 0
    assert "warning: no summary for GitHub" in done.stderr


def test_no_verdict_is_reported_too(make_run, tmp_path, s2ap, without_stages) -> None:
    folder = without_stages(make_run(), "certify")
    done = s2ap("gate", *PASS, "--junit", tmp_path / "g.xml", "--annotations", "--run", folder)
    assert done.code == 3
    error = ET.parse(tmp_path / "g.xml").getroot().find("./testsuite/testcase/error")
    assert error is not None
    assert "holds no certificate" in (error.get("message") or "")
    assert done.out.startswith("::warning title=gate%3A gate::")
    assert "error: " in done.err


def test_a_report_may_lie_beside_the_verdict(s2ap, make_run, tmp_path) -> None:
    folder = make_run()
    for _ in range(2):
        assert s2ap("gate", *PASS, "--junit", "s2ap-run/gate/junit.xml", cwd=tmp_path).code == 0
        assert sorted(path.name for path in (folder / "gate").iterdir()) == ["junit.xml", "verdict.json"]


def test_a_terminal_that_knows_no_ticks_still_gets_its_exit_code(make_run, tmp_path) -> None:
    make_run()
    (tmp_path / "s2ap-run" / "größe.onnx").write_bytes(b"x")
    done = process(*PASS, "--annotations", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (3, "gate: INCONCLUSIVE")
    told = process(*PASS, "--json", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert "größe.onnx" in json.loads(told.stdout)["checks"][-2]["name"]


def test_the_default_rule_loads_nothing_heavy(make_run, tmp_path) -> None:
    """A time would say more about this machine; without these modules it is a fraction of a second."""
    folder = make_run()
    heavy = {"torch", "torchvision", "onnx", "onnxruntime", "numpy", "scipy", "rich", "xml", "click.testing"}
    arguments = ["gate", *PASS, "--max-drop", "0.1", "--max-class-drop", "0.2", "--run", str(folder)]
    probe = (
        "import sys; from s2ap_deploy.cli.main import run_cli; "
        f"code = run_cli({arguments!r}); print(code, sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


class TestAction:
    """The composite action, run as GitHub's runner would run its script."""

    content: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    install, step = content["runs"]["steps"]

    def run(self, tmp_path: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
        given = {name: str(each["default"]) for name, each in self.content["inputs"].items()}
        given |= {name.replace("_", "-"): value for name, value in inputs.items()}
        variables = {
            name: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: given[found[1]], text)
            for name, text in self.step["env"].items()
        }
        output = tmp_path / "output"
        output.write_text("")
        tool = tmp_path / "bin" / "s2ap-deploy"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m s2ap_deploy "$@"\n')
        tool.chmod(0o755)
        environment = os.environ | variables | {
            "GITHUB_OUTPUT": str(output),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", self.step["run"]],
            capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60,
        )  # fmt: skip
        return done, dict(line.split("=", 1) for line in output.read_text().splitlines())

    def test_every_input_is_an_option_and_none_is_pasted_into_the_script(self) -> None:
        flags = {
            option.removeprefix("--")
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.is_flag
            for option in parameter.opts
        }
        inputs = set(self.content["inputs"])
        assert flags - inputs == {"plan", "summary"}
        assert inputs - flags == {"package"}
        inputs -= {"package"}
        passed = set(re.findall(r"inputs\.([a-z-]+)", "".join(self.step["env"].values())))
        assert passed == inputs
        assert "${{" not in self.step["run"]
        looped = re.search(r"for name in ([A-Z_\s\\]+);", self.step["run"])
        assert looped is not None
        assert {f"GATE_{word}" for word in looped[1].replace("\\", " ").split()} == set(self.step["env"])

    @pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
    @pytest.mark.parametrize(
        ("inputs", "code", "status"),
        [
            ({"min_robust": "0.5", "max_bytes": "5000", "junit": "a b.xml"}, 0, "pass"),
            ({"min_robust": "0.95", "rule": "point"}, 1, "fail"),
            ({"max_drop": "0.001"}, 3, "inconclusive"),
            ({"min_robust": "$(touch pwned)"}, 2, "error"),
            ({"min_robust": "--help"}, 2, "error"),
            ({"run": "nowhere; touch pwned", "min_robust": "0.5"}, 2, "error"),
        ],
    )
    def test_it_passes_inputs_on_and_the_verdict_back(self, inputs, code, status, make_run, tmp_path) -> None:
        make_run(pruned=900)
        done, outputs = self.run(tmp_path, **inputs)
        assert done.returncode == code, done.stderr
        assert outputs == {"status": status, "exit-code": str(code)}
        assert not (tmp_path / "pwned").exists()
        assert (tmp_path / "a b.xml").exists() == ("junit" in inputs)

    @pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
    @pytest.mark.parametrize(
        ("package", "installed"),
        [
            ("", "SOURCE/../../.."),
            ("0.1.0", "s2ap-deploy==0.1.0"),
            ("wheels/s2ap_deploy-0.1.0-py3-none-any.whl", "wheels/s2ap_deploy-0.1.0-py3-none-any.whl"),
            ("--upgrade; touch pwned", "--upgrade; touch pwned"),
            ("installed", None),
        ],
    )
    def test_it_installs_itself_without_torch(self, package, installed, tmp_path) -> None:
        stub = tmp_path / "bin" / "python"
        stub.parent.mkdir()
        # Everything is a module: pip tells what it would install, requirements are the real ones.
        stub.write_text(
            f'#!/bin/sh\n[ "$2" = pip ] || exec "{sys.executable}" "$@"\n'
            'shift 2\nfor word; do printf "%s|" "$word"; done >> pip.log\necho >> pip.log\n'
        )
        stub.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "GATE_PACKAGE": package, "GATE_SOURCE": "SOURCE/../../..", "GATE_PUBLIC_KEY": "key.pub",
            "RUNNER_TEMP": str(tmp_path),
        }  # fmt: skip
        assert set(self.install["env"]) <= set(environment)
        script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", self.install["run"]]
        subprocess.run(script, env=environment, cwd=tmp_path, check=True, timeout=60)
        assert not (tmp_path / "pwned").exists()
        if installed is None:
            assert not (tmp_path / "pip.log").exists()
            return
        first, second = (tmp_path / "pip.log").read_text().splitlines()
        assert first == f"install|--no-deps|--|{installed}|"
        assert second == f"install|--no-warn-conflicts|-r|{tmp_path}/s2ap-deploy.txt|"
        listed = (tmp_path / "s2ap-deploy.txt").read_text()
        names = [re.split(r"[^\w-]", line)[0].lower() for line in listed.splitlines()]
        assert names == ["click", "pydantic", "pyyaml", "model-signing", "pyopenssl"]

    def test_its_outputs_are_those_of_the_script(self) -> None:
        for name, output in self.content["outputs"].items():
            assert output["value"] == f"${{{{ steps.{self.step['id']}.outputs.{name} }}}}"


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    text = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
    for name, block in re.findall(r"<!-- example: (\w+) -->\n```yaml\n(.*?)```", text, re.S):
        yield name, yaml.safe_load(block)


def test_the_examples_for_github_and_gitlab_name_what_there_is() -> None:
    found = dict(examples())
    steps = found["github"]["jobs"]["gate"]["steps"]
    (ours,) = [step for step in steps if step.get("uses", "").startswith("OWNER/")]
    place, _, tag = ours["uses"].removeprefix("OWNER/s2ap-deploy/").partition("@")
    assert (ROOT / place / "action.yml") == ACTION
    assert tag == f"v{importlib.metadata.version('s2ap-deploy')}"
    assert set(ours["with"]) <= set(TestAction.content["inputs"])
    assert steps[-1]["with"]["sarif_file"] == ours["with"]["sarif"]
    job = found["gitlab"]["gate"]
    words = job["script"][-1].split()
    assert words[:2] == ["s2ap-deploy", "gate"]
    command.make_context("gate", words[2:])
    assert job["artifacts"]["reports"]["junit"] == words[words.index("--junit") + 1]
    assert job["artifacts"]["when"] == "always"
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    (repository,) = found["precommit"]["repos"]
    assert repository["rev"] == tag
    assert [each["id"] for each in repository["hooks"]] == [hook["id"]]
    command.make_context("gate", [*hook["entry"].split()[2:], *repository["hooks"][0]["args"]])


def test_the_documentation_lists_every_option_and_exit_code() -> None:
    text = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
    for parameter in command.params:
        assert isinstance(parameter, click.Option)
        assert parameter.name in ("folder", "quiet") or parameter.opts[0] in text, parameter.name
    for code in "0123":
        assert f"| {code} | " in text
