#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --cpus-per-task=12
#SBATCH --error=/shared/runs/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=train
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=720
#SBATCH --wckey=submitit

# setup
module load gcc/12 || exit 1
module load cuda/12.4 || exit 1
module load openmpi/5.0 || exit 1
export NCCL_DEBUG=WARN
export HOROVOD_CYCLE_TIME=1
export OMP_NUM_THREADS=12

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/%j_%t_log.out --error /shared/runs/%j_%t_log.err --kill-on-bad-exit=1 --mpi=pmix --cpus-per-task=12 --cpu-bind=cores /shared/venv/bin/python -u -m submitit.core._submit /shared/runs


# teardown
status=$?
alive="srun --overlap --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --mpi=none --output=/dev/null true"
if [ $status -ne 0 ] && ! timeout 60 $alive; then
  echo "error: a node does not answer; waiting for Slurm to notice and to requeue the job" >&2
  sleep 1800
fi
exit $status
# /shared/venv/bin/python -u /shared/hvd-compress/slurm/rank.py 32 train.py --lr 0.1
