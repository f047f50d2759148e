"""The C++ runtime's readers under the address, undefined-behaviour and thread sanitizers: damaged
files end as in Python, and no file makes them do what C++ leaves undefined.

``make fuzz MINUTES=10`` tries others until the time is over, with clang's libFuzzer where that is.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from quest_deploy.artifacts.workspace import GRAPH, MANIFEST, Workspace
from quest_deploy.backends.base import ENGINE_FILE, changed_files, engine_info
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.errors import InputError
from quest_deploy.files import read_json, sealed, sha256_of, sha256_of_json, write_json
from quest_deploy.serving.schedule import FORMAT, VERSION, Schedule, ScheduleStep
from tests.faults.damage import changed, damage, restore
from tests.trt_plugins.conftest import INCLUDES, RTX, RUNTIME

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
PART_SECONDS = 60 * MINUTES / 8
"""For each of four kinds of files, damaged and under the fuzzer."""
TRIES, MUTATIONS = 60, 300
"""Damages of each kind, and mutations of each reader's, that `make test` tries."""
MEMORY_MB, SECONDS = 1024, 120
PARTS = ("json", "sha256", "files", "workspace", "schedule")
STRICT = "-fno-sanitize-recover=all"
Readers = Callable[..., subprocess.CompletedProcess[str]]


def compiled(config: pytest.Config, compiler: str, flags: str) -> Readers:
    """``tests/readers.cpp`` with what it reads by, ready to run; kept in pytest's cache until a
    source changes.
    """
    sources = [RUNTIME / "tests" / "readers.cpp"]
    sources += [RUNTIME / "src" / f"{part}.cpp" for part in PARTS]
    key = hashlib.sha256(f"{compiler} {flags}".encode())
    for path in (*sources, *RUNTIME.glob("src/*.h"), *RUNTIME.glob("include/*/*.h")):
        key.update(path.read_bytes())
    program = config.cache.mkdir("readers") / key.hexdigest()  # type: ignore[union-attr]
    if not program.exists():
        line = [compiler, "-std=c++17", "-g1", "-O1", "-pthread", *flags.split(), *INCLUDES]
        subprocess.run([*line, *sources, "-o", program.with_suffix(".new")], check=True)
        program.with_suffix(".new").rename(program)

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS + 60 * MINUTES,
            env={**os.environ, "ASAN_OPTIONS": f"hard_rss_limit_mb={MEMORY_MB}", **environment},
        )

    return run


@pytest.fixture(scope="session")
def readers(request: pytest.FixtureRequest) -> Readers:
    """The readers under the address and undefined-behaviour sanitizers."""
    return compiled(request.config, "g++", f"-fsanitize=address,undefined {STRICT}")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        folder: of a sound example; not to be changed.
        read: what Python finds in such a folder, as the program prints it.
        file: what is damaged there.
    """

    folder: Path
    read: Callable[[Path], str]
    file: str


def show_json(folder: Path) -> str:
    value = read_json(folder / "value.json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def show_manifest(folder: Path) -> str:
    """The model, and of each backend the engine that fits the workspace."""
    workspace = Workspace.open(folder)
    found = [workspace.model]
    for backend in ("tensorrt", RTX):
        files = {
            path: entry["sha256"]
            for stage in ("export", f"build-engine/{backend}")
            if stage in workspace.stages
            for path, entry in workspace.stages[stage].files.items()
        }
        place = folder / "engines" / backend
        if not place.exists():
            found.append("none")
            continue
        record = engine_info(place)
        wanted = {
            f"engines/{backend}/{ENGINE_FILE}": sha256_of(place / ENGINE_FILE),
            f"engines/{backend}/{ENGINE}": record.files[ENGINE],
            GRAPH: record.graph_sha256,
        }
        found.append(record.files[ENGINE] if wanted.items() <= files.items() else "none")
    return " ".join(found)


def show_engine(folder: Path) -> str:
    record = engine_info(folder)
    if record.backend not in ("tensorrt", RTX) or record.options.strip_plan or not record.runtime:
        raise InputError("for another runtime")
    capabilities = record.hardware.get("compute_capabilities")
    if not isinstance(capabilities, list) or not all(isinstance(x, str) for x in capabilities):
        raise InputError("built for nothing that is known")
    if ENGINE not in record.files or ENGINE in changed_files(folder, record):
        raise InputError("another plan")
    options, plugin = record.options, record.plugin
    budget = options.weight_streaming_budget
    found = [
        record.backend,
        record.runtime.version,
        record.graph_sha256,
        options.hardware_compatibility_level or "none",
        int(options.version_compatible),
        int(options.weight_streaming),
        -1 if budget is None else budget,
        plugin.library if plugin and not plugin.serialized else "",
        plugin.sha256 if plugin and not plugin.serialized else "",
        record.files[ENGINE],
        (folder / ENGINE).stat().st_size,
        *capabilities,
    ]
    return " ".join(map(str, found))


def show_schedule(folder: Path) -> str:
    """As the schedule's format has it: the package itself only writes it."""
    content = read_json(folder / "schedule.json")
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise InputError("no schedule")
    if content.pop("sha256", None) != sha256_of_json(content):
        raise InputError("edited")

    def numbers(*values: float) -> str:
        return " ".join(f"{np.float32(value):.9g}" for value in values)

    lines = [numbers(content["init_noise_sigma"])]
    for step in content["steps"]:
        scales = [step[key] for key in ("sample_scales", "prediction_scales")]
        alone = numbers(step["timestep"], step["input_scale"], step["noise_scale"])
        lines.append(" : ".join([alone, *(numbers(*each) for each in scales)]))
    return " | ".join(lines)


STEPS = (
    ScheduleStep(980.5, 1.0, (1.0,), (-0.1,), 0.25),
    ScheduleStep(481.0, 0.5, (0.75, 1e-7), (-0.1, 3.0), 0.0),
)
VALUE = {
    "numbers": [0, -1, 0.1, 1e-7, 1.5e300, 2**53, -0.0, 1e15, 123456789.125, 1e16, 10**30, 1e-320],
    "Grüße 🙂": {"a": [[], {}], "b": [None, True, False], "ab": '\u2028\x00\\"/'},
}


@pytest.fixture(scope="module")
def kinds(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """By the name that the program knows."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "value.json").write_text(json.dumps(VALUE))
    Schedule("Euler", 14.6, STEPS).save(folder / "schedule.json")
    return {
        "json": Kind(folder, show_json, "value.json"),
        "manifest": Kind(built, show_manifest, MANIFEST),
        "engine": Kind(built / "engines" / RTX, show_engine, ENGINE_FILE),
        "schedule": Kind(folder, show_schedule, "schedule.json"),
    }


def copies(kind: Kind, where: Path, count: int) -> list[Path]:
    """Folders like ``kind``'s, whose file may be changed."""
    found = [where / str(i) for i in range(count)]
    for folder in found:
        folder.mkdir(parents=True)
        for path in kind.folder.iterdir():
            (folder / path.name).symlink_to(path)
        restore(folder / kind.file, kind.folder / kind.file)
    return found


def python_reads(kind: Kind, folder: Path) -> str:
    try:
        return f"read {kind.read(folder)}"
    except InputError:
        return "refused"


def cpp_reads(readers: Readers, name: str, folders: list[Path], command: str = "show") -> list[str]:
    """What the program prints of each folder; neither it nor a sanitizer may end it."""
    ended = readers(name, command, *folders)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr[-4000:]
    return ended.stdout.split("\n")[:-1]


@pytest.mark.parametrize("name", ["json", "manifest", "engine", "schedule"])
def test_a_damaged_file_is_refused_or_read_as_python_does(
    readers: Readers, kinds: dict[str, Kind], tmp_path: Path, name: str
) -> None:
    kind, first = kinds[name], int(time.time()) if MINUTES else 0
    sound = f"read {kind.read(kind.folder)}"
    deadline, counts = time.monotonic() + PART_SECONDS, Counter[str]()
    while not counts or time.monotonic() < deadline:
        folders = copies(kind, tmp_path / str(first), TRIES)
        done = [damage(folder / kind.file, first + i) for i, folder in enumerate(folders)]
        lines = cpp_reads(readers, name, folders)
        for i, (folder, line) in enumerate(zip(folders, lines, strict=True)):
            expected = python_reads(kind, folder)
            what = f"{done[i]} (seed {first + i})"
            if expected == "refused":
                assert line.startswith("refused "), what
                assert name == "json" or str(folder / kind.file) in line, what
            else:
                assert line == expected, what
                assert name == "json" or line == sound, what
            counts[expected.split(maxsplit=1)[0]] += 1
        shutil.rmtree(tmp_path / str(first))
        first += TRIES
    print(dict(counts))
    assert counts["refused"] > 0
    assert name != "json" or counts["read"] > 0


TEXTS = {
    "refused": [
        b'{"a": 1, "b": {"c": 1, "c": 1}}',
        b"[1e400]",
        b"[-1e400]",
        b"[NaN]",
        b'["\\ud800"]',
        b'["\\udc00\\ud800"]',
        b'{"\\ud83d": 1}',
        b'["\xed\xa0\x80"]',
        b'["\xff"]',
        '["a"]'.encode("utf-16"),
        '["a"]'.encode("utf-32-le"),
        b"[" * 2000 + b"]" * 2000,
        b"[1] 2",
        b"",
    ],
    "read": [
        b"\xef\xbb\xbf[1]",
        b'["\\ud83d\\ude42", "\\uD83D\\uDE42"]',
        b"[1E5, 100000.0, 1.50, 0.1e1, 1e16, 1e15, 9007199254740993.0, 5e-324, 1e-400]",
        b"[0.0001, 0.00001, 123456.789e3, 1e22, 1e23, 2.5e-5]",
        b"[-0, -0.0, 0e10, 18446744073709551616, -9223372036854775809]",
        b' {"b": [], "a": {}, "\\u0000": null} ',
    ],
}
"""What readers of JSON are known to read differently."""


@pytest.mark.parametrize("expected", TEXTS)
def test_json_that_readers_take_for_different_things_is_refused_or_the_same_to_both(
    readers: Readers, tmp_path: Path, expected: str
) -> None:
    folders = [tmp_path / str(i) for i in range(len(TEXTS[expected]))]
    for folder, text in zip(folders, TEXTS[expected], strict=True):
        folder.mkdir()
        (folder / "value.json").write_bytes(text)
    kind = Kind(tmp_path, show_json, "value.json")
    lines = cpp_reads(readers, "json", folders)
    for folder, line, text in zip(folders, lines, TEXTS[expected], strict=True):
        assert line.startswith(f"{expected} "), text
        found = python_reads(kind, folder)
        assert found == (line if expected == "read" else "refused"), text


@pytest.mark.parametrize("name", ["manifest", "engine", "schedule"])
def test_a_forged_file_that_both_read_says_the_same_to_both(
    readers: Readers, kinds: dict[str, Kind], tmp_path: Path, name: str
) -> None:
    kind = kinds[name]
    folders = copies(kind, tmp_path, TRIES)
    for seed, folder in enumerate(folders):
        content = read_json(folder / kind.file)
        del content["sha256"]
        forged = changed(content, random.Random(seed))
        write_json(folder / kind.file, sealed(forged))
    both = 0
    for seed, (folder, line) in enumerate(
        zip(folders, cpp_reads(readers, name, folders), strict=True)
    ):
        if name == "schedule":  # of which the oracle knows no more than its form
            both += line.startswith("read ")
            continue
        expected = python_reads(kind, folder)
        if expected != "refused" and line.startswith("read "):
            assert line == expected, f"seed {seed}"
            both += 1
    assert 0 < both < TRIES


@pytest.mark.parametrize("name", ["json", "manifest", "engine", "schedule"])
def test_mutations_of_files_with_and_without_their_right_hash_harm_nothing(
    readers: Readers, kinds: dict[str, Kind], name: str
) -> None:
    kind = kinds[name]
    ended = readers(name, "mutate", 1, MUTATIONS, kind.folder / kind.file)
    assert ended.returncode == 0, ended.stderr[-4000:]
    runs, read = (int(word) for word in ended.stdout.split() if word.isdigit())
    assert runs == MUTATIONS
    assert 0 < read < runs or name in ("manifest", "engine")  # what has to fit other files


@pytest.mark.parametrize(
    ("text", "defect"),
    [("[beyond the end", "heap-buffer-overflow"), ("zzzzzzzz", "signed integer overflow")],
)
def test_the_sanitizers_see_a_planted_defect(
    readers: Readers, tmp_path: Path, text: str, defect: str
) -> None:
    (tmp_path / "planted.txt").write_text(text)
    ended = readers("planted", "show", tmp_path)
    assert ended.returncode != 0
    assert defect in ended.stderr


def test_mutations_find_a_planted_defect_that_their_file_does_not_have(
    readers: Readers, tmp_path: Path
) -> None:
    (tmp_path / "planted.txt").write_text("ab")
    assert readers("planted", "show", tmp_path).returncode == 0
    ended = readers("planted", "mutate", 1, MUTATIONS, tmp_path / "planted.txt")
    assert ended.returncode != 0
    assert "readers.cpp" in ended.stderr


@pytest.mark.slow
def test_several_threads_read_at_once_without_a_race(
    request: pytest.FixtureRequest, kinds: dict[str, Kind], tmp_path: Path
) -> None:
    threads = compiled(request.config, "g++", "-fsanitize=thread")
    for name, kind in kinds.items():
        lines = cpp_reads(threads, name, [kind.folder] * 5, "threads")
        assert lines == [f"read {kind.read(kind.folder)}"] * 5
    (tmp_path / "planted.txt").write_text("ab")
    ended = threads("planted", "threads", tmp_path)
    assert ended.returncode != 0
    assert "data race" in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang, for its libFuzzer")
def test_a_fuzzer_guided_by_coverage_finds_no_defect_but_the_planted_one(
    request: pytest.FixtureRequest, kinds: dict[str, Kind], tmp_path: Path
) -> None:
    flags = f"-DQUEST_LIBFUZZER -fsanitize=fuzzer,address,undefined {STRICT}"
    fuzzer, seconds = compiled(request.config, "clang++", flags), int(PART_SECONDS) or 5

    def fuzz(name: str, seed: Path) -> subprocess.CompletedProcess[str]:
        corpus = tmp_path / name
        corpus.mkdir()
        shutil.copy(seed, corpus)
        # The sanitizer bounds what is resident: libFuzzer reads the peak, and a process starts with
        # the peak of the one that forked it.
        limits = [f"-max_total_time={seconds}", "-rss_limit_mb=0", "-timeout=10"]
        limits += [f"-malloc_limit_mb={MEMORY_MB}"]
        found = f"-artifact_prefix={tmp_path}/found-"
        scratch = {"QUEST_READER": name, "TMPDIR": str(tmp_path)}
        return fuzzer(corpus, "-seed=1", found, *limits, **scratch)

    for name, kind in kinds.items():
        ended = fuzz(name, kind.folder / kind.file)
        assert ended.returncode == 0, ended.stderr[-4000:]
        print(name, ended.stderr.strip().splitlines()[-1])
    (tmp_path / "planted.txt").write_text("ab")
    assert fuzz("planted", tmp_path / "planted.txt").returncode != 0
    assert list(tmp_path.glob("found-*"))
