#!/bin/bash
# Eight nodes with eight GPUs each under Slurm: sbatch training/configs/accelerate/slurm.sh training/configs/RECIPE.yaml [RUN]
# One launcher per node. A job that was stopped at its time limit, or died, is put back into the queue and continues; one
# that trying again cannot help (RUN/stopped.json says so), or that came no further three times in a row, is not.
# Run here with a stand-in for srun and scontrol only.
#SBATCH --job-name=pyramidclip
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
recipe=${1:?the recipe, e.g. training/configs/vit_b_32_143m_32_epochs.yaml}
run=${2:-runs/$(basename "$recipe" .yaml)}
configuration=${PYRAMIDCLIP_ACCELERATE:-training/configs/accelerate/several_nodes.yaml}
most_without_progress=3

# SIGTERM reaches every process 300 s before the end: the run finishes its step, or a validation or save at work, and
# saves. The launcher kills what is left after this many seconds; its own default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
# Where the host's name leads to the loopback (127.0.1.1 on Debian and Ubuntu) or nodes have several networks, name the
# interface between the nodes: gloo carries what processes tell each other, NCCL the gradients.
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

# A setting that does not exist is found here, once, and not on every node again and again.
python -c 'import sys
from pyramidclip_command import run_command
from training.pretrain import parse
sys.exit(run_command(parse, lambda settings: 0))' --config "$recipe" --output-dir "$run"

export ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs on a node do not meet, and Linux gives ports from 32768 on to whoever asks for any.
export PORT=$((10000 + SLURM_JOB_ID % 20000))
export RECIPE=$recipe RUN=$run CONFIGURATION=$configuration NODES=$SLURM_JOB_NUM_NODES
export PROCESSES=$((NODES * ${SLURM_GPUS_ON_NODE:-8}))

newest() { (cd "$run/checkpoints" 2>/dev/null && ls -d step-* 2>/dev/null | tail -n 1) || true; }
told() { sed -n "s/^ *\"$1\": *\"\{0,1\}\([^\"]*[^\",]\)\"\{0,1\},\{0,1\}$/\1/p" "$run/stopped.json" 2>/dev/null || true; }

before=$(newest)
left=$(cat "$run/stopped.json" 2>/dev/null || true)
# Since Slurm 22.05 srun asks for its processors itself; a launcher that fails ends those of the other nodes.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "$CONFIGURATION" --num_machines "$NODES" --num_processes "$PROCESSES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$ADDRESS" --main_process_port "$PORT" \
    -m training.pretrain --config "$RECIPE" --output-dir "$RUN" --resume latest' &
code=0
wait $! || code=$?

# A launcher's exit code is 1 whatever happened; the file is what the run says itself, absent where it was killed. One
# that an earlier try left is no word of a start that failed before it came so far.
if [ "$code" != 0 ] && [ "$(cat "$run/stopped.json" 2>/dev/null || true)" = "$left" ]; then told() { :; }; fi
reason=$(told reason)
case "$reason" in finished*) echo "slurm.sh: $reason"; rm -f "$run/tries"; exit 0 ;; esac
if [ "$(told try_again)" = false ]; then
    echo "slurm.sh: not put back into the queue: $reason"
    grep '"message"' "$run/stopped.json"
    exit 1
fi
tries=$(cat "$run/tries" 2>/dev/null || echo 0)
[ "$(newest)" = "$before" ] && tries=$((tries + 1)) || tries=0
mkdir -p "$run"
echo "$tries" >"$run/tries"
if [ "$tries" -ge "$most_without_progress" ]; then
    echo "slurm.sh: not put back into the queue: $tries times in a row without a new checkpoint (${reason:-killed})"
    rm -f "$run/tries"
    exit 1
fi
echo "slurm.sh: back into the queue (${reason:-killed}), newest checkpoint: $(newest)"
scontrol requeue "$SLURM_JOB_ID"
