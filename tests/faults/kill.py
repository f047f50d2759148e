"""Run in a process of its own: ends each command at random moments, looks at what it left and lets
it go on; prints how each went, as JSON.

    python -m tests.faults.kill WORKSPACE FOLDER KILLS SEED COMMAND...

WORKSPACE is a finished one of the very small model, FOLDER an empty one, KILLS are over all
commands.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.forked import Ended, Nursery, broken, digests

ENGINE = ("-w", "{w}", "--backend", "onnxruntime")
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "-w", "{w}", "--samples", "4", "--seed", "1"),
    "calibrate anew": ("calibrate", "-w", "{new}", "--samples", "4", "--steps", "6"),
    "import": (
        *("import", "{files}/ckpt.pth", "--from", "quest", "--unet", "{files}/unet.json"),
        *("--settings", "{files}/settings.json", "-w", "{new}"),
    ),
    "lora": (
        *("lora", "-w", "{w}", "--lora", "{files}/style.safetensors:0.5"),
        *("--output", "{new}"),
    ),
    "sensitivity": ("sensitivity", "-w", "{w}", "--samples", "1", "--batch", "10"),
    "finetune": (
        *("finetune", "-w", "{w}", "--temporal-steps", "2", "--sensitive-steps", "3"),
        *("--batch", "4", "--seed", "1", "--save-every", "1"),
    ),
    "finetune, two processes": (
        *("finetune", "-w", "{w}", "--temporal-steps", "2", "--sensitive-steps", "3"),
        *("--batch", "4", "--seed", "1", "--save-every", "1"),
    ),
    "export": ("export", "-w", "{w}"),
    "reference": ("reference", "-w", "{w}", "--seed", "1"),
    "build-engine onnxruntime": ("build-engine", *ENGINE, "--max-batch", "3"),
    "build-engine openvino": (
        *("build-engine", "-w", "{w}", "--backend", "openvino"),
        *("--max-batch", "3"),
    ),
    "verify": ("verify", *ENGINE),
    "benchmark": ("benchmark", *ENGINE, "--runs", "1", "--warmup", "0", "--batch", "1"),
    "generate": ("generate", *ENGINE, "--steps", "2", "--rows", "1"),
    "evaluate": ("evaluate", *ENGINE, "--images", "4", "--steps", "2"),
    "report": ("report", "-w", "{w}"),
    "report elsewhere": ("report", "-w", "{w}", "--output", "{new}/page.html"),
    "schedule": ("schedule", "-w", "{w}", "--steps", "7"),
    "package": ("package", "-w", "{w}", "--triton", "{package}"),
    "run": ("run", "-w", "{w}", "--backend", "onnxruntime", "--seed", "1"),
}
"""By name, a command with options other than those that the workspace's stages have run with."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LEAST = len(SIGNALS)
CHANGING = ("manifest.json", "reports/benchmark-", "reports/evaluate-", "reports/report.html")
"""The files that hold times, and so differ between equal runs."""


class Campaign:
    """Kills of one command."""

    def __init__(self, nursery: Nursery, source: Path, name: str) -> None:
        self.nursery, self.source, self.name = nursery, source, name
        self.root = nursery.folder / "places"
        self.kills, self.spent = 0, 0.0

    def kill_next(self, seed: int) -> None:
        """Print how the next kill went."""
        began = time.monotonic()
        rng = random.Random(f"{seed} {self.name} {self.kills}")
        print(json.dumps(self.kill(SIGNALS[self.kills % len(SIGNALS)], rng)), flush=True)
        self.kills += 1
        self.spent += time.monotonic() - began

    def arguments(self) -> list[str]:
        """Its arguments, with the places that it works on."""
        places = {
            "w": self.root / "workspace",
            "new": self.root / "new",
            "package": self.root / "package",
            "files": self.nursery.folder / "files",
        }
        return [part.format(**places) for part in COMMANDS[self.name]]

    def start(self) -> list[int]:
        """Start it, in all its processes."""
        if "two" not in self.name:
            return [self.nursery.start(self.arguments(), at_first=shorten)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.nursery.start(
                self.arguments(), environment={**group, "RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in "01"
        ]

    def wait(self, processes: list[int]) -> list[Ended]:
        """Wait for all; as a launcher does, tell the others to end once one has failed."""
        ended = []
        for i, process in enumerate(processes):
            ended.append(self.nursery.wait(process))
            if ended[-1].code:
                for other in processes[i + 1 :]:
                    os.kill(other, signal.SIGTERM)
        return ended

    def fresh(self) -> None:
        """Put everything back as it was before the command."""
        shutil.rmtree(self.root, ignore_errors=True)
        ignored = shutil.ignore_patterns("model.engine", ".lock")
        shutil.copytree(self.source, self.root / "workspace", ignore=ignored)

    def rehearse(self) -> None:
        """Run it undisturbed, and keep what it makes and how long it takes."""
        self.fresh()
        for ended in self.wait(self.start()):
            assert ended.code == 0, ended.err
        self.fresh()
        began = time.monotonic()
        for ended in self.wait(self.start()):
            assert ended.code == 0, ended.err
        self.seconds = time.monotonic() - began
        self.expected = self.results()

    def results(self) -> dict[str, str]:
        """What equal runs make: all files' digests, those with times in them by name alone."""
        return {
            name: "" if any(part in name for part in CHANGING) else digest
            for name, digest in digests(self.root).items()
        }

    def other(self) -> list[str]:
        """The files that are not as the undisturbed run made them, or are there in one alone."""
        results = self.results()
        names = results.keys() | self.expected.keys()
        return sorted(name for name in names if results.get(name) != self.expected.get(name))

    def kill(self, ending: signal.Signals, rng: random.Random) -> dict[str, Any]:
        """How one kill went."""
        self.fresh()
        moment, group = rng.uniform(0, self.seconds), rng.random() < 0.5
        processes = self.start()
        time.sleep(moment)
        # Of several processes one may end, and the others cannot go on.
        for process in processes if rng.random() < 0.5 else [rng.choice(processes)]:
            if group:
                os.killpg(process, ending)
            else:
                os.kill(process, ending)
        sent = time.monotonic()
        ended = self.wait(processes)
        found: dict[str, Any] = {
            "command": self.name,
            "signal": ending.name,
            "group": group,
            "moment": round(moment, 3),
            "of": round(self.seconds, 3),
            "took": round(time.monotonic() - sent, 3),
            "ended": [asdict(each) for each in ended],
            # Told to end, and not done for a while: it must not go on as if nothing had been said.
            "lost": [
                each.done - sent for each in ended if not each.code and each.done > sent + 0.1
            ],
            "broken": [],
        }
        copy = self.nursery.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        for place in ("workspace", "new"):
            if (self.root / place / "manifest.json").exists():
                shutil.copytree(self.root / place, copy / place)
                settled(copy / place)
                found["broken"] += broken(copy / place)
        again = self.wait(self.start())
        found["again"] = [asdict(each) for each in again if each.code or "Traceback" in each.err]
        found["other"] = self.other()
        found["scratch"] = self.nursery.left()
        return found


def shorten() -> None:
    """Let `run` end with the benchmark: its defaults would draw thousands of images, and the
    commands that do that are ended by themselves.
    """
    from quest_deploy.stages import run

    run.OF_FIRST_PASSED = ()


def settled(root: Path) -> None:
    """Let the workspace finish what a killed process had recorded."""
    from quest_deploy.artifacts.workspace import Workspace

    with Workspace.open(root).locked():
        pass


def make_files(folder: Path) -> None:
    """An official checkpoint, what the command that imports it takes, and a LoRA."""
    import dataclasses

    import torch
    from safetensors.torch import save_file

    from tests.faults.readers import OFFICIAL
    from tests.quest_deploy.importers.cases import Case

    folder.mkdir()
    case = Case(OFFICIAL, per_channel=True)
    torch.save(case.state, folder / "ckpt.pth")
    (folder / "unet.json").write_text(json.dumps(OFFICIAL))
    settings = dataclasses.asdict(case.import_settings)
    del settings["source"]
    (folder / "settings.json").write_text(json.dumps(settings))
    factors = {"lora_A": torch.ones(1, 32), "lora_B": torch.ones(32, 1)}
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.{x}.weight": y for x, y in factors.items()}, folder / "style.safetensors")


def main(source: Path, folder: Path, kills: int, seed: int, names: list[str]) -> None:
    """Print a line of JSON for each kill. Each command is ended ``LEAST`` times; what is left of
    the kills is shared out so that each gets the same time.
    """
    nursery = Nursery(folder)
    make_files(folder / "files")
    campaigns = [Campaign(nursery, source, name) for name in names or COMMANDS]
    for campaign in campaigns:
        campaign.rehearse()
        for _ in range(LEAST):
            campaign.kill_next(seed)
    for _ in range(kills - LEAST * len(campaigns)):
        min(campaigns, key=lambda campaign: campaign.spent).kill_next(seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
