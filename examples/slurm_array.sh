#!/bin/bash
# A comparison on a cluster: each task of a SLURM array trains one run.
#
#   gametalearn compare --dataset omniglot --seeds 10 --threads 4 --out runs/cmp --plan > plan.txt
#   sbatch --array="1-$(wc -l < plan.txt)" examples/slurm_array.sh plan.txt
#   gametalearn compare --dataset omniglot --seeds 10 --threads 4 --out runs/cmp   # when all have ended
#
# Submit it from the folder in which the plan was made, with gametalearn on the path; the last command
# tests what was trained, trains what is missing, and compares. SLURM sends SIGTERM two minutes before
# the time is over: the run then saves a checkpoint, and the same sbatch goes on from there; tasks
# whose runs are finished end at once.

#SBATCH --job-name=gametalearn
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=gametalearn-%A_%a.log

set -euo pipefail

plan=${1:?give the file that compare --plan wrote}
number=${SLURM_ARRAY_TASK_ID:?submit it with sbatch --array}
command=$(sed -n "${number}p" "$plan")
if [[ -z $command ]]; then
  echo "$plan has no line $number" >&2
  exit 2
fi
echo "$command"
eval "exec $command" # exec, so that the signal reaches the run
