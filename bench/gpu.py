"""All checks that need a GPU, in at most eight minutes.

    make gpu                                      # with torch and CUDA as they are installed
    python -m bench.gpu --device cpu --short      # a rehearsal of the same parts without a GPU

Parts run one after another, each in a process of its own with a time limit, so that a part that
hangs or crashes does not take the others with it. Time that a part leaves is added to the next
one. The files with tests marked ``gpu`` run side by side. Packages in the folder ``wheels`` are
installed first, for machines without a network; libraries that are missing are named gaps.

Tables lie in the folder of the machine in bench/results/speed/, outcomes and output beside them in
gpu.md and gpu.log. If the variable OUT names a folder, they are copied there, with an archive of
all cells and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import table

ROOT = Path(__file__).parents[1]
# Leaves twenty seconds to start, to stop processes and to pack results.
LIMIT = 460.0

_MACHINE = """
from bench.speed.__main__ import PACKAGES
from bench.speed.cells import about
from bench.speed.machine import slug, title
for name, value in about(PACKAGES).items():
    print(f"{name}: {value}")
print("folder:", slug(title()))
"""
_CELLS: dict[str, tuple[float, list[str]]] = {
    "product": (65, ["mlp-small", "mlp-wide", "gpt", "resnet20", "vit", "llama", "stories260k"]),
    "block": (60, ["mlp-small", "mlp-wide", "gpt", "resnet20", "vit", "llama"]),
    "ggn": (55, ["mlp-small", "mlp-wide", "gpt", "resnet20", "vit", "llama"]),
    "eigenpairs": (45, ["mlp-small", "mlp-wide", "resnet20"]),
    "memory": (45, ["mlp-wide", "gpt"]),
}
# Characters of the output of a part that failed.
_TAIL = 2000
_UNUSABLE = """
This Python cannot run the benchmarks on the device. It needs torch that sees the GPU, and the
packages that hessfunc needs. Without a network, bring a missing one as a wheel:

    python3 -m pip download --no-deps --only-binary=:all: --dest wheels optree
"""
# Seconds to wait for a process that was killed.
_LEFT_OPEN = 2
# Pytest's status 5: a library that the whole file needs is not installed.
_VERDICTS = {0: "done", 5: "skipped"}


@dataclass(frozen=True)
class Part:
    """A command with a time limit.

    Attributes:
        name: Name of the part.
        seconds: Limit, to which the time that earlier parts left is added.
        command: Command and its arguments.
        cells: Number of cells that it measures.
    """

    name: str
    seconds: float
    command: Sequence[str]
    cells: int = 0


@dataclass(frozen=True)
class Outcome:
    """The end of a part.

    Attributes:
        part: The part.
        verdict: "done", "skipped", "failed", "stopped" at its limit, or "not reached".
        seconds: Time that it took.
        note: Summary of its output.
        output: Everything that it printed.
    """

    part: Part
    verdict: str
    seconds: float = 0.0
    note: str = ""
    output: str = ""


def gpu_tests(tests: Path) -> list[Path]:
    """Return the files with tests marked ``gpu``."""
    marked = re.compile(r"^\s*@?pytest\.mark\.gpu|^pytestmark = .*mark\.gpu", re.MULTILINE)
    return [path for path in sorted(tests.rglob("test_*.py")) if marked.search(path.read_text())]


def groups(device: str, results: Path, *, short: bool = False) -> list[list[Part]]:
    """Return the parts; those of a group run side by side.

    Args:
        device: Device to measure.
        results: Folder in which the folder of the machine lies.
        short: Measure the first net of each question only, with little effort.
    """
    test = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider"]
    # Other versions than the pinned ones warn of other things, and not all plugins are there.
    test += ["-W", "default", "-o", "addopts=--import-mode=importlib"]
    speed = [sys.executable, "-m", "bench.speed", "--device", device, "--into", str(results)]
    effort = ["--seconds", "0.2", "--rounds", "1"] if short else ["--seconds", "2", "--rounds", "3"]
    tests = [
        Part(f"tests: {path.relative_to(ROOT / 'tests')}", 85, [*test, str(path)])
        for path in gpu_tests(ROOT / "tests")
    ]
    measured = []
    for question, (seconds, nets) in _CELLS.items():
        cells = [f"{question}/{net}" for net in (nets[:1] if short else nets)]
        command = [*speed, "--again", *effort, *cells]
        measured.append([Part(question, seconds, command, len(cells))])
    return [
        [Part("machine", 75, [sys.executable, "-c", _MACHINE])],
        tests,
        *measured,
        [Part("tables", 20, [*speed, "--tables"])],
    ]


def seconds_of(group: Sequence[Part]) -> float:
    """Return the limit of parts that run side by side."""
    return max((part.seconds for part in group), default=0.0)


def run(
    planned: Sequence[Sequence[Part]],
    environment: Mapping[str, str],
    limit: float = LIMIT,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Run the parts, and yield the outcome of each.

    Args:
        planned: Groups of parts.
        environment: Variables of the processes.
        limit: Seconds for all of them.
        clock: Seconds.
    """
    end = clock() + limit
    later = sum(map(seconds_of, planned))
    for group in planned:
        later -= seconds_of(group)
        until = end - later
        if until <= clock():
            yield from (Outcome(part, "not reached") for part in group)
        else:
            yield from _side_by_side(group, environment, until, clock)


def _side_by_side(
    group: Sequence[Part],
    environment: Mapping[str, str],
    until: float,
    clock: Callable[[], float],
) -> Iterator[Outcome]:
    start = clock()
    with contextlib.ExitStack() as stack:
        running = []
        for part in group:
            output = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # A process group of its own ends together with its children.
                start_new_session=True,
            )
            running.append((part, process, output))
        for part, process, output in running:
            verdict = _verdict(process, max(until - clock(), 0.0))
            seconds = clock() - start
            output.seek(0)
            text = output.read()
            yield Outcome(part, verdict, seconds, _note(part, text), text)


def _verdict(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        return _VERDICTS.get(process.wait(seconds), "failed")
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that hangs in the driver cannot be killed, and is left alone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LEFT_OPEN)


def _note(part: Part, text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if part.cells:
        measured = re.findall(r"^\S+/\S+ \(\d+ s\): .* \d+\.\d\d$", text, re.MULTILINE)
        missing = dict.fromkeys(re.findall(r"^  ([^:]+): not installed", text, re.MULTILINE))
        without = f"; not installed: {'; '.join(missing)}" if missing else ""
        return f"{len(measured)} of {part.cells} cells{without}"
    return lines[-1].strip("= ") if lines else ""


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [["part", "outcome", "seconds", ""]]
    rows += [[o.part.name, o.verdict, f"{o.seconds:.0f}", o.note] for o in outcomes]
    return table(rows)


def _environment(device: str, site: Path) -> dict[str, str]:
    """Return the variables of the parts, and install the wheels that were brought."""
    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*pip, "--no-compile", "--target", str(site), *wheels], timeout=30)
    paths = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HESSFUNC_BENCH_DEVICE": device,
    }


def _publish(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write outcomes and output to the folder of the machine, and copy them to OUT."""
    folder.mkdir(parents=True, exist_ok=True)
    about = outcomes[0].output.strip().splitlines()
    parts = ["# Checks on a GPU", ", ".join(about), _table(outcomes)]
    (folder / "gpu.md").write_text("\n\n".join(parts) + "\n")
    (folder / "gpu.log").write_text("".join(f"## {o.part.name}\n\n{o.output}\n" for o in outcomes))
    out = os.environ.get("OUT")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        for name in ("gpu.md", "gpu.log", "speed.md"):
            if (folder / name).exists():
                shutil.copy(folder / name, out)
        with tarfile.open(Path(out) / "results.tar.gz", "w:gz") as archive:
            archive.add(folder, arcname=folder.name)


def main() -> int:
    """Run all parts, and return the exit status."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description="All checks that need a GPU.")
    parser.add_argument("--device", default="cuda", help="Device to measure.")
    parser.add_argument("--short", action="store_true", help="Measure the smallest net only.")
    parser.add_argument("--into", type=Path, default=ROOT / "bench" / "results" / "speed")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as site:
        environment = _environment(options.device, Path(site))
        planned = groups(options.device, options.into.resolve(), short=options.short)
        outcomes: list[Outcome] = []
        folder = options.into
        for outcome in run(planned, environment, LIMIT - (time.monotonic() - start)):
            outcomes.append(outcome)
            print(_line(outcome), flush=True)
            if outcome.part.name == "machine":
                if outcome.verdict != "done":
                    print(outcome.output + _UNUSABLE, file=sys.stderr)
                    return 1
                folder = options.into / outcome.note.removeprefix("folder: ")
            _publish(outcomes, folder)
    for outcome in outcomes:
        if outcome.verdict == "failed":
            print(f"\n## {outcome.part.name}\n{outcome.output[-_TAIL:]}")
    print(f"\n{_table(outcomes)}\n{folder}")
    return int(any(outcome.verdict not in _VERDICTS.values() for outcome in outcomes))


def _line(outcome: Outcome) -> str:
    return f"{outcome.part.name}: {outcome.verdict} in {outcome.seconds:.0f} s, {outcome.note}"


if __name__ == "__main__":
    sys.exit(main())
