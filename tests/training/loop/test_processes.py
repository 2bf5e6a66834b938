"""How the processes of a run start: engines that are refused, time-outs, and the network of several nodes."""

import os
import socket
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType

from tests.training.processes import run_in_processes
from tests.training.runs import settings, use_memory
from training import pretrain
from training.loop import network
from training.loop.network import choose_gloo_interface
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def timeouts(rank, world_size, args, port):
    """Those of the groups that a run makes: the processes' own, and that of the votes."""
    found, make = [], dist.new_group

    def noted(*arguments, **options):
        group = make(*arguments, **options)
        for one in (dist.group.WORLD, group):
            found.append(one._get_backend(torch.device("cpu")).options._timeout)
        return group

    dist.destroy_process_group()  # the run makes its own, from what torchrun says
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.new_group = noted
    pretrain.run(args)
    return found


def test_the_time_out_reaches_every_group(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    args = settings(tmp_path, max_steps=1, process_timeout_minutes=7.5)
    for found in run_in_processes(timeouts, 2, args, free_port()):
        # A minute behind the watch, which knows who is missing. The day is of the group for file work of the first one.
        assert set(found) == {timedelta(minutes=8.5), timedelta(days=1)} and len(found) >= 3


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
