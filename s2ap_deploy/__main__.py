"""``python -m s2ap_deploy``, and what the installed command calls. Imports nothing before it is run_cli."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """The command line; an installation that cannot even be imported is unforeseen, not a failed gate."""
    try:
        from s2ap_deploy.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        from s2ap_deploy.requirements import install_incomplete

        incomplete = install_incomplete(error) if isinstance(error, ImportError) else None
        if incomplete is not None:
            sys.stderr.write(f"error: {incomplete.message}\n  hint: {incomplete.hint}\n")
            sys.exit(incomplete.exit_code)
        sys.stderr.write(f"error: s2ap-deploy cannot start: {type(error).__name__}: {error}\n")
        sys.exit(70)
    command_line()


if __name__ == "__main__":
    main()
