"""Runs the tests and benchmarks of the kernels in a few minutes, the most valuable first.

    tests/gpu/validate.sh --seconds 560

Each step has a limit and processes of its own, so a kernel that hangs or faults costs a step, not
the run. A further call goes on where the last one stopped, unless what is tested has changed.
README.md says what comes out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from .steps import ROOT, Command, Setting, Step

TESTED = ("onepass_trl", "csrc/cuda", "tests", "benchmarks")
VALIDATED = ROOT / "onepass_trl" / "attention" / "validated.json"
LEAST = 10.0  # seconds: with fewer left no step begins
SLOWER = 3  # is a CPU in a dry run
# What comes back from a lent machine is a few files: these, and an archive of all.
BENCHMARKS = ("attention", "portable", "steps")
ARCHIVE = "everything.tgz"


class Process:
    """A command, started again as long as it gets further; its output is in a file."""

    def __init__(self, command: Command, log: Path) -> None:
        self.command = command
        self._log = log
        self._start()

    def _start(self) -> None:
        self._before = self._progress()
        with self._log.open("ab") as output:
            # A group of its own, to be ended with all that it starts.
            self._process = subprocess.Popen(
                self.command.argv,
                cwd=ROOT,
                env=os.environ | self.command.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def _progress(self) -> bytes | None:
        path = self.command.progress
        return path.read_bytes() if path is not None and path.exists() else None

    def status(self) -> int | None:
        """Return the exit status; None while it runs or has been started again."""
        status = self._process.poll()
        if status in (None, 0):
            return status
        progress = self._progress()
        is_finished = progress is None or json.loads(progress).get("finished", False)
        if is_finished or progress == self._before:
            return status
        self._start()
        return None

    def end(self) -> None:
        """End the process and all that it has started, and wait for that, but not for ever."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):  # the driver may hold it
                    self._process.wait(5)


class Run:
    """The steps of a run: their outcomes are written before and after each."""

    def __init__(self, setting: Setting, out: Path | None, deadline: float) -> None:
        self._setting, self._out, self._deadline = setting, out, deadline
        self._folder = setting.results
        self._summary_path = self._folder / "summary.json"
        self._digest = digest()
        self._outcomes: dict[str, dict[str, Any]] = {}
        if self._summary_path.exists():
            summary = json.loads(self._summary_path.read_text())
            if summary["tested"] == self._digest and summary["dry_run"] == setting.is_dry:
                self._outcomes = summary["steps"]
            else:
                print("what is tested has changed: from the start", flush=True)
                shutil.rmtree(self._folder)
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)

    def all(self) -> bool:
        """Run what is left to run, while there is time; return whether all has passed."""
        steps = self._setting.steps()
        if (self._folder / VALIDATED.name).exists():  # the repository may have been copied again
            shutil.copy(self._folder / VALIDATED.name, VALIDATED)
        self._save()
        for _ in range(2):  # the second time, what can go on after its limit
            attempted: set[str] = set()
            while self._left() >= LEAST:
                waiting = (s for s in steps if self._waits(s) and s.name not in attempted)
                if (step := next(waiting, None)) is None:
                    break
                attempted.add(step.name)
                self._run(step)
        done = Counter(outcome["status"] for outcome in self._outcomes.values())
        print(f"== {dict(done)}; {sum(map(self._waits, steps))} steps wait for a further call")
        return done["passed"] + done["skipped"] == len(self._outcomes)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _waits(self, step: Step) -> bool:
        if (cause := step.only_after_failure_of) is not None:
            failed = self._outcomes.get(cause, {}).get("status") not in (None, "passed")
            if not failed:
                return False
        status = self._outcomes.get(step.name, {}).get("status")
        goes_on = any(command.progress is not None for command in step.commands)
        again = status == "timed out" and goes_on
        return again or status in (None, "interrupted", "out of time")

    def _run(self, step: Step) -> None:
        if step.skipped is not None:
            print(f"== {step.name}: skipped, {step.skipped}", flush=True)
            self._record(step, status="skipped", why=step.skipped)
            return
        own = step.limit * (SLOWER if self._setting.is_dry else 1)
        limit = min(own, self._left())
        print(f"== {step.name}: at most {limit:.0f} of {self._left():.0f} s", flush=True)
        self._record(step, status="interrupted")  # until it is known better
        begin = time.monotonic()
        logs = {c.name: self._folder / "logs" / f"{c.name}.log" for c in step.commands}
        processes = [Process(command, logs[command.name]) for command in step.commands]
        codes: dict[str, int | None] = {}
        try:
            while time.monotonic() - begin < limit:
                codes = {process.command.name: process.status() for process in processes}
                if None not in codes.values():
                    break
                time.sleep(0.1)
        finally:
            for process in processes:
                process.end()
        counted = [codes.get(command.name) for command in step.commands if command.counts]
        if None in counted:
            status = "timed out" if limit == own else "out of time"
        else:
            status = "failed" if any(counted) else "passed"
        if step.name == "record" and status == "passed":
            shutil.copy(VALIDATED, self._folder)
        seconds = round(time.monotonic() - begin, 1)
        for command in step.commands:
            _print_end(logs[command.name])
        print(f"== {step.name}: {status} after {seconds} s {codes}", flush=True)
        self._record(step, status=status, seconds=seconds, exit_codes=codes)

    def _record(self, step: Step, **outcome: Any) -> None:
        self._outcomes[step.name] = outcome
        self._save()

    def _save(self) -> None:
        """Write the outcomes so far, and copy what comes back."""
        self._write_json(
            "summary.json",
            {
                "tested": self._digest,
                "commit": os.environ.get("ONEPASS_COMMIT"),
                "dry_run": self._setting.is_dry,
                "steps": self._outcomes,
            },
        )
        self._collect()

    def _collect(self) -> None:
        """Copy what the steps have written into the few files that come back."""
        parity = [path for path in self._setting.parity_results() if path.exists()]
        self._write_json("parity.json", merged([json.loads(path.read_text()) for path in parity]))
        for name in BENCHMARKS:
            for path in (self._folder / name).glob("*.json"):
                shutil.copy(path, self._folder / f"{name}.json")
        if self._out is None:
            return
        names = ("summary", "parity", "validated", *BENCHMARKS)
        for path in (self._folder / f"{name}.json" for name in names):
            if path.exists():
                shutil.copy(path, self._out)
        with tarfile.open(self._out / ARCHIVE, "w:gz") as archive:
            for pattern in ("*.json", "logs/*"):
                for path in sorted(self._folder.glob(pattern)):
                    archive.add(path, path.relative_to(self._folder))

    def _write_json(self, name: str, content: Any) -> None:
        draft = self._folder / f"{name}.part"
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(self._folder / name)


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of several processes of the tests as those of one.

    Each kernel was tested by one of them.
    """
    if not records:
        return {}
    counted = [kernel for record in records for kernel in record["kernels"]]
    return {
        **{name: records[0][name] for name in ("device", "capability", "torch", "source")},
        "finished": all(record["finished"] for record in records),
        "kernels": [kernel for kernel in counted if kernel["passed"] or kernel["failed"]],
        "messages": {k: v for record in records for k, v in record["messages"].items()},
    }


def digest() -> str:
    """Return a digest of all that a step's outcome depends on."""
    found = hashlib.sha256()
    for folder in TESTED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", ".so", ".cu", ".cuh", ".h", ".cpp"):
                found.update(f"{path.relative_to(ROOT)}\0".encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def _print_end(log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(f"   {line[:160]}" for line in lines[-12:]), flush=True)


def _stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=560, help="no step runs for longer")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "validate")
    parser.add_argument("--carried", type=Path, default=ROOT / "build" / "carried")
    parser.add_argument(
        "--parity-limit",
        type=int,
        default=Setting.parity_limit,
        metavar="SECONDS",
        help="of one test of test_parity.py",
    )
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, _stop)
    commit = args.carried / "commit"
    if commit.exists():
        os.environ.setdefault("ONEPASS_COMMIT", commit.read_text().strip())
    setting = Setting(
        args.results.absolute(), args.carried.absolute(), args.dry_run, args.parity_limit
    )
    out = os.environ.get("OUT")
    return 0 if Run(setting, None if out is None else Path(out), deadline).all() else 1


if __name__ == "__main__":
    sys.exit(main())
