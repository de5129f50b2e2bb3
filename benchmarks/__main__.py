"""Run a benchmark by its name.

python -m benchmarks list
python -m benchmarks NAME [options]
"""

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def scripts() -> dict[str, Path]:
    """Find the benchmarks: every module with a ``main`` in a folder below this one."""
    paths = sorted(HERE.glob("*/*.py"))
    return {
        path.stem.replace("_", "-"): path
        for path in paths
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }


def main() -> None:
    name, *options = sys.argv[1:] or ["--help"]
    found = scripts()
    if name in ("-h", "--help"):
        print(__doc__)
    elif name == "list":
        for each, path in found.items():
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            print(f"{path.parent.name:10}  {each:16}  {summary}")
    elif name in found:
        sys.argv = [f"python -m benchmarks {name}", *options]
        importlib.import_module(f"benchmarks.{found[name].parent.name}.{found[name].stem}").main()
    else:
        raise SystemExit(f"no benchmark {name!r}; see: python -m benchmarks list")


if __name__ == "__main__":
    main()
