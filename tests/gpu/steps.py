"""What is run on a GPU machine that is lent for minutes, in the order of what would hurt most to
lack. Nothing is imported here that could fail there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARITY_PROCESSES = 4
SMOKE = "test_every_option or test_random_trees"
PEERS = (
    "onepass cuda",
    "onepass cuda, same bits",
    "onepass varlen",
    "flex",
    "sdpa causal cuDNN",
    "sdpa causal FA2",
)
PEERS_IN_A_DRY_RUN = ("onepass cpu", "sdpa causal")


@dataclass(frozen=True)
class Command:
    """A process of a step."""

    name: str
    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    progress: Path | None = None
    """A file that the process writes as it goes. If it ends early, another one goes on from there,
    as long as each gets any further."""
    counts: bool = True
    """Whether its failure is the step's."""


@dataclass(frozen=True)
class Step:
    """Something to learn from the machine: commands that run at the same time."""

    name: str
    limit: float
    """Seconds."""
    commands: Sequence[Command]
    skipped: str | None = None
    """Why it can't run here."""
    only_after_failure_of: str | None = None


@dataclass(frozen=True)
class Setting:
    """Where a run reads and writes, and whether it is a dry run on the CPU."""

    results: Path
    carried: Path
    """What `make carried` makes: wheels, and what `onepass-trl bench` is run on."""
    is_dry: bool
    parity_limit: int = 60
    """Seconds of a test of `test_parity.py`, which compiles nothing."""

    def steps(self) -> list[Step]:
        """Return all steps."""
        smoke = "bfloat16-64-64" if self.is_dry else "bfloat16-128-128"
        smoke_test = self._pytest("smoke", "test_parity.py", "-k", SMOKE, "--kernels", smoke)
        portable = {"ONEPASS_CUDA_FAMILY": "sm80"}
        no_sanitizer, no_ncu = self._lacks("compute-sanitizer"), self._lacks("ncu")
        wheels = sorted(map(str, (self.carried / "wheels").glob("*.whl")))
        no_trl, known = None, "TRL is installed"
        if importlib.util.find_spec("trl") is None:
            known = None
            no_trl = None if wheels else f"{self.carried} has no wheels: run `make carried`"
        carried = wheels if known is None else []
        no_fla, no_mamba = (
            self._lacks_kernels(module, name, carried)
            for module, name in (("fla", "fla_core"), ("mamba_ssm", "mamba_ssm"))
        )
        bench = self.carried / "bench"
        no_bench = None if bench.exists() else f"there is no {bench}: see README.md"
        return [
            Step("machine", 60, [self._machine()]),
            Step("smoke", 100, [smoke_test]),
            Step(
                "smoke_portable",
                60,
                [self._renamed(smoke_test, "smoke_portable", portable)],
                only_after_failure_of="smoke",
            ),
            Step(
                "smoke_memcheck",
                90,
                [replace(self._sanitized("memcheck"), name="smoke_memcheck")],
                no_sanitizer,
                only_after_failure_of="smoke",
            ),
            Step("parity", 200, [*self._parity(), self._compile_flex()]),
            Step("record", 15, [self._record()], "nothing runs on a GPU" if self.is_dry else None),
            Step("attention", 180, [self._attention("attention")]),
            Step("portable", 40, [self._attention("portable", "--cases", "causal", env=portable)]),
            Step("steps", 120, [self._bench("steps", "--only", "steps", "--models", "0.6B")]),
            Step("others", 150, self._others()),
            *(
                Step(tool, 75, [self._sanitized(tool)], no_sanitizer)
                for tool in ("memcheck", "racecheck", "synccheck")
            ),
            Step("ncu", 75, [self._profiled()], no_ncu),
            Step("wheels", 30, [self._install(wheels)], known or no_trl),
            Step("training", 100, [self._training()], no_trl),
            Step("conversations", 60, [self._conversations(bench)], no_trl or no_bench),
            Step("fla", 240, [self._fla()], no_fla),
            Step("linear", 200, [self._linear()], no_fla),
            Step("mamba", 150, [self._mamba()], no_mamba),
        ]

    def parity_results(self) -> list[Path]:
        """Return the files of results of the tests of every kernel."""
        return [command.progress for command in self._parity() if command.progress]

    def _lacks(self, tool: str) -> str | None:
        # In a dry run, what it would look at runs without it.
        return None if self.is_dry or shutil.which(tool) else f"there is no {tool} on the PATH"

    def _lacks_kernels(self, module: str, name: str, wheels: Sequence[str]) -> str | None:
        """Return why the kernels of a package can't run, whose wheel has this name."""
        if self.is_dry:
            return "its kernels need a GPU"
        has_wheel = any(f"/{name}-" in wheel for wheel in wheels)
        return None if has_wheel or importlib.util.find_spec(module) else f"{name} is not installed"

    def _python(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Command:
        dry = {"ONEPASS_TEST_GPU_DRY_RUN": "1"} if self.is_dry else {}
        return Command(name, (sys.executable, *arguments), dry | (env or {}))

    def _machine(self) -> Command:
        path = str(self.results / "machine.json")
        return self._python("machine", "-m", "tests.gpu.machine", path)

    def _pytest(self, name: str, file: str, *arguments: str) -> Command:
        command = self._python(
            name, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/{file}", *arguments
        )
        # The others compile, and Triton tries each kernel in many variants.
        limits = {"test_parity.py": self.parity_limit, "test_fla.py": 200, "test_mamba.py": 140}
        limit = str(limits.get(file, 100))
        env = {"ONEPASS_TEST_GPU_RESUME": "1", "ONEPASS_TEST_GPU_LIMIT": limit}
        return self._renamed(command, name, env)

    def _renamed(self, test: Command, name: str, env: dict[str, str]) -> Command:
        """Return a command of pytest under another name, so with other results."""
        progress = self.results / f"{name}.json"
        env = test.env | env | {"ONEPASS_TEST_GPU_RESULTS": str(progress)}
        return replace(test, name=name, env=env, progress=progress)

    def _fla(self) -> Command:
        command = self._pytest("fla", "test_fla.py")
        return replace(command, env=command.env | self._with_wheels())

    def _mamba(self) -> Command:
        command = self._pytest("mamba", "test_mamba.py")
        return replace(command, env=command.env | self._with_wheels())

    def _linear(self) -> Command:
        path = str(self.results / "linear.json")
        script = "benchmarks/gpu_linear.py"
        flags = ("--turns", "5", "20", "--json", path)
        return self._python("linear", script, *flags, env=self._with_wheels())

    def _parity(self) -> list[Command]:
        kernels = ["bfloat16-64-64"]
        if not self.is_dry:
            build = json.loads((ROOT / "onepass_trl" / "_cuda.json").read_text())
            kernels = [
                f"{dtype}-{d_qk}-{d_v}"
                for dtype in ("bfloat16", "float16")
                for d_qk, d_v in build["head_dims"]
            ]
        parts = [kernels[number::PARITY_PROCESSES] for number in range(PARITY_PROCESSES)]
        return [
            self._pytest(f"parity_{number}", "test_parity.py", "--kernels", ",".join(part))
            for number, part in enumerate(parts)
            if part
        ]

    def _others(self) -> list[Command]:
        """All other tests but those of packages: what takes long in processes of its own."""
        files = {name: f"test_{name}.py" for name in ("implementations", "self_check")}
        ignored = ["test_parity.py", "test_fla.py", "test_mamba.py", *files.values()]
        rest = [f"--ignore=tests/gpu/{file}" for file in ignored]
        commands = [self._pytest(name, file) for name, file in files.items()]
        return [*commands, self._pytest("integration", "", *rest, "-k", "not sanitizer")]

    def _record(self) -> Command:
        files = map(str, self.parity_results())
        return self._python("record", "tests/gpu/record_validation.py", *files)

    def _bench(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Command:
        progress = self.results / f"{name}_progress.json"
        given = ["--results", str(self.results / name), "--resume", str(progress), "--limit", "60"]
        given += ["--repeats", "10", "--step-repeats", "3", "--budget", "0.4"]
        given += ["--device", "cpu", "--tiny"] if self.is_dry else []
        command = self._python(name, "benchmarks/bench_gpu.py", *arguments, *given, env=env)
        return replace(command, progress=progress)

    def _attention(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Command:
        peers = PEERS_IN_A_DRY_RUN if self.is_dry else PEERS
        own = [peer for peer in peers if env is None or peer.startswith("onepass c")]
        return self._bench(name, "--only", "attention", *arguments, "--peers", *own, env=env)

    def _compile_flex(self) -> Command:
        """FlexAttention compiles while nothing is timed, into a cache of all processes."""
        peer = "onepass cpu" if self.is_dry else "flex"
        command = self._bench("compile_flex", "--only", "attention", "--peers", peer)
        return replace(command, counts=False)

    def _sanitized(self, tool: str) -> Command:
        launcher = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        command = self._python(tool, "-m", "tests.gpu.run_kernels", "small")
        # Each tensor is an allocation of its own, so that reading past its end is seen.
        env = command.env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return replace(self._under(launcher, command), env=env)

    def _profiled(self) -> Command:
        launcher = ("ncu", "--clock-control", "none", "--set", "full", "-c", "2")
        launcher += ("-k", "regex:forward_kernel|dq_dk_dv_kernel")
        command = self._python("ncu", "-m", "tests.gpu.run_kernels", "large")
        return self._under(launcher, command)

    def _under(self, launcher: Sequence[str], command: Command) -> Command:
        return command if self.is_dry else replace(command, argv=(*launcher, *command.argv))

    def _install(self, wheels: Sequence[str]) -> Command:
        options = ("--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", self._site)
        return self._python("wheels", "-m", "pip", "install", "-q", *options, *wheels)

    @property
    def _site(self) -> str:
        return str(self.results / "site")

    def _with_wheels(self) -> dict[str, str]:
        paths = (self._site, os.environ.get("PYTHONPATH", str(ROOT)))
        return {"PYTHONPATH": os.pathsep.join(paths)}

    def _training(self) -> Command:
        given = ["--steps", "1", "--turns", "2"] if self.is_dry else ["--steps", "40", "--bf16"]
        given += ["--json", str(self.results / "training.json")]
        program = "benchmarks/bench_loss_curves.py"
        return self._python("training", program, *given, env=self._with_wheels())

    def _conversations(self, bench: Path) -> Command:
        arguments = [str(bench / "conversations.jsonl"), "--model_name_or_path"]
        arguments += [str(bench / "model"), "--attention", "--packed"]
        arguments += ["-k", "2", "--repeats", "1"] if self.is_dry else ["-k", "20"]
        arguments += ["--peers", *(PEERS_IN_A_DRY_RUN if self.is_dry else PEERS)]
        arguments += ["--json", str(self.results / "conversations.json")]
        return self._python(
            "conversations", "-m", "onepass_trl.cli", "bench", *arguments, env=self._with_wheels()
        )
