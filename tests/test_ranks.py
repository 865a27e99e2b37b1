"""One retraining on several processes: shards, their draws, averaged gradients, one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rdarts_fast import config_sources
from rdarts_fast.config import RetrainConfig
from rdarts_fast.data import Augmentation, augment
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import Network
from rdarts_fast.ranks import Ranks, joined
from rdarts_fast.retrain import main as retrain_main
from rdarts_fast.retrain import run_retraining
from rdarts_fast.run_dir import Run
from rdarts_fast.tasks.classification import Classification
from tests.small import arguments, write_images

REPOSITORY = Path(__file__).parents[1]
RETRAIN = str(REPOSITORY / "rdarts_fast" / "retrain.py")
GENOTYPE = Genotype(
    {
        "normal": ((("sep_conv_3x3", 0), ("skip_connect", 1)),),
        "reduce": ((("noise", 0), ("max_pool_3x3", 1)),),
    }
)
PLAIN = Genotype({**GENOTYPE.cells, "reduce": ((("skip_connect", 0), ("max_pool_3x3", 1)),)})
AUGMENTATION = Augmentation((0.5,), (0.25,), 1, True, 4)


def test_the_parts_of_a_batch_are_the_batch() -> None:
    rows = torch.arange(10, 21)
    for count in (1, 2, 3, 4, 5, 8, 11):
        parts = [Ranks(rank, count).part(rows, Draws(1)) for rank in range(count)]
        real = [part.rows for part in parts if part.weight > 0]
        assert torch.equal(torch.cat(real), rows)
        sizes = [len(part) for part in real]
        assert max(sizes) - min(sizes) <= 1
        assert all(len(part.rows) >= 2 for part in parts)  # batch norm needs two
        # The mean over the ranks of weight x local mean is the mean over the batch.
        means = [part.weight * part.rows.double().mean() for part in parts]
        assert float(sum(means)) / count == pytest.approx(float(rows.double().mean()))
    few = [Ranks(rank, 4).part(rows[:3], Draws(1)) for rank in range(4)]
    assert [part.weight for part in few] == [4.0, 0.0, 0.0, 0.0]
    assert [len(part.rows) for part in few] == [3, 2, 2, 2]


def test_a_part_draws_what_its_samples_have_in_the_whole_batch() -> None:
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    whole = Draws(3, step=5)
    expected = augment(images, AUGMENTATION, whole, cutout_probability=0.5)
    for rank in range(3):
        part = Ranks(rank, 3).part(torch.arange(7), whole)
        found = augment(images[part.rows], AUGMENTATION, part.draws, cutout_probability=0.5)
        assert torch.equal(found, expected[part.rows])
    assert torch.equal(whole.normal(1030, (7, 2, 3), "cpu", 0)[2:4], piece(whole, 2, (2, 2, 3), 0))
    assert torch.equal(whole.normal(1030, (5, 7), "cpu", 1)[:, 2:4], piece(whole, 2, (5, 2), 1))
    with pytest.raises(ValueError, match="expected room for 3 samples"):
        piece(whole, 5, (3, 2), 0)


def piece(draws: Draws, first: int, shape: tuple[int, ...], samples: int) -> torch.Tensor:
    return draws.at(part=(first, 7)).normal(1030, shape, "cpu", samples)


def test_noise_and_drop_path_of_a_part_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    network = Network(GENOTYPE, channels=2, layers=3, classes=3, image_channels=1)
    network.eval()  # batch norms are then a sample's own business
    network.train = lambda mode=True: network
    for cell in network.cells:
        cell.training = True  # drop path
    network.drop_path_prob = 0.4
    images, draws = torch.randn(6, 1, 8, 8), Draws(2, step=9)
    whole = network(images, draws)
    parts = [Ranks(rank, 2).part(torch.arange(6), draws) for rank in range(2)]
    found = torch.cat([network(images[part.rows], part.draws) for part in parts])
    assert torch.allclose(found, whole, atol=1e-6)
    other = network(images[3:], draws)  # as if it were a batch of its own
    assert not torch.allclose(other, whole[3:], atol=1e-3)


TWO = """
import json, sys
from pathlib import Path
import torch
from rdarts_fast.draws import Draws
from rdarts_fast.ranks import joined
from tests.test_ranks import PLAIN, example
out = Path(sys.argv[1])
with joined("cpu") as (ranks, device):
    network, images, labels = example()
    model = ranks.wrapped(network, torch.device("cpu"))
    found = {}
    shard = ranks.part(torch.arange(8), Draws(0)).rows
    for case, rows in (("equal", torch.arange(4)), ("shard", shard)):
        network.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[rows], Draws(0)), labels[rows])
        loss.backward()
        gradient = [p.grad for p in network.parameters()]
        found[case] = {"loss": float(loss.detach()), "gradient": gradient}
    found["flags"] = ranks.any(ranks.rank == 1, False)
    found["total"] = ranks.total({"a": 1.0 + ranks.rank, "b": 2.0})
    found["sent"] = ranks.from_first([ranks.rank, "x"])
    torch.save(found, out / f"{ranks.rank}.pt")
"""


def example() -> tuple[Network, torch.Tensor, torch.Tensor]:
    """The same network and eight images on every process."""
    torch.manual_seed(5)
    network = Network(PLAIN, channels=2, layers=3, classes=3, image_channels=1)
    return network, torch.randn(8, 1, 8, 8), torch.arange(8) % 3


def torchrun(*words: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# For each line two processes as torchrun starts them, but forked, so that torch is imported once.
FORKS = """
import json, os, runpy, socket, sys
import torch._dynamo, torch.distributed  # here, not by every fork
import rdarts_fast.retrain
torch.set_num_threads(1)
def rank(number, port, words):
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.dup2(2, 1)  # what is printed is not the answer
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
for line in sys.stdin:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for number in range(2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            code = 1
            try:
                rank(number, port, json.loads(line))
                code = 0
            finally:
                os._exit(code)
    print(*(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in ranks), flush=True)
"""
Forked = Callable[..., list[int]]


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    """Run a file of Python on two processes; return what each ended with."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*words: str) -> list[int]:
        process.stdin.write(json.dumps(words) + "\n")
        process.stdin.flush()
        return [int(word) for word in process.stdout.readline().split()]

    with process:  # closes its input, which ends it
        yield run
    assert process.returncode == 0


def test_two_processes_average_their_gradients(forked, tmp_path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    assert forked(str(tmp_path / "two.py"), str(tmp_path)) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    _, images, labels = example()

    def alone(rows: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        fresh, _, _ = example()
        loss = torch.nn.functional.cross_entropy(fresh(images[rows], Draws(0)), labels[rows])
        loss.backward()
        return float(loss.detach()), [p.grad for p in fresh.parameters()]

    loss, gradient = alone(torch.arange(4))
    for rank in ranks:
        assert rank["equal"]["loss"] == pytest.approx(loss, rel=1e-6)
        for ours, theirs in zip(rank["equal"]["gradient"], gradient, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
    shards = [alone(torch.arange(4)), alone(torch.arange(4, 8))]
    for rank, (own, _) in zip(ranks, shards, strict=True):
        assert rank["shard"]["loss"] == pytest.approx(own, rel=1e-5)
    for i, pair in enumerate(zip(*(grads for _, grads in shards), strict=True)):
        mean = (pair[0] + pair[1]) / 2
        assert torch.allclose(ranks[0]["shard"]["gradient"][i], mean, atol=1e-6)
        assert torch.equal(ranks[0]["shard"]["gradient"][i], ranks[1]["shard"]["gradient"][i])
    assert [rank["flags"] for rank in ranks] == [[True, False]] * 2
    assert [rank["total"] for rank in ranks] == [{"a": 3.0, "b": 4.0}] * 2
    assert [rank["sent"] for rank in ranks] == [[0, "x"]] * 2


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    images = folder / "images.npz"
    if not images.exists():
        write_images(images)
        (folder / "g.json").write_text(PLAIN.to_json())
    given = {"data": f"npz:{images}", "channels": 2, "layers": 3, "epochs": 2, "batch_size": 8}
    return given | {"device": "cpu", "threads": 1, "out": folder / "run", "seed": 3} | changes


def test_a_retraining_on_two_processes_leaves_one_run(tmp_path) -> None:
    given = small(tmp_path, checkpoint_minutes=0)
    words = ["-m", "rdarts_fast.retrain", str(tmp_path / "g.json"), *arguments(given)]
    done = torchrun(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test error after the last epoch") == 1  # one of them prints
    assert "2 processes" in done.stdout
    run = Run.read(tmp_path / "run")
    assert [r["epoch"] for r in run.metrics] == [0, 1] and run.environment["ranks"] == 2
    assert run.result["test_error"] == run.metrics[-1]["test_error"]
    (alone,) = run_retraining(
        **small(tmp_path, out=tmp_path / "alone"), source=str(tmp_path / "g.json")
    )
    # Batch norm sees half a batch each: near, not equal.
    assert run.metrics[0]["train_loss"] == pytest.approx(alone.metrics[0]["train_loss"], rel=0.3)
    assert run.metrics[0]["train_loss"] != alone.metrics[0]["train_loss"]
    stored = run.load_checkpoint()
    assert (stored["epoch"], stored["records"]) == (2, 2)
    assert not [name for name in stored["network"] if name.startswith("module")]
    # What was tested is what the checkpoint holds: with the first process's batch norms.
    network = Network(PLAIN, channels=2, layers=3, classes=3, image_channels=1)
    network.load_state_dict(stored["network"])
    settings = config_sources.stored(RetrainConfig, tmp_path / "run", "run")
    task = Classification.load(settings, torch.device("cpu"))
    found, labels = task.test_batch(torch.arange(len(task.images.test_labels)))
    loss = torch.nn.functional.cross_entropy(network.eval()(found, Draws(0)), labels)
    assert run.metrics[-1]["test_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


ONE_FAILS = """
import torch
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.ranks import joined
@exit_on_user_error
def main():
    with joined("cpu") as (ranks, device):
        ranks.any(False)  # both are there
        if ranks.rank == 0:
            raise UserError("the disk is full")
        ranks.any(False)
main()
"""


def test_an_error_of_one_process_is_told_once_and_without_tracebacks(tmp_path) -> None:
    (tmp_path / "fails.py").write_text(ONE_FAILS)
    done = torchrun("--max-restarts=0", str(tmp_path / "fails.py"))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "error: the disk is full" in errors
    assert set(errors) <= {
        "error: the disk is full",
        "error: process 1 of 2 stops, since another ended: what that one says is the cause",
    }
    assert "gloo" not in done.stderr and 'fails.py", line' not in done.stderr


def test_an_error_that_every_process_finds_is_told_once(tmp_path) -> None:
    done = torchrun("-m", "rdarts_fast.retrain", str(tmp_path / "absent"), "--device", "cpu")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: genotype {tmp_path / 'absent'}: No such file or directory"]


def test_a_mistyped_flag_is_told_once(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["retrain", "run", "--chanels", "3"])
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            retrain_main()
        assert ("--channels" in capsys.readouterr().err) == told


KILLED = """
import os, signal, sys
from rdarts_fast import retrain
step = retrain.train_step
def killed(settings, task, model, state, *rest):
    if (state.epoch, state.step) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    step(settings, task, model, state, *rest)
retrain.train_step = killed
retrain.main()
"""


def test_inputs_that_no_node_reads_and_a_last_batch_of_three(forked, tmp_path) -> None:
    given = small(tmp_path, batch_size=11)  # 36 images: the last batch has three
    node = ((("sep_conv_3x3", 0),),)
    (tmp_path / "g.json").write_text(Genotype({"normal": node, "reduce": node}).to_json())
    assert forked(RETRAIN, str(tmp_path / "g.json"), *arguments(given)) == [0, 0]
    assert len(Run.read(tmp_path / "run").metrics) == 2


def test_both_processes_killed_and_resumed_the_sums_are_of_the_whole_epoch(
    forked, tmp_path
) -> None:
    given = small(tmp_path, checkpoint_minutes=0)
    (tmp_path / "killed.py").write_text(KILLED)
    begun = forked(str(tmp_path / "killed.py"), str(tmp_path / "g.json"), *arguments(given))
    assert begun == [-signal.SIGKILL] * 2
    stored = Run.read(tmp_path / "run").load_checkpoint()
    assert (stored["epoch"], stored["step"]) == (1, 2)
    assert stored["sums"]["items"] == 16  # two batches of 8, of both processes
    assert forked(RETRAIN, "--resume", str(tmp_path / "run")) == [0, 0]
    whole = small(tmp_path, out=tmp_path / "whole")
    assert forked(RETRAIN, str(tmp_path / "g.json"), *arguments(whole)) == [0, 0]
    keys = ("train_loss", "train_accuracy", "test_loss", "test_error")
    records = [
        [[record[key] for key in keys] for record in Run.read(tmp_path / name).metrics]
        for name in ("run", "whole")
    ]
    assert records[0] == records[1]


def test_one_process_is_alone(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as (ranks, device):
        assert (ranks, device) == (Ranks(0, 1), "cpu")
        assert ranks.any(True, False) == [True, False] and ranks.total({"a": 2.0}) == {"a": 2.0}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(UserError, match="started process 7 on a machine with 0 GPUs"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with joined("cuda"):
            pass


def test_other_ways_to_compute_the_same_network(tmp_path, capsys) -> None:
    given = small(tmp_path)
    source = str(tmp_path / "g.json")
    (plain,) = run_retraining(**given, source=source)
    losses = {}
    for name, changes in {"bf16": {"precision": "bf16"}, "last": {"channels_last": True}}.items():
        (run,) = run_retraining(**{**given, **changes, "out": tmp_path / name}, source=source)
        losses[name] = run.metrics[0]["train_loss"]
        assert run.environment["precision"] == changes.get("precision", "fp32")
    expected = plain.metrics[0]["train_loss"]
    assert losses["last"] == pytest.approx(expected, rel=1e-4)
    assert losses["bf16"] == pytest.approx(expected, rel=5e-2) and losses["bf16"] != expected
    printed = capsys.readouterr().out
    assert "bf16, 1 threads" in printed and "channels_last" in printed
    weights = Run.read(tmp_path / "bf16").load_checkpoint()["network"]
    assert weights["classifier.weight"].dtype == torch.float32


def test_noise_is_not_compiled(tmp_path) -> None:
    given = small(tmp_path, compile=True)
    (tmp_path / "n.json").write_text(GENOTYPE.to_json())
    with pytest.raises(UserError, match="the genotype has noise, which cannot be compiled"):
        run_retraining(**given, source=str(tmp_path / "n.json"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path) -> None:
    given = small(tmp_path)
    source = str(tmp_path / "g.json")
    (plain,) = run_retraining(**given, source=source)
    (run,) = run_retraining(**{**given, "compile": True, "out": tmp_path / "c"}, source=source)
    for ours, theirs in zip(run.metrics, plain.metrics, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
    names = run.load_checkpoint()["network"].keys()
    assert names == plain.load_checkpoint()["network"].keys()
    assert json.loads((tmp_path / "c" / "config.json").read_text())["compile"] is True
