#!/bin/bash

# Parameters
#SBATCH --constraint=ib
#SBATCH --cpus-per-task=32
#SBATCH --error=/shared/runs/%j_0_log.err
#SBATCH --job-name=train
#SBATCH --mem-per-cpu=2G
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/%j_0_log.out
#SBATCH --partition=standard
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=240
#SBATCH --wckey=submitit

# setup
module load openmpi/5.0 || exit 1
export OMP_NUM_THREADS=32

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/%j_%t_log.out --error /shared/runs/%j_%t_log.err --kill-on-bad-exit=1 --mpi=pmix --cpus-per-task=32 --cpu-bind=cores /shared/venv/bin/python -u -m submitit.core._submit /shared/runs


# teardown
status=$?
alive="srun --overlap --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --mpi=none --output=/dev/null true"
if [ $status -ne 0 ] && ! timeout 60 $alive; then
  echo "error: a node does not answer; waiting for Slurm to notice and to requeue the job" >&2
  sleep 1800
fi
exit $status
# /shared/venv/bin/python -u /shared/hvd-compress/slurm/rank.py 8 train.py --lr 0.1
