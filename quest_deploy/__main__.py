"""The program: `quest-deploy`, and `python -m quest_deploy`, the form that launchers of several
processes take.
"""

from __future__ import annotations

import gc
import os

from quest_deploy.cli.interruptions import INTERRUPTED, end_at_once, ignore


def main() -> None:
    """Run the program. SIGINT and SIGTERM end it with one message at any moment: also while it is
    loaded, where Python's own answer is a traceback.
    """
    end_at_once()
    from quest_deploy.cli.main import main as run

    try:
        run()
    except SystemExit as e:
        if e.code == INTERRUPTED:
            os._exit(INTERRUPTED)  # the interpreter may remember, and end by the signal itself
        raise
    finally:
        ignore()  # all is said and done, and the interpreter only tidies up
        gc.freeze()  # for which it would look through all of torch's modules, for over a second


if __name__ == "__main__":
    main()
