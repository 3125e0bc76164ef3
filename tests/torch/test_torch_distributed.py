"""Data parallel over real processes on this machine: torchrun, DDP, gloo, our layers inside."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "torch" / "data_parallel.py"
STEPS = 20  # in epochs of 8
SMALL = ("--steps", STEPS, "--every", 5, "--size", 256, "--batch", 32)
pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(200)]


def run(*command, timeout=150):
    """A process and its children, which are gone afterwards whatever happens; its output."""
    names = {name for _, name in socket.if_nameindex()}
    outside = ("OMP_", "RANK", "WORLD_", "LOCAL_", "MASTER_", "FUSEDRNN_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/data_parallel.md says why
    if "lo" in names:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # not by the machine's name, which may not resolve
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output


def torchrun(folder, processes, *command):
    """What each process printed, over all its starts, by rank.

    Restarts are allowed in every test: a thread of gloo may abort at exit, after all is done.
    """
    run(
        "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}", "--max-restarts=3",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost",
        "--redirects=1", "--log-dir", folder, *command,
    )  # fmt: skip
    return [
        "".join(path.read_text() for path in sorted(folder.glob(f"*/attempt_*/{rank}/stdout.log")))
        for rank in range(processes)
    ]


def losses(*outputs):
    """The loss of each step, the mean of the processes; of a step that was done again, the last."""
    each = []
    for output in outputs:
        lines = re.findall(r"^step (\d+) loss (\S+)$", output, re.MULTILINE)
        each.append({int(step): float(loss) for step, loss in lines})
    assert all(list(found) == list(each[0]) for found in each)
    return [sum(found[step] for found in each) / len(each) for step in each[0]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process, by dtype."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        dtype: losses(run(EXAMPLE, *SMALL, "--dtype", dtype, "--checkpoint", folder / f"{dtype}.pt"))
        for dtype in ("float32", "float64")
    }


# The gradient of a batch is a sum in another order: eps times the steps that carry it on, with room.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_losses_are_those_of_one_process_on_the_joined_batch(
    tmp_path, alone, processes, dtype, tolerance
):
    command = (EXAMPLE, *SMALL, "--dtype", dtype, "--checkpoint", tmp_path / "run.pt")
    found = losses(*torchrun(tmp_path / "logs", processes, *command))
    assert len(found) == STEPS
    assert found == pytest.approx(alone[dtype], rel=tolerance, abs=0)
    assert found[-1] < found[0] / 2  # it learns


def test_a_killed_process_is_started_again_and_the_losses_are_those_of_an_undisturbed_run(tmp_path, alone):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    command = (EXAMPLE, *SMALL, "--dtype", "float64", "--checkpoint", folder / "run.pt")
    outputs = torchrun(tmp_path / "logs", 2, HERE / "ddp_killed.py", *command)
    assert outputs[1].count("rank 1 is killed") == 1
    for rank, output in enumerate(outputs):
        assert f"resumed from step 10, process {rank} of 2" in output
        assert output.count("step 12 loss") == 2  # was done, was lost, was done again
    assert losses(*outputs) == pytest.approx(alone["float64"], rel=1e-10, abs=0)
    assert [path.name for path in folder.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path, alone):
    command = ("--size", 256, "--batch", 32, "--dtype", "float64", "--checkpoint", tmp_path / "run.pt")
    first = torchrun(tmp_path / "logs", 2, EXAMPLE, *command, "--steps", 11)
    second = run(EXAMPLE, *command, "--steps", STEPS)
    assert "resumed from step 11, process 0 of 1" in second
    assert losses(*first) + losses(second) == pytest.approx(alone["float64"], rel=1e-10, abs=0)


def test_uneven_inputs_with_join(tmp_path):
    """The process that is done stands for zeros: each step is the sum over those left, divided by two."""
    torchrun(tmp_path / "logs", 2, HERE / "ddp_uneven.py", tmp_path)
    run(HERE / "ddp_uneven.py", tmp_path)
    expected = torch.load(tmp_path / "alone.pt", weights_only=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, w in expected.items():
            torch.testing.assert_close(found[name], w, rtol=0, atol=1e-12, msg=f"{rank}: {name}")


def test_the_code_of_the_page_runs(tmp_path):
    """That of docs/data_parallel.md, in a group of one process."""
    page = (HERE.parents[1] / "docs" / "data_parallel.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert "model.join()" in code
    before = f"""
import torch, fusedrnn.torch
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(fusedrnn.torch.LSTM(2, 3))
threads, optimizer = 1, torch.optim.SGD(model.parameters(), lr=0.1)
batches_of_this_process = [(torch.ones(4, 5, 2), torch.zeros(4, 5, 3))] * 3
losses = []
def loss_function(outputs, y):
    losses.append(outputs[0].sub(y).square().mean())
    return losses[-1]
"""
    after = "\ntorch.distributed.destroy_process_group()\nassert losses[0] > losses[1] > losses[2]\n"
    run("-c", before + code + after)


@pytest.mark.parametrize("processes", [1, 2, 1000])
def test_the_processes_of_a_machine_divide_its_cores(monkeypatch, threads, processes):
    from fusedrnn.threads import get_num_threads

    spec = importlib.util.spec_from_file_location("data_parallel", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    before = torch.get_num_threads()
    try:
        example.share_cores()
        assert torch.get_num_threads() == get_num_threads() == max(1, 4 // processes)
    finally:
        torch.set_num_threads(before)
