"""The reference of commands and of recipe keys, made from the code: ``python -m s2ap_deploy.cli.reference``.

It writes ``docs/reference.md`` and ``docs/recipe-keys.md`` of a checkout; a test holds both against the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from s2ap_deploy import files
from s2ap_deploy.cli.main import COMMANDS, cli
from s2ap_deploy.recipe.schema import PRESETS, Recipe

COMMANDS_PAGE, KEYS_PAGE = "reference.md", "recipe-keys.md"
MADE = "<!-- made by python -m s2ap_deploy.cli.reference; do not edit -->"


def main(folder: Path) -> None:
    """Write both pages into ``folder``."""
    for name, text in pages().items():
        files.write_text(folder / name, text)
        print(folder / name)


def pages() -> dict[str, str]:
    """Both pages by file name."""
    return {COMMANDS_PAGE: commands_page(), KEYS_PAGE: keys_page()}


def commands_page() -> str:
    """Every command with its arguments and options, in the order of ``--help``."""
    parts = [
        "# Commands and options",
        MADE,
        "Every command prints its help with `--help` or `-h`; `s2ap-deploy --version` prints the version. "
        "Exit codes are those of the [README](../README.md#exit-codes).",
        "\n".join(f"* [`{name}`](#{name}): {line}" for name, line in COMMANDS.items()),
        _completion(),
    ]
    parent = click.Context(cli, info_name="s2ap-deploy", **cli.context_settings)
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        parts += list(_command(command, click.Context(command, info_name=name, parent=parent)))
    return "\n\n".join(parts) + "\n"


def _completion() -> str:
    return (
        "## Shell completion\n\nOne line in the start-up file of the shell:\n\n```sh\n"
        'eval "$(_S2AP_DEPLOY_COMPLETE=bash_source s2ap-deploy)"    # ~/.bashrc\n'
        'eval "$(_S2AP_DEPLOY_COMPLETE=zsh_source s2ap-deploy)"     # ~/.zshrc\n'
        "_S2AP_DEPLOY_COMPLETE=fish_source s2ap-deploy | source     # ~/.config/fish/config.fish\n```"
    )


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    title = context.command_path.removeprefix("s2ap-deploy ")
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    yield f"{'##' if ' ' not in title else '###'} {title}\n\n`{usage}`"
    yield _prose(command.help or "")
    rows = [
        (_names(option, context), _cell((option.get_help_record(context) or ("", ""))[1]))
        for option in command.get_params(context)
        if isinstance(option, click.Option) and not option.hidden and "--help" not in option.opts
    ]
    if rows:
        yield "| option | meaning |\n|---|---|\n" + "\n".join(
            f"| {names} | {words} |" for names, words in rows
        )
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from _command(below, click.Context(below, info_name=name, parent=context))


def _prose(text: str) -> str:
    """A docstring with its examples as a code block."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).replace("\f", "").split("\n\n"):
        if paragraph.startswith("\b"):
            paragraphs.append(f"```sh\n{paragraph.removeprefix(chr(8)).strip()}\n```")
        else:
            words = " ".join(paragraph.split())
            paragraphs.append(re.sub(r"(?<!`)\bs2ap-deploy [a-z]+", r"`\g<0>`", words))
    return "\n\n".join(paragraphs)


def _names(option: click.Option, context: click.Context) -> str:
    """``--onnx``, ``--compact / --no-compact``, ``--n INTEGER``."""
    names = ", ".join(option.opts) + (
        f" / {', '.join(option.secondary_opts)}" if option.secondary_opts else ""
    )
    takes = "" if option.is_flag or option.count else option.make_metavar(context).replace(" RANGE", "")
    return f"`{names}{takes and ' '}{_cell(takes)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def keys_page() -> str:
    """Every key of a recipe with its type and default, section by section."""
    presets = "\n".join(
        f"* `{name}`: " + ", ".join(f"`{key}` {_default(value)}" for key, value in keys.items())
        for name, keys in PRESETS.items()
    )
    parts = [
        "# Keys of a recipe",
        MADE,
        "A key of another name is an error that names the nearest one. `--set section.key=value` changes one "
        "for a run. A recipe names architectures, losses, methods and targets that are registered; it "
        "never points at code.",
    ]
    parts += [_section(name, model) for name, model in _sections(Recipe)]
    return "\n\n".join([*parts, f"## Presets\n\n{presets}"]) + "\n"


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The recipe, then every section below it by its dotted name."""
    yield prefix, model
    for name, field in model.model_fields.items():
        below = _model(field.annotation)
        if below is not None:
            yield from _sections(below, f"{prefix}.{name}" if prefix else name)


def _section(name: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = []
    for key, field in model.model_fields.items():
        whole = f"{name}.{key}" if name else key
        kind = "section" if _model(field.annotation) is not None else _kind(schema["properties"][key])
        default = "required" if field.is_required() else _usual(field.get_default(call_default_factory=True))
        rows.append(f"| `{whole}` | {kind} | {default} |")
    words = _cell(inspect.cleandoc(model.__doc__ or "").replace("``", "`"))
    title = f"## `{name}`" if name else "## At the top"
    return f"{title}\n\n{words}\n\n| key | takes | default |\n|---|---|---|\n" + "\n".join(rows)


def _usual(value: object) -> str:
    return "see below" if isinstance(value, BaseModel) else _default(value)


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "empty" if not value else ", ".join(map(str, value))
    return f"`{value}`" if value != "" else "empty"


def _kind(schema: Mapping[str, Any]) -> str:
    """What a JSON schema asks for, in words."""
    if "enum" in schema:
        return " or ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        kinds = [_kind(each) for each in schema["anyOf"] if each.get("type") != "null"]
        if schema["anyOf"][-1] == {"type": "string"} and "enum" in schema["anyOf"][0]:
            return f"{kinds[0]}, or a plug-in's"
        return " or ".join(dict.fromkeys(kinds))
    kind = str(schema.get("type", "value"))
    if kind == "array":
        return "a list" if "prefixItems" in schema or "items" in schema else kind
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    return words.get(kind, kind) + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    told = [f"{words} {schema[key]:g}" for key, words in signs if key in schema]
    if "pattern" in schema:
        told.append(f"like `{re.sub(r'[|]', chr(92) + '|', schema['pattern'])}`")
    return f" {', '.join(told)}" if told else ""


def _model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs")
