"""How a bench's command ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quest_deploy.errors import QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Run ``app``; an error ends it in one message and exit code 2 where the user can mend it, 1
    otherwise.
    """
    try:
        app(args=arguments)
    except QuestDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
