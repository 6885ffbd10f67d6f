"""Runs a check in a process of its own: an untested kernel may hang it or bring it down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile

import torch

from onepass_trl.attention.self_check.verdicts import Verdict

TIME_LIMIT = 180.0
"""Seconds, most of which a first use takes to load torch, or to compile for a new device."""
BEGINS, ENDS = "self-check: case ", "self-check: verdict "
"""How the process marks what it prints: the case that comes next, and the verdict, in JSON."""
_MODULE = __package__
_LONGEST_END = 10.0  # seconds; a process may be stuck in the driver
# What launchers set. Nothing in the process asks who else there is.
_OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def check_in_process(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]
) -> Verdict:
    """Return what a check finds on a device of this process."""
    arguments = [str(device), str(dtype).removeprefix("torch."), *map(str, head_dims)]
    if device.type == "cuda":
        # Another process may number the devices otherwise, if this one has changed its environment.
        arguments.append(str(torch.cuda.get_device_properties(device).uuid))
    try:
        with tempfile.TemporaryFile() as output:
            status = _run([*_command(), *arguments], output.fileno())
            output.seek(0)
            said = output.read().decode(errors="replace")
    except OSError as error:
        return Verdict("not run", f"no process can be started: {error}")
    return _verdict(status, said.splitlines())


def _command() -> list[str]:
    # Not multiprocessing, which imports the main module again. -P: nothing from the working folder.
    return [sys.executable, "-P", "-m", _MODULE]


def _run(command: list[str], output: int) -> int | None:
    """Return the status of a process, None if it took too long, as `subprocess` has it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,  # no pipe, which a descendant could hold open
        stderr=output,
        env=_environment(),
        start_new_session=True,
    )
    try:
        return process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also when this process is interrupted
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_LONGEST_END)


def _environment() -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    # Modules are found where this process finds them.
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # A fault would reach all processes that share a device by CUDA's Multi-Process Service.
    environment["CUDA_MPS_PIPE_DIRECTORY"] = os.devnull
    return environment


def _verdict(status: int | None, lines: list[str]) -> Verdict:
    """Return what became of a process, by its status and what it printed."""
    cases = [line.removeprefix(BEGINS) for line in lines if line.startswith(BEGINS)]
    found = [line.removeprefix(ENDS) for line in lines if line.startswith(ENDS)]
    if status == 0 and found:
        return Verdict(*json.loads(found[-1]))
    if status is None:
        what = f"it took more than {TIME_LIMIT:.0f} seconds"
    elif status < 0:
        what = f"its process crashed ({signal.Signals(-status).name})"
    else:
        what = f"its process ended with status {status}: {lines[-1] if lines else 'no output'}"
    # Before the first case, and by a signal that comes from outside, it wasn't the kernel.
    if not cases or status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
        return Verdict("not run", what)
    return Verdict("failed", f"{what}, in: {cases[-1]}")
