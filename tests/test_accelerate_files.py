"""training/configs/accelerate: what the installed Accelerate makes of each file; any version that setup.cfg allows."""

import pytest

pytest.importorskip("accelerate", reason="needs the extra train")

from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = "training/configs/accelerate"
# File -> machines, processes, and what it starts them with.
MEANT = {
    "deepspeed_refused": (1, 8, "use_deepspeed"),
    "fsdp2_refused": (1, 8, "use_fsdp"),
    "one_gpu": (1, 1, None),
    "one_node": (1, 8, "multi_gpu"),
    "several_nodes": (8, 64, "multi_gpu"),
    "two_processes": (1, 2, "multi_gpu"),
}


def test_every_file_is_meant_for_something(checkout):
    assert sorted(path.stem for path in (checkout / FOLDER).glob("*.yaml")) == sorted(MEANT)


@pytest.mark.parametrize("name", MEANT)
def test_the_launcher_reads_what_is_meant(checkout, name):
    path = checkout / FOLDER / f"{name}.yaml"
    load_config_from_file(str(path))  # refuses keys that it does not know
    words = ["--config_file", str(path), "-m", "training.pretrain", "--output-dir", "somewhere"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    kinds = [
        kind for kind in ("multi_gpu", "use_fsdp", "use_deepspeed", "use_cpu", "use_megatron_lm") if vars(args)[kind]
    ]
    machines, processes, kind = MEANT[name]
    assert (args.num_machines, args.num_processes, kinds) == (machines, processes, [kind] if kind else [])
    # The run's own setting decides about precision.
    assert args.mixed_precision == "no" and args.module and args.rdzv_backend == "static"
    assert (args.training_script, args.training_script_args) == ("training.pretrain", ["--output-dir", "somewhere"])
