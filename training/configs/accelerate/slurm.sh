#!/bin/bash
# Eight nodes with eight GPUs each under Slurm: sbatch training/configs/accelerate/slurm.sh training/configs/RECIPE.yaml
# One launcher per node; a job that was stopped at its time limit is put back into the queue and continues. Not run.
#SBATCH --job-name=pyramidclip
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
recipe=${1:?the recipe, e.g. training/configs/vit_b_32_143m_32_epochs.yaml}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SIGTERM reaches the launchers 180 s before the end, and they pass it on: the run saves and exits with code 75. Their own
# exit code is 1 then, so what decides is whether the final model is there.
srun bash -c "accelerate launch --config_file training/configs/accelerate/several_nodes.yaml \
    --machine_rank \$SLURM_NODEID --main_process_ip $address \
    -m training.pretrain --config $recipe --resume latest" &
wait $! || true
folder=$(sed -n 's/^output_dir: *\([^ ]*\).*/\1/p' "$recipe")
[ -e "$folder/final" ] || scontrol requeue "$SLURM_JOB_ID"
