"""Entry point of ``python -m s2ap_deploy`` and of the installed command."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line.

    Imports are guarded as well: a missing library ends with exit code 2 and the command that installs it, a
    broken one with 70. Python's own exit code of an uncaught error, 1, would mean that a gate failed.
    """
    try:
        from s2ap_deploy.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        from s2ap_deploy.requirements import install_incomplete

        incomplete = install_incomplete(error) if isinstance(error, ImportError) else None
        if incomplete is None:
            sys.stderr.write(f"error: s2ap-deploy cannot start: {type(error).__name__}: {error}\n")
            sys.exit(70)
        sys.stderr.write(f"error: {incomplete.message}\n  hint: {incomplete.hint}\n")
        if "--json" in sys.argv:
            import json

            content = {"error": incomplete.message, "code": incomplete.code, "hint": incomplete.hint}
            print(json.dumps({**content, "exit_code": incomplete.exit_code}, sort_keys=True))
        sys.exit(incomplete.exit_code)
    command_line()


if __name__ == "__main__":
    main()
