#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --cpus-per-task=16
#SBATCH --error=/shared/runs/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=720
#SBATCH --wckey=submitit

# setup
export OMP_NUM_THREADS=16

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/%j_%t_log.out --error /shared/runs/%j_%t_log.err --kill-on-bad-exit=1 --mpi=pmix --cpus-per-task=16 --cpu-bind=cores /shared/venv/bin/python -u -m submitit.core._submit /shared/runs


# teardown
status=$?
alive="srun --overlap --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --mpi=none --output=/dev/null true"
if [ $status -ne 0 ] && ! timeout 60 $alive; then
  echo "error: a node does not answer; waiting for Slurm to notice and to requeue the job" >&2
  sleep 1800
fi
exit $status
# apptainer exec --nv --bind /scratch,/datasets /shared/images/hvd-compress.sif python3 -u /shared/hvd-compress/slurm/rank.py 16 train.py --lr 0.1
