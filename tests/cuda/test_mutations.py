"""The emulator finds mistakes: kernels that lack a barrier, a wait or a part of the mask fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import emulation

MUTATIONS = {
    "forward reads K that is not there": (
        "cuda/sm80/forward.cuh",
        "    wait_copies<0>();\n    sync_block();  // K has arrived",
        "    sync_block();  // K has arrived",
    ),
    "forward does not wait for the other warps' part of K": (
        "cuda/sm80/forward.cuh",
        "    sync_block();  // K has arrived, and every warp is done with the last V\n",
        "",
    ),
    "forward overwrites K that others still read": (
        "cuda/sm80/forward.cuh",
        "    sync_block();  // V has arrived, and every warp is done with K\n",
        "",
    ),
    "backward, fused, does not wait for its copies": (
        "cuda/sm80/fused_backward.cuh",
        "    wait_copies<0>();\n",
        "",
    ),
    "backward, fused, does not wait for the other warps' copies": (
        "cuda/sm80/fused_backward.cuh",
        "    sync_block();  // this tile has arrived, and every warp has added the last dq\n",
        "",
    ),
    "backward, fused, does not wait for the other warps' dS": (
        "cuda/sm80/fused_backward.cuh",
        "    sync_block();  // dS is complete, and every warp is done with dO\n",
        "",
    ),
    "backward, fused, overwrites Q that others still read": (
        "cuda/sm80/fused_backward.cuh",
        "    sync_block();  // every warp is done with Q, and this block may add to dq\n",
        "",
    ),
    "backward, fused, overwrites K that others still read": (
        "cuda/sm80/fused_backward.cuh",
        "  sync_block();  // every warp is done with K and dq\n",
        "",
    ),
    "only the first part of dk and dv is taken": (
        "cuda/gradients.h",
        "part < params.group_parts",
        "part < 1",
    ),
    "one of the last heads takes the blocks of all": (
        "cuda/plan.h",
        "apart + (index & ((1 << shift) - 1))",
        "apart",
    ),
    "partial tiles are taken for full ones": (
        "cuda/plan.h",
        " = ballot(covered == Coverage::full);",
        " = ballot(true);",
    ),
    "the walk of the keys ends a tile early": (
        "cuda/plan.h",
        "first_key <= last\n",
        "first_key + kKeys <= last\n",
    ),
    "Hopper forward gives K back before its product is done": (
        "cuda/sm90/forward.cuh",
        "      wait_products<1>();\n",
        "",
    ),
    "Hopper forward does not wait for V": (
        "cuda/sm90/forward.cuh",
        "    wait(memory.v_full(v.index), v.parity);\n",
        "",
    ),
    "Hopper forward does not wait for the next head's Q": (
        "cuda/sm90/forward.cuh",
        "    wait(memory.q_full(), i % 2);\n",
        "    wait(memory.q_full(), 0);\n",
    ),
    "Hopper forward does not give back the stage that ends a head": (
        "cuda/sm90/forward.cuh",
        "        give_back_k();\n        if constexpr",
        "        k.advance();\n        if constexpr",
    ),
    "Hopper forward judges both halves of the queries by the first": (
        "cuda/plan.h",
        "first_ + part * kOfPart",
        "first_",
    ),
    "Hopper forward masks nothing if one half of the queries sees all keys": (
        "cuda/sm90/forward.cuh",
        "    if (of_consumer(visit.full)) return;\n",
        "    if (visit.full != 0) return;\n",
    ),
    "Hopper forward masks with the ends of another tile": (
        "cuda/sm90/forward.cuh",
        "if (!of_consumer(visit.full)) ends",
        "if (!pending) ends",
    ),
    "Hopper forward does not take its turn for a tile that it does not see": (
        "cuda/sm90/forward.cuh",
        "        turns.wait_for_mine();\n        if (pending) start_values();\n"
        "        turns.pass_on();\n",
        "        if (pending) start_values();\n",
    ),
    "Hopper forward forgets the last tile when it does not see the next": (
        "cuda/sm90/forward.cuh",
        "        if (pending) start_values();\n",
        "        if (pending && is_end) start_values();\n",
    ),
    "Hopper forward adds the last tile again after one that it does not see": (
        "cuda/sm90/forward.cuh",
        "        pending = false;\n",
        "",
    ),
    "Hopper forward gives back V, which it does not see, before the other consumer's last": (
        "cuda/sm90/forward.cuh",
        "        wait(memory.v_full(v.index), v.parity);  //",
        "        //",
    ),
    "Hopper forward changes probabilities that are still read": (
        "cuda/sm90/forward.cuh",
        "    wait_products<0>();\n    hold(out[0]);\n",
        "    hold(out[0]);\n",
    ),
    "Hopper backward, fused, does not publish dS": (
        "cuda/sm90/fused_backward.cuh",
        "    publish_writes();\n    // Also",
        "    // Also",
    ),
    "Hopper backward, fused, does not wait for the other consumer's dS": (
        "cuda/sm90/fused_backward.cuh",
        "    sync_threads(1, kConsumerThreads);\n\n",
        "",
    ),
    "Hopper backward, fused, overwrites dS that is still read": (
        "cuda/sm90/fused_backward.cuh",
        "memory.scratch() + stage * Config::kDsBytes",
        "memory.scratch()",
    ),
    "Hopper backward, fused, overwrites dq that the copy engine still reads": (
        "cuda/sm90/fused_backward.cuh",
        "    wait(memory.dq_empty(), stage.index ^ 1);  // returns at once in the first round\n",
        "",
    ),
    "Hopper backward, fused, says too early that the copy engine has read dq": (
        "cuda/sm90/fused_backward.cuh",
        "      wait_read();\n",
        "",
    ),
    "Hopper backward, fused, adds dq before it is there": (
        "cuda/sm90/fused_backward.cuh",
        "    wait(memory.dq_full(), parity);\n",
        "",
    ),
    "Hopper backward, fused, does not publish dq": (
        "cuda/sm90/fused_backward.cuh",
        "    publish_writes();\n    release(memory.dq_full());\n",
        "    release(memory.dq_full());\n",
    ),
    "Hopper backward in order lets the next block add before it has added": (
        "cuda/sm90/fused_backward.cuh",
        "        wait_added();\n",
        "",
    ),
    "Hopper backward in order does not wait for its turn": (
        "cuda/sm90/fused_backward.cuh",
        "    if (in_order) order.wait_for_turn(step);\n",
        "",
    ),
    "backward in order does not wait for its turn": (
        "cuda/key_block.h",
        "      wait_until(block_.last, block_.before);\n",
        "",
    ),
    "backward in order lets the next block add before all warps have added": (
        "cuda/sm80/fused_backward.cuh",
        "    sync_block();  // this tile has arrived, and every warp has added the last dq\n"
        "    if (threadIdx.x == 0) order.end_turn();\n",
        "    if (threadIdx.x == 0) order.end_turn();\n"
        "    sync_block();  // this tile has arrived, and every warp has added the last dq\n",
    ),
    "backward in order keeps its last turn": (
        "cuda/sm80/fused_backward.cuh",
        "  if (threadIdx.x == 0) order.end_turn();\n  const int32_t",
        "  const int32_t",
    ),
    "backward in order waits for a block that does not add": (
        "cuda/key_block.h",
        "return end - first_bit(visiting);",
        "return end - first_bit(visiting) - 1;",
    ),
    "backward in order waits for itself": (
        "cuda/key_block.h",
        "const int32_t entry = end - 1 - threadIdx.x % 32;",
        "const int32_t entry = end - threadIdx.x % 32;",
    ),
    "backward in order lets blocks of two heads take turns with each other": (
        "cuda/key_block.h",
        "padded_index(params_, blockIdx.z, step.head, step.first)",
        "padded_index(params_, blockIdx.z, 0, step.first)",
    ),
    "the walk of the queries leaves out heads of a group": (
        "cuda/key_block.h",
        "head_ = block_.first_head;",
        "head_ = block_.end_head - 1;",
    ),
    "Hopper backward, fused, overwrites K that the other consumer still reads": (
        "cuda/sm90/fused_backward.cuh",
        "  sync_threads(1, kConsumerThreads);  // both are done with the kept tiles\n",
        "",
    ),
    "Hopper backward, fused, gives Q back before dk is done": (
        "cuda/sm90/fused_backward.cuh",
        "    wait_products<0>();\n    hold(dk[0]);\n",
        "",
    ),
    "Hopper backward describes the wrong tokens": (
        "cuda/sm90/tile.h",
        "Tile::kBlockBytes, 16 * k * kLineBytes",
        "Tile::kBlockBytes, 8 * k * kLineBytes",
    ),
}
# With wide heads the output goes through the queries' place, and dq has a launch of its own.
MUTATIONS_OF_WIDE_HEADS = {
    "backward does not wait for the other warps' copies": (
        "cuda/sm80/backward.cuh",
        "    sync_block();  // this stage has arrived\n",
        "",
    ),
    "backward overwrites a stage that others still read": (
        "cuda/sm80/backward.cuh",
        "    sync_block();  // every warp is done with this stage\n",
        "",
    ),
    "backward waits for one group of copies too few": (
        "cuda/sm80/backward.cuh",
        "wait_copies<Config::kStages - 1>();",
        "wait_copies<Config::kStages>();",
    ),
    "Hopper backward overwrites a stage that is still read": (
        "cuda/sm90/backward.cuh",
        "wait(memory.empty_qk(qk.index), qk.parity ^ 1);",
        "",
    ),
    "Hopper backward does not wait for V or dO": (
        "cuda/sm90/backward.cuh",
        "wait(memory.full_v(v.index), v.parity);",
        "",
    ),
    "Hopper forward brings the next head's Q before the output has left its place": (
        "cuda/sm90/forward.cuh",
        "      wait(memory.q_empty(), i % 2 ^ 1);\n",
        "",
    ),
    "Hopper forward puts the output where the other consumer still reads Q": (
        "cuda/sm90/forward.cuh",
        "    if constexpr (!Config::kOutApart) sync_threads(3, kConsumerThreads);\n",
        "",
    ),
}
PROGRAM = """
import sys, torch
from pathlib import Path
from tests.attention.cases import Shape, assert_errs_little_more_than_eager, error, make_case
from tests.attention.rows import causal_row
from tests.cuda import emulation
from tests.cuda.rows import HALF_SEEN
head_dim = int(sys.argv[2])
mutated = emulation.load(emulation.build(Path(sys.argv[1]), [(head_dim, head_dim)]))
emulation.library = lambda: mutated
in_order = ("sm80 in order", "sm90 in order") if head_dim <= 128 else ()
for seed in range(6):
    emulation.set_seed(seed)
    kv_heads = 1 + seed % 2  # groups cut into parts, and whole ones
    shape = Shape(1, 2, kv_heads, 270, head_dim, head_dim)
    case = make_case(shape, dtype=torch.bfloat16, seed=seed)
    for family in ("sm80", "sm90", *in_order):
        result = emulation.run(case, torch.bfloat16, family)
        assert_errs_little_more_than_eager(case, result, torch.bfloat16)
    for row, window in HALF_SEEN.values():
        shape = Shape(1, 2, 1, row.shape[1], head_dim, head_dim)
        case = make_case(shape, dtype=torch.bfloat16, visible_end=row, window=window)
        out, _ = emulation.run_forward(case, torch.bfloat16, "sm90")
        assert error(out, case.run("dense")["out"]) < 0.02
for family in in_order:
    case = make_case(Shape(1, 8, 1, 400, head_dim, head_dim), dtype=torch.float16, seed=9)
    result = emulation.run(case, torch.float16, family)  # several heads for each block
    assert_errs_little_more_than_eager(case, result, torch.float16)
    shape = Shape(1, 1, 1, 700, head_dim, head_dim)  # blocks that run together are of one head
    case = make_case(shape, dtype=torch.float16, seed=9, visible_end=causal_row(700))
    results = []
    for seed in range(6):
        emulation.set_seed(seed)
        sums = emulation.run(case, torch.float16, family, with_sums=True)["dq_sums"]
        results.append(sums)
        assert torch.equal(sums, results[0]), "other bits"
print("nothing was found")
"""


def run(csrc: Path, head_dim: int) -> subprocess.CompletedProcess[str]:
    """Run the kernels of a folder of sources; a kernel gone wrong may abort its process."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(csrc), str(head_dim)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.long("csrc", "tests/cuda")
@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_kernels_as_they_are_pass(head_dim):
    result = run(emulation.CSRC, head_dim)
    assert result.stdout == "nothing was found\n", result.stderr


@pytest.mark.long("csrc", "tests/cuda")
@pytest.mark.parametrize(
    ("file", "old", "new", "head_dim"),
    [
        *((*mutation, 64) for mutation in MUTATIONS.values()),
        *((*mutation, 256) for mutation in MUTATIONS_OF_WIDE_HEADS.values()),
    ],
    ids=[*MUTATIONS, *MUTATIONS_OF_WIDE_HEADS],
)
def test_a_mistake_is_found(file, old, new, head_dim, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.CSRC, csrc)
    source = (csrc / file).read_text()
    assert old in source, "the kernels have changed: adapt the mutation"
    (csrc / file).write_text(source.replace(old, new))
    result = run(csrc, head_dim)
    assert "Error" in result.stderr or "emulator:" in result.stderr, result.stderr
    assert "nothing was found" not in result.stdout
    assert "error:" not in result.stderr, "the mutated kernels do not compile"
