"""Reference pages of commands, recipe keys and error codes: ``python -m s2ap_deploy.cli.reference``.

It writes ``docs/reference.md``, ``docs/recipe-keys.md`` and ``docs/errors.md`` of a checkout; a test compares
them with the code.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from s2ap_deploy import errors, files
from s2ap_deploy.cli.main import COMMANDS, cli
from s2ap_deploy.recipe import diagnosis
from s2ap_deploy.recipe.keys import section_of
from s2ap_deploy.recipe.schema import PRESETS, Recipe

COMMANDS_PAGE, KEYS_PAGE, ERRORS_PAGE = "reference.md", "recipe-keys.md", "errors.md"
CLICK_MESSAGES = {
    "option-unknown": "an option that the command does not have",
    "option-missing": "a required option or argument is missing",
    "option-invalid": "a value that the option does not accept",
    "usage": "arguments that the command does not accept",
}
PACKAGE = Path(__file__).parents[1]
MADE = "<!-- made by python -m s2ap_deploy.cli.reference; do not edit -->"


def main(folder: Path) -> None:
    """Write the pages into ``folder``."""
    for name, text in pages().items():
        files.write_text(folder / name, text)
        print(folder / name)


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    return {COMMANDS_PAGE: commands_page(), KEYS_PAGE: keys_page(), ERRORS_PAGE: errors_page()}


def commands_page() -> str:
    """Return every command with its arguments and options, in the order of ``--help``."""
    parts = [
        "# Commands and options",
        MADE,
        "Every command prints its help with `--help` or `-h`; `s2ap-deploy --version` prints the version. "
        "Exit codes are listed in the [README](../README.md#gate).",
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
    """Return a docstring with its examples as a code block."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).replace("\f", "").split("\n\n"):
        if paragraph.startswith("\b"):
            paragraphs.append(f"```sh\n{paragraph.removeprefix(chr(8)).strip()}\n```")
        else:
            words = " ".join(paragraph.split())
            paragraphs.append(re.sub(r"(?<!`)\bs2ap-deploy [a-z]+", r"`\g<0>`", words))
    return "\n\n".join(paragraphs)


def _names(option: click.Option, context: click.Context) -> str:
    """Return ``--onnx``, ``--compact / --no-compact``, ``--n INTEGER``."""
    names = ", ".join(option.opts) + (
        f" / {', '.join(option.secondary_opts)}" if option.secondary_opts else ""
    )
    takes = "" if option.is_flag or option.count else option.make_metavar(context).replace(" RANGE", "")
    return f"`{names}{takes and ' '}{_cell(takes)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def keys_page() -> str:
    """Return every key of a recipe with its type, default and meaning, section by section."""
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
    """Yield the recipe, then every section below it by its dotted name."""
    yield prefix, model
    for name, field in model.model_fields.items():
        below = section_of(field.annotation)
        if below is not None:
            yield from _sections(below, f"{prefix}.{name}" if prefix else name)


def _section(name: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = []
    for key, field in model.model_fields.items():
        whole = f"{name}.{key}" if name else key
        kind = "section" if section_of(field.annotation) is not None else _kind(schema["properties"][key])
        default = "required" if field.is_required() else _usual(field)
        meaning = _cell((field.description or "").partition("  [default:")[0])
        rows.append(f"| `{whole}` | {kind} | {default} | {meaning} |")
    words = _cell(inspect.cleandoc(model.__doc__ or "").replace("``", "`"))
    title = f"## `{name}`" if name else "## At the top"
    return f"{title}\n\n{words}\n\n| key | takes | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)


def _usual(field: FieldInfo) -> str:
    """Return the default of a field, in the words of its description where that states one."""
    if stated := re.search(r"\[default: (.*)\]$", field.description or ""):
        return _cell(stated[1])
    value = field.get_default(call_default_factory=True)
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
    """Describe the values that a JSON schema allows."""
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
    found = [f"{words} {schema[key]:g}" for key, words in signs if key in schema]
    if "pattern" in schema:
        found.append(f"like `{re.sub(r'[|]', chr(92) + '|', schema['pattern'])}`")
    return f" {', '.join(found)}" if found else ""


def errors_page() -> str:
    """Return every error code with its classes, exit code and message."""
    found = error_codes()
    rows = [
        f"| `{code}` | {', '.join(f'`{name}`' for name in names)} | {exit_code} | {_cell(meaning)} |"
        for code, (names, exit_code, meaning) in sorted(found.items())
    ]
    parts = [
        "# Error codes",
        MADE,
        "Every error carries a code, which stays the same when its wording changes: `error.code` in Python, "
        'and `"code"` in the object that a command prints with `--json`, beside `"error"`, `"hint"` and '
        '`"exit_code"`. '
        "The message below stands for all that share a code; `…` are names and values.",
        "| code | raised as | exit code | message |\n|---|---|---|---|\n" + "\n".join(rows),
    ]
    return "\n\n".join(parts) + "\n"


def error_codes() -> dict[str, tuple[tuple[str, ...], int, str]]:
    """Return the classes, exit code and message of every error code that the package can raise."""
    classes = {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.DeployError)
    }
    found: dict[str, tuple[tuple[str, ...], int, str]] = {
        kind.default_code: ((name,), kind.exit_code, inspect.cleandoc(kind.__doc__ or "").split("\n")[0])
        for name, kind in classes.items()
    }
    found |= {code: (("UsageError",), errors.UNUSABLE, words) for code, words in CLICK_MESSAGES.items()}
    found |= {code: (("RecipeError",), errors.UNUSABLE, words) for code, words in diagnosis.CODES.items()}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (raised := _raised(node)) is not None:
                name, code, message = raised
                kind = classes.get(name, errors.RecipeError if name == "invalid" else errors.InputError)
                names, _, before = found.get(code, ((), 0, ""))
                shown = "RecipeError" if name == "invalid" else kind.__name__
                exit_code = errors.INTERRUPTED if code == "interrupted" else kind.exit_code
                found[code] = (
                    tuple(sorted({*names, shown})),
                    exit_code,
                    before or message or kind.__doc__ or "",
                )
    return found


def _raised(call: ast.Call) -> tuple[str, str, str] | None:
    """Return the class, code and message of a call that makes an error, None for any other call."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    code: ast.expr | None = next((each.value for each in call.keywords if each.arg == "code"), None)
    words = list(call.args)
    if name == "invalid" and words:
        code = words.pop(0)
    if not isinstance(code, ast.Constant) or not isinstance(code.value, str):
        return None
    return name, code.value, _message(words[0]) if words else ""


def _message(node: ast.expr) -> str:
    """Return the text of a string, with ``…`` for what it formats; empty for any other expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs")
