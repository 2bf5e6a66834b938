"""How the processes of a run start: engines that are refused, time-outs, and the network of several nodes."""

import os
import socket
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, is_deepspeed_available

from pyramidclip_command import run_command
from tests.training.machines import free_port
from tests.training.processes import run_in_processes
from tests.training.runs import settings, use_memory
from training import pretrain
from training.loop import network, processes
from training.loop import run as loop
from training.loop.distributed import hosts
from training.loop.network import choose_gloo_interface
from training.loop.outcome import read_outcome
from training.loop.processes import check_engine


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("FSDP", "BatchNorm's running statistics.*0-d logit_scale"),
        ("DEEPSPEED", "0-d parameter.*ZeRO-3 would save empty weights.*copy of logit_scale"),
    ],
)
def test_what_does_not_train_these_models_is_refused_with_its_reason(engine, reason):
    with pytest.raises(ValueError, match=f"the engine is refused: .*{reason}.*one_node.yaml"):
        check_engine(DistributedType[engine])
    check_engine(DistributedType.MULTI_GPU)


def timeouts(rank, world_size, args, port):
    """Those of the groups that a run makes: the processes' own, and that of the votes."""
    found, make = [], dist.new_group

    def noted(*arguments, **options):
        group = make(*arguments, **options)
        for one in (dist.group.WORLD, group):
            found.append(one._get_backend(torch.device("cpu")).options._timeout)
        return group

    dist.barrier()  # the other has met this one
    dist.destroy_process_group()  # the run makes its own, from what torchrun says
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.new_group = noted
    pretrain.run(args)
    return found


def test_the_time_out_reaches_every_group(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    args = settings(tmp_path, max_steps=1, process_timeout_minutes=7.5)
    for found in run_in_processes(timeouts, 2, args, str(free_port())):
        # A minute behind the watch, which knows who is missing. The day is of the group for file work of the first one.
        assert set(found) == {timedelta(minutes=8.5), timedelta(days=1)} and len(found) >= 3


def groups_of_waits(rank, world_size, args):
    """The groups over which processes wait for each other's file work: while a checkpoint or the model is written."""
    found, names = [], ("all_gather_object", "broadcast_object_list", "all_reduce", "broadcast", "barrier")
    calls = {name: getattr(dist, name) for name in names}

    def noted(name, *arguments, group=None, **options):
        found.append((name, group is hosts()))
        return calls[name](*arguments, group=group, **options)

    def alone(function):
        def inside(*arguments):
            for name in names:
                setattr(dist, name, partial(noted, name))
            try:
                return function(*arguments)
            finally:
                for name in names:
                    setattr(dist, name, calls[name])

        return inside

    loop.write_checkpoint, loop.export = alone(loop.write_checkpoint), alone(loop.export)
    pretrain.run(args)
    return found


def test_file_work_of_the_first_is_waited_for_in_the_group_that_waits_a_day(tmp_path, monkeypatch):
    """Never in the device's own group, whose time-out a checkpoint of an hour would pass."""
    use_memory(monkeypatch)
    for found in run_in_processes(groups_of_waits, 2, settings(tmp_path, max_steps=2, save_every_steps=1)):
        assert len(found) >= 10 and all(of_hosts for _, of_hosts in found), found


def seeds(rank, world_size, args):
    result = pretrain.run(args)
    return torch.initial_seed(), {name: value.numpy() for name, value in result.model.state_dict().items()}


def test_each_process_has_random_numbers_of_its_own_and_the_weights_of_all(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    given = settings(tmp_path, max_steps=1, learning_rate=0.0, save_every_steps=0, seed=3)
    (first, weights), (second, others) = run_in_processes(seeds, 2, given)
    assert (first, second) == (3_000_009, 3_000_010)
    assert weights.keys() == others.keys()
    trained = [name for name in weights if "running" not in name and "tracked" not in name]
    assert trained and all((weights[name] == others[name]).all() for name in trained)


@pytest.fixture
def two_nodes(monkeypatch):
    """Interfaces of a node, and the address that it has towards each host."""
    towards = {"first-node": "10.0.0.5", network._ANYWHERE: "192.168.1.5"}
    addresses = {"lo": "127.0.0.1", "eth0": "192.168.1.5", "ib0": "10.0.0.5", "ib1": "10.0.1.5"}
    monkeypatch.setattr(
        psutil, "net_if_addrs", lambda: {name: [SimpleNamespace(address=one)] for name, one in addresses.items()}
    )
    monkeypatch.setattr(network, "_own_address_towards", towards.get)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in (("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8"), ("MASTER_ADDR", "first-node")):
        monkeypatch.setenv(name, value)
    return towards


def chosen():
    choose_gloo_interface()
    return network.os.environ.get("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("environment", "towards", "expected"),
    [
        ({}, {}, "ib0"),  # towards the first node
        ({}, {"first-node": "127.0.1.1"}, "eth0"),  # this is the first node, whose name is its loopback's
        ({}, {"first-node": "127.0.1.1", network._ANYWHERE: None}, None),
        ({"NCCL_SOCKET_IFNAME": "ib1"}, {}, "ib1"),
        ({"NCCL_SOCKET_IFNAME": "=eth0,ib0"}, {}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, {"first-node": "192.168.1.5"}, "eth0"),
        ({"GLOO_SOCKET_IFNAME": "mine"}, {}, "mine"),
        ({"LOCAL_WORLD_SIZE": "16"}, {}, None),  # one node
    ],
)
def test_several_nodes_meet_on_an_interface_that_they_reach(two_nodes, monkeypatch, environment, towards, expected):
    two_nodes.update(towards)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert chosen() == expected


def test_a_way_is_looked_up_and_nothing_is_sent():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(0.1)
        assert network._own_address_towards("127.0.0.1") == "127.0.0.1"
        with pytest.raises(TimeoutError):
            listener.recv(1)
    assert network._own_address_towards("no-such-host.invalid") is None


ENGINE = """
import os
def init_distributed(*given, **options):
    raise RuntimeError(f"the engine failed in process {os.environ['RANK']}")
"""


@pytest.fixture
def failing_engine(tmp_path, monkeypatch):
    """A package that Accelerate takes for DeepSpeed, whose first call fails in every process that makes it."""
    package = tmp_path / "engine" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "comm.py").write_text(ENGINE + "def is_initialized():\n    return False\n")
    known = tmp_path / "engine" / "deepspeed-0.19.8.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n")
    monkeypatch.syspath_prepend(package.parent)
    assert is_deepspeed_available()


def under_engine(rank, world_size, args, asked, port):
    """What a run says whose launcher asked for DeepSpeed in the processes of `asked`, and its exit code."""
    dist.barrier()  # the other has met this one
    dist.destroy_process_group()  # the run makes its own, from what torchrun says
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(rank in asked).lower()
    processes._on_processors = lambda: False  # where Accelerate calls no engine
    said = []

    def run(args):
        try:
            pretrain.run(args)
        except Exception as error:
            said.append(str(error))
            raise

    return run_command(lambda words: args, run, []), said[0]


@pytest.mark.parametrize("asked", [(0, 1), (0,), (1,)])
def test_an_engine_that_some_were_told_to_use_is_called_by_nobody_and_ends_all(tmp_path, failing_engine, asked):
    """Else the others would wait for whoever the engine fails in."""
    began = time.monotonic()
    found = run_in_processes(under_engine, 2, settings(tmp_path / "run"), asked, str(free_port()))
    for rank, (code, said) in enumerate(found):
        first = "" if rank in asked else f"process {asked[0]}: "
        assert code == 2 and said.startswith(f"{first}the engine is refused: DeepSpeed"), said
    assert time.monotonic() - began < 60 and read_outcome(tmp_path / "run")["reason"] == "setting or data"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "stopped.json"}
