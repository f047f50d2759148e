"""Run in a process of its own that has ``full_disk.c`` preloaded: runs each command on a disk that
is full from its nth write on; prints how each run ended, as JSON.

    python -m tests.faults.starve WORKSPACE FOLDER RUNS SEED COMMAND...

WORKSPACE is a finished one of the very small model, FOLDER an empty one, RUNS are at most of each
command: at every n where there are no more.
"""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.forked import Nursery, broken, digests
from tests.faults.kill import COMMANDS, Campaign, make_files, settled

NEVER = 0


class Starvation(Campaign):
    """Runs of one command on a disk that fills up."""

    def limited(self, nth: int) -> dict[str, Any]:
        """How the command ended where the disk is full from ``nth`` on, and at how many writes."""
        shim, counted = ctypes.CDLL(None), self.nursery.folder / "counted"

        def last() -> None:
            count = shim.full_disk_counted()
            shim.full_disk_from(b"", ctypes.c_long(NEVER))
            counted.write_text(str(count))

        ended = self.nursery.run(
            self.arguments(),
            at_first=lambda: shim.full_disk_from(str(self.root).encode(), ctypes.c_long(nth)),
            at_last=last,
        )
        return {
            "command": self.name,
            "nth": nth,
            "writes": int(counted.read_text()),
            **asdict(ended),
        }

    def count(self) -> int:
        """How often it writes when nothing fails."""
        self.fresh()
        found: int = self.limited(NEVER)["writes"]
        return found

    def starve(self, nth: int, *, goes_on: bool) -> dict[str, Any]:
        """How one run went; ``goes_on``: and how the next one does, once there is room."""
        self.fresh()
        before = digests(self.root)
        found = {**self.limited(nth), "broken": []}
        left = digests(self.root)
        found["left"] = [name for name in left if ".tmp-" in name] + self.nursery.left()
        for place in ("workspace", "new"):
            if (self.root / place / "manifest.json").exists():
                settled(self.root / place)
                found["broken"] += broken(self.root / place)
        # All as it was, or all done: what had been recorded is finished by whoever comes next.
        after = digests(self.root)
        changed = {name for name, digest in before.items() if after.get(name) != digest}
        found["changed"] = sorted(changed.intersection(self.other()))
        if goes_on:
            again = self.nursery.run(self.arguments())
            found["again"] = again.err if again.code else ""
            found["other"] = self.other()
        return found


def main(source: Path, folder: Path, runs: int, seed: int, names: list[str]) -> None:
    """Print a line of JSON for each run."""
    nursery = Nursery(folder)
    make_files(folder / "files")
    for name in names or COMMANDS:
        starvation = Starvation(nursery, source, name)
        starvation.rehearse()
        writes = starvation.count()
        rng = random.Random(f"{seed} {name}")
        every = range(1, writes + 1)
        for nth in sorted(rng.sample(every, runs)) if runs < writes else every:
            found = starvation.starve(nth, goes_on=rng.random() < 0.2)
            print(json.dumps({**found, "of": writes}), flush=True)
        shutil.rmtree(starvation.root)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
