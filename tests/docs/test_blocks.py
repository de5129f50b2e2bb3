"""Every block of the README and of docs/ works as typed, in the order of its page.

A page is one test. Its blocks run one after another in a copy of the desk (``conftest.py``): commands of this
tool in this process, all others in a shell. A block that is added to a page runs without a line here. The
tables say what is added to commands so that they are small, which codes a page promises, and what cannot run
and why; an entry that matches nothing any more fails.
"""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2ap_deploy import plugins
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference.md"
KEYS = ROOT / "docs" / "recipe-keys.md"
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {REFERENCE, KEYS})]
SHELL = ("sh", "bash", "console")
LANGUAGES = (*SHELL, "python", "yaml", "toml", "json")

# These pages go on from the run folder that the README's sequence leaves, and from a recipe of one's own.
AFTER_THE_SEQUENCE = ("certificates", "choosing", "devices", "gates", "native", "reference", "runtimes")
# What this page calls by that name is a stranger's file.
INSTEAD = {"first-half-hour": ("model.pt", "foreign.pth")}

SHORT = "--search-epochs 1 --finetune-epochs 1 --loss fast"
SHORT_RECIPE = "--workers 1 --set threat.eps=0.5 --set certify.n=5 --set pretrain.epochs=1 " + " ".join(
    f"--set prune.{stage}.epochs=1 --set prune.{stage}.objective.attack_steps=1"
    for stage in ("search", "finetune")
)
# What is added to each command that a pattern is found in: the same work, less of it.
SMALL = {
    r"^(s2ap-deploy|torchrun .*) prune (?!.*--dry-run)": SHORT,
    r"^s2ap-deploy pretrain ": "--epochs 1",
    r"^s2ap-deploy certify": "--n 40 --workers 1",
    r"^s2ap-deploy verify": "--workers 1",
    r"^s2ap-deploy (demo|run|sweep)\b(?!.*--dry-run)": SHORT_RECIPE,
    r"^s2ap-deploy sweep (?!.*--dry-run)": "--seeds 1 --sparsity 0.9",
}
# Exit codes, where a page promises another than 0; the first that matches. At the desk's radius none passes.
CODES = {
    r"^s2ap-deploy gate --plan": {0},
    r"^s2ap-deploy gate .*--min-robust 0\.": {1, 3},
    r"^s2ap-deploy gate": {0, 1, 3},
    r"^s2ap-deploy (demo|run)\b(?!.*--dry-run)": {1, 3},
    r"--max-latency-ms": {0, 1},  # a budget of time, on a machine that runs tests
}
# Left for the slow tests: whole pipelines but the demo's, and several processes that import torch each. The
# page's other commands do without them.
SLOW = (
    r"^s2ap-deploy doctor --bench",
    r"^s2ap-deploy (run|sweep|demo --sparsity) (?!.*--(dry-run|print-commands))",
    r"--devices [2-9]|^torchrun",
)
# What cannot run in a test, and why.
NOT_HERE = {
    r"^python3 -m venv ": "makes a fresh environment, as .ci/run does with these very lines",
    r"^(\.venv/bin/)?pip install ": "installs from a package index, as .ci/run and .ci/smoke do",
    r"^\.venv/bin/python -m pytest$": "runs all tests, this one among them",
    r"^python3 bundle\.pyz --images": "needs a camera's program; tests/stages/test_devices.py has one",
    r"^qemu-": "needs an emulator; tests/stages/test_devices.py runs these under the marker runtimes",
    r"^cosign ": "signs with a program and a key that are not ours",
    r"^uses: (actions|github)/": "needs GitHub",
    r"--on ray$|^ray start ": "needs a Ray cluster; tests/distributed/test_ray.py has one",
    r"sbatch |(all|dense|runs)\.txt$|^line=": "needs Slurm; tests/cli/test_sweep_command.py has a stand-in",
    r"zsh_source": "needs zsh; tests/cli/test_reference.py asks for the script",
    r"fish_source": "needs fish; tests/cli/test_reference.py asks for the script",
}
# Python that speaks of names or a folder of the reader's own.
NAMES = {r"make_network\(\)": {"make_network": lambda: registry.build("digits-conv")}}
FOLDERS = {r'open\("compact\.json"\)': "s2ap-run/export"}
# The reference shows each command for itself: what came before it is done, and what it asks for maybe too.
AGAIN = {
    r"^s2ap-deploy (pretrain|prune|certify|export)\b(?!.*--dry-run)": "--overwrite",
    r"^s2ap-deploy run\b": "--run another",
    r"^s2ap-deploy init .*--output": "--overwrite",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line on which it begins, its language and its lines."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.S | re.M):
        yield Block(page, text.count("\n", 0, found.start()) + 1, *found.groups())


def typed(text: str) -> list[str]:
    """The commands of a shell block without comments; ``a && b`` are two."""
    lines = text.replace("\\\n", " ").splitlines()
    bare = (re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ") for line in lines)
    return [part.strip() for line in bare for part in line.split(" && ") if part.strip()]


def workflow(content: Mapping[str, Any]) -> list[str]:
    """The commands of a GitHub workflow (steps), a GitLab pipeline (scripts) or hooks; none in a recipe."""
    hooks = [hook for each in content.get("repos", []) for hook in each["hooks"]]
    found = [f"s2ap-deploy gate {shlex.join(hook['args'])}" for hook in hooks]
    for job in [*content.get("jobs", {}).values(), *content.values()]:
        job = job if isinstance(job, dict) else {}
        found += job.get("script", [])
        for step in job.get("steps", []):
            found += typed(step.get("run", ""))
            if "/.github/actions/gate@" in step.get("uses", ""):
                found.append("s2ap-deploy gate " + " ".join(f"--{k} {v}" for k, v in step["with"].items()))
            elif "uses" in step:
                found.append(f"uses: {step['uses']}")
    return found


def commands(block: Block) -> list[str]:
    """What a block has a reader, or a machine, type; installed programs by their bare names."""
    found = typed(block.text) if block.language in SHELL else []
    if block.language == "yaml":
        found = workflow(yaml.safe_load(block.text))
    return [re.sub(r"^\S*/(?=s2ap-deploy\b)", "", command) for command in found]


def matching(patterns: Iterable[str], text: str) -> list[str]:
    return [pattern for pattern in patterns if re.search(pattern, text)]


@dataclass
class Reader:
    """Types what a page shows, in ``folder``, and remembers what did not work."""

    s2ap: Callable[..., Any]
    folder: Path
    complaints: list[str] = field(default_factory=list)

    def follow(self, block: Block) -> None:
        for command in commands(block):
            if not matching(NOT_HERE, command) and not matching(SLOW, command):
                self.type(block, command)
        check = {"python": self.execute, "json": self.compare, "toml": self.install, "yaml": self.resolve}
        try:
            check.get(block.language, lambda block: None)(block)
        except (Exception, SystemExit) as error:
            self.complaints.append(f"{block}: {type(error).__name__}: {error}")

    def type(self, block: Block, command: str, more: Iterable[str] = ()) -> None:
        small = " ".join([command, *(SMALL[pattern] for pattern in matching(SMALL, command)), *more])
        expected = next((CODES[pattern] for pattern in matching(CODES, command)), {0})
        code, told = self.in_a_shell(small) if re.search(r"^(?!s2ap)|[|<>;$`&]", small) else self.here(small)
        if code not in expected or "Traceback" in told:
            last = "\n    ".join(told.strip().splitlines()[-4:])
            self.complaints.append(f"{block}: {small}\n    ended with {code}, not {expected}\n    {last}")

    def here(self, command: str) -> tuple[int, str]:
        done = self.s2ap(*shlex.split(command)[1:], cwd=self.folder)
        return done.code, done.err

    def in_a_shell(self, command: str) -> tuple[int, str]:
        shell = ["bash", "-euo", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=self.folder, capture_output=True, text=True)
        return done.returncode, done.stderr

    def execute(self, block: Block) -> None:
        """A block whose first line is ``# name.py`` is that file; any other one is run."""
        code = compile(block.text, str(block), "exec", dont_inherit=True)
        name = re.match(r"# (\w+\.py)\n", block.text)
        if name is not None:
            (self.folder / name[1]).write_text(block.text, encoding="utf-8")
        space: dict[str, Any] = {"__name__": "__main__"}
        for pattern in matching(NAMES, block.text):
            space |= NAMES[pattern]
        with pytest.MonkeyPatch.context() as patch:
            for pattern in matching(FOLDERS, block.text):
                patch.chdir(self.folder / FOLDERS[pattern])
            exec(code, space)

    def resolve(self, block: Block) -> None:
        """A recipe, unless it is a pipeline, whose commands were typed."""
        if not commands(block):
            path = self.folder / f"block-{block.line}.yaml"
            path.write_text(block.text, encoding="utf-8")
            catalog.load(str(path))

    def install(self, block: Block) -> None:
        """The entry points of the example plug-in are those that it has."""
        shown = tomllib.loads(block.text)["project"]["entry-points"]
        example = tomllib.loads((ROOT / "examples" / "plugin" / "pyproject.toml").read_text(encoding="utf-8"))
        for group, entries in shown.items():
            assert group in [plugins.group(kind) for kind in plugins.KINDS]
            assert entries.items() <= example["project"]["entry-points"][group].items()

    def compare(self, block: Block) -> None:
        """A certificate, or a part of one: every key is one that certificates have."""
        whole = block.text if block.text.startswith("{") else f"{{{block.text}}}"
        issued = (self.folder / "s2ap-run" / "certify" / "pruned.json").read_text(encoding="utf-8")
        schemas = Certificate.model_json_schema(), Recipe.model_json_schema()  # whose gate a decision repeats
        known = keys(json.loads(issued)).union(*map(keys, schemas))
        assert keys(json.loads(whole)) <= known, sorted(keys(json.loads(whole)) - known)


def keys(content: object) -> set[str]:
    """Every key at any depth."""
    if isinstance(content, dict):
        return set(content).union(*(keys(value) for value in content.values()))
    return set().union(*(keys(value) for value in content)) if isinstance(content, list) else set()


SHOWN = {
    page: [(block, command) for block in blocks(page) for command in commands(block)]
    for page in [*PAGES, REFERENCE]
}
LONG = [page for page in PAGES if any(matching(SLOW, command) for _, command in SHOWN[page])]
TYPED = {command for page in PAGES for _, command in SHOWN[page]}
EXAMPLES = [
    pytest.param(block, command, id=command.removeprefix("s2ap-deploy "))
    for block, command in SHOWN[REFERENCE]
    if command not in TYPED and not matching(NOT_HERE, command)
]


@pytest.fixture
def sit_down(s2ap, at_desk, finished_run) -> Callable[[Path], Reader]:
    """A reader of the page, with all on the desk that the page takes to be there."""

    def reader(page: Path) -> Reader:
        if page.stem in AFTER_THE_SEQUENCE:
            shutil.copytree(finished_run, at_desk / "s2ap-run")
            shutil.copy(ROOT / "recipes" / "demo.yaml", at_desk / "my-recipe.yaml")
        if page.stem in INSTEAD:
            name, other = INSTEAD[page.stem]
            shutil.copy(at_desk / other, at_desk / name)
        return Reader(s2ap, at_desk)

    return reader


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_as_typed(page, sit_down) -> None:
    reader = sit_down(page)
    for block in blocks(page):
        reader.follow(block)
    assert not reader.complaints, "\n".join(reader.complaints)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=lambda page: page.stem)
def test_what_takes_long_works_as_typed(page, sit_down) -> None:
    reader = sit_down(page)
    assert reader.s2ap("init", "model.pt").code == 0  # the recipe.yaml that a page has made by then
    for block, command in SHOWN[page]:
        if matching(SLOW, command) and not matching(NOT_HERE, command):
            reader.type(block, command)
    assert not reader.complaints, "\n".join(reader.complaints)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "command"), EXAMPLES)
def test_an_example_of_the_reference_works(block, command, sit_down, finished_run) -> None:
    reader = sit_down(REFERENCE)
    before(block, command, reader, finished_run)
    reader.type(block, command, [AGAIN[pattern] for pattern in matching(AGAIN, command)])
    assert not reader.complaints, reader.complaints[0]


def before(block: Block, command: str, reader: Reader, finished_run: Path) -> None:
    """What an example of the reference speaks of and the desk has not."""
    for name in re.findall(r"(?<= )[a-z]\S+(?= |$)", command.partition("compare")[2]):
        shutil.copytree(finished_run, reader.folder / name)
    needed = []
    if "artifact/" in command:
        needed = ["certify --artifact s2ap-run/export/model.onnx --n 40 --workers 1"]
    if re.search(r"export .*--(align|keep-ratio)", command):
        shutil.rmtree(reader.folder / "s2ap-run")
        needed = [f"prune model.pt --granularity channel --keep-ratio 0.5 {SHORT}"]
    if "export-c/c" in command:
        needed = ["export --c"]
    if re.search(r"^python bundle|collect", command):
        needed = ["bundle s2ap-run"]
    for line in needed:
        done = reader.s2ap(*line.split())
        assert done.code == 0, done.err
    if "collect" in command:
        reader.type(block, "python bundle.pyz --name board")


@pytest.mark.parametrize("page", [*PAGES, REFERENCE, KEYS], ids=lambda page: page.stem)
def test_a_block_says_what_it_is(page) -> None:
    """What has no language is a drawing, a tree or output, in which nothing is to be typed."""
    for block in blocks(page):
        assert block.language in ("", *LANGUAGES), f"{block} is {block.language}, which nothing here checks"
        if not block.language:
            lines = re.findall(r"^(?:\$ |\S*s2ap-deploy |python3? |pip ).*", block.text, re.M)
            assert not lines, f"{block} shows {lines[0]!r}; make it a block of sh"
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(list(blocks(page)))


def test_the_tables_name_what_there_is() -> None:
    everything = [command for page in SHOWN for _, command in SHOWN[page]]
    for table in (SMALL, CODES, SLOW, NOT_HERE, AGAIN):
        for pattern in table:
            assert any(re.search(pattern, command) for command in everything), f"no page shows {pattern}"
    python = [block.text for page in PAGES for block in blocks(page) if block.language == "python"]
    for pattern in (*NAMES, *FOLDERS):
        assert any(re.search(pattern, text) for text in python), f"no page shows {pattern}"
    stems = {page.stem for page in SHOWN}
    assert stems.issuperset(AFTER_THE_SEQUENCE)
    assert stems.issuperset(INSTEAD)
