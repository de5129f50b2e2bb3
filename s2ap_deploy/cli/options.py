"""Options that several commands share; those that set a recipe key are made from the key's field."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from s2ap_deploy.recipe import keys
from s2ap_deploy.recipe.schema import PRESETS, Recipe
from s2ap_deploy.tracking import NAMES

Command = TypeVar("Command", bound=Callable[..., Any])

COUNT = click.IntRange(min=1)
PATH = click.Path(path_type=Path)
RUN = Path("s2ap-run")


def stacked(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Combine decorators into one, the first outermost, so that --help lists options in this order."""

    def apply(command: Command) -> Command:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return apply


class FieldType(click.ParamType):  # type: ignore[type-arg]
    """Values of a recipe key: parsed by the field's JSON schema, validated by the field itself."""

    name = "value"

    def __init__(self, info: FieldInfo) -> None:
        annotation: Any = info.annotation
        for constraint in info.metadata:
            annotation = Annotated[annotation, constraint]
        self.adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        schema = self.adapter.json_schema()
        alternatives = schema.get("anyOf", [schema])
        self.texts = any(each.get("items", {}).get("type") == "string" for each in alternatives)
        self.kinds = [str(each.get("type", "string")) for each in alternatives if each.get("type") != "null"]
        self.choices = [
            str(value)
            for each in alternatives
            for value in each.get("enum", [each["const"]] if "const" in each else [])
        ]

    def metavar(self) -> str:
        """Return ``[auto|ef|...]``, ``INTEGER`` or the like."""
        words = {"integer": "INTEGER", "number": "FLOAT", "array": "FLOAT,FLOAT,..."}
        if self.texts:
            return "NAME,NAME,..."
        if self.choices:
            other = [words[kind] for kind in self.kinds if kind in words]
            return f"[{'|'.join([*self.choices, *other])}]"
        return words.get(self.kinds[0], "TEXT")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.adapter.validate_python(self._parsed(value))
        except ValidationError as error:
            from s2ap_deploy.recipe.diagnosis import sentence

            self.fail(sentence(error.errors()[0], Recipe), param, ctx)

    def _parsed(self, text: str) -> Any:
        if self.texts:
            return tuple(text.split(","))
        if "array" in self.kinds:
            return tuple(_number(part, float) for part in text.split(","))
        for kind, of in (("integer", int), ("number", float)):
            if kind in self.kinds and isinstance(number := _number(text, of), of):
                return number
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete the choices that start with ``incomplete``."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(each) for each in self.choices if each.startswith(incomplete)]


def _number(text: str, of: type[int] | type[float]) -> int | float | str:
    try:
        return of(text)
    except ValueError:
        return text


def recipe_option(
    name: str, key: str, *, flag: str | None = None, **attributes: Any
) -> Callable[[Command], Command]:
    """Make ``--name``, or ``flag``, from the field of a recipe key: its type, constraints, default and help.

    A boolean becomes ``--name/--no-name``. ``attributes`` replace those of the ``click.Option``.
    """
    info = keys.field(Recipe, key)
    flag = flag or f"--{name.replace('_', '-')}"
    default = {} if attributes.get("required") else {"default": None}  # Click counts None as given
    attributes = {"help": option_help(info), **default, **attributes}
    kind = FieldType(info)
    if kind.kinds == ["boolean"]:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **attributes)
    return click.option(flag, name, **{"type": kind, "metavar": kind.metavar(), **attributes})


def recipe_options(table: keys.Keywords, *names: str, **helps: str) -> Callable[[Command], Command]:
    """Make the options of a table of keywords, or of ``names``; ``helps`` overrides help texts."""
    return stacked(
        *(
            recipe_option(name, table[name][0], **({"help": helps[name]} if name in helps else {}))
            for name in names or table
        )
    )


def option_help(info: FieldInfo) -> str:
    """Return the description of a field with its default, unless the description states one."""
    text = info.description or ""
    default = info.default
    if (
        info.is_required()
        or any(default is each for each in (None, False))
        or default in ((), "")
        or "[default:" in text
    ):
        return text
    return f"{text}  [default: {str(default).lower() if default is True else default}]"


def importable(_ctx: click.Context, _option: click.Parameter, arch: str | None) -> str | None:
    """Refuse a file without a factory; find modules in the working folder, as ``python -m`` does."""
    if arch is not None and arch.endswith(".py"):
        raise click.BadParameter(f"add the function that builds the network: {arch}:FACTORY")
    if arch is not None and ":" in arch and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return arch


arch_option = click.option(
    "--arch",
    callback=importable,
    help="Architecture: a registered name, package.module:factory or file.py:factory.",
)
import_path_option = click.option(
    "--arch", callback=importable, help="Architecture by import path, which a recipe cannot name."
)
trust_option = click.option(
    "--trust-pickle", is_flag=True, help="Unpickle the checkpoint, which may run the code inside it."
)
network_options = stacked(
    arch_option,
    recipe_options(
        keys.NETWORK,
        data="digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH.  [default: the checkpoint's]",
        eps="Attack radius, such as 8/255 or 0.1.  [default: the checkpoint's]",
        norm="Norm of the attack.  [default: the checkpoint's, else Linf]",
    ),
    trust_option,
)
preset_option = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="20 + 100 epochs, 5 + 5, or all settings of HYDRA's or HARP's code.  [default: published]",
)


def run_folder(default: Path) -> Callable[[Command], Command]:
    """Make ``--run`` with its default."""
    return click.option("--run", type=PATH, default=default, show_default=True, help="The run folder.")


run_option = run_folder(RUN)
output_option = click.option("--output", type=PATH, help="Also write the result here.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change a value of the recipe."
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Estimate time and file size without writing anything."
)
time_budget_option = click.option(
    "--time-budget",
    type=click.FloatRange(min=0),
    help="Seconds that attacks may take before they stop with exit code 3.  [default: none]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
output_options = stacked(
    json_option, click.option("--quiet", "-q", is_flag=True, help="Suppress progress and notes.")
)
verbose_option = click.option(
    "--verbose", "-v", is_flag=True, help="Also print settings with their defaults, times and hashes."
)
logging_options = stacked(
    verbose_option,
    click.option(
        "--track",
        type=click.Choice(NAMES),
        multiple=True,
        help="Also log metrics to this tracker, in the run folder. May be repeated.",
    ),
)
again_options = stacked(
    click.option("--resume", is_flag=True, help="Continue interrupted work."),
    click.option("--overwrite", is_flag=True, help="Replace existing results."),
)
compute_options = stacked(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--threads", type=COUNT, help="Torch threads.  [default: chosen by torch]"),
)


def _launch(ctx: click.Context, _option: click.Parameter, devices: int | None) -> None:
    """Launch the worker ranks and exit with rank 0's exit code, unless this process is one of them."""
    from s2ap_deploy.distributed import environment, launch

    if devices is None or ctx.resilient_parsing or environment.size() == devices:
        return
    if devices > 1 or environment.size() > 1:
        ctx.exit(launch.launch(sys.argv[1:], devices))


devices_option = click.option(
    "--devices",
    type=click.IntRange(1, 1024),
    metavar="N",
    is_eager=True,
    expose_value=False,
    callback=_launch,
    help="Ranks that share the work: GPUs, or processes on a CPU.  [default: 1, or torchrun's]",
)
training_options = stacked(
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bf16"]),
        default="auto",
        help="Precision of training steps.  [default: bf16 on CUDA where supported, else float32]",
    ),
    click.option(
        "--compile", "compiled", is_flag=True, help="Train with torch.compile; compilation takes minutes."
    ),
    devices_option,
    click.option(
        "--accumulate",
        type=COUNT,
        default=1,
        help="Number of micro-batches per rank, to save memory.  [default: 1]",
    ),
)
workers_option = click.option(
    "--workers", type=COUNT, help="Attack processes of one thread each.  [default: one per core]"
)
cluster_options = stacked(
    click.option("--on", metavar="ray[://HOST:PORT]", help="Run on a Ray cluster.  [default: this machine]"),
    click.option(
        "--per-task",
        metavar="cpus=N,gpus=N,memory=SIZE",
        help="What one task of the cluster takes.  [default: cpus=1, and a GPU with --device cuda]",
    ),
)
data_root_option = click.option(
    "--data-root",
    type=PATH,
    help="Folder of data sets.  [default: $S2AP_DATA_ROOT, else data; remembered in the run folder]",
)
data_options = stacked(
    data_root_option, click.option("--download", is_flag=True, help="Download the data set if it is missing.")
)


def several(each: FieldType) -> Callable[[Any], tuple[Any, ...]]:
    """Return a click type for comma-separated values of type ``each``."""

    def values(text: Any) -> tuple[Any, ...]:
        if not isinstance(text, str):
            return tuple(text)
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise click.BadParameter(f"{text!r} is not a list such as a,b,c")
        return tuple(each.convert(part, None, None) for part in parts)

    return values


def axis(name: str, metavar: str, help: str) -> Callable[[Command], Command]:
    """Make an option that takes several values of a key of pruning, for a sweep."""
    kind = FieldType(keys.field(Recipe, keys.PRUNE[name][0]))
    return click.option(f"--{name}", type=several(kind), default=(), metavar=metavar, help=help)
