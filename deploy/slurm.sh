#!/usr/bin/env bash
#SBATCH --job-name=antidote
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=antidote-%j.log
# One run on several Slurm nodes. From the repository's root, which all nodes must see (so must data and cluster.runs):
#   python3.11 -m venv .venv && PATH=$PWD/.venv/bin:$PATH deploy/setup.sh           once
#   sbatch deploy/slurm.sh roclip-paper data=/shared/pairs cluster.workers=8 cluster.gpus=1
# A job that is requeued or started again goes on from its last checkpoint: the same recipe has the same directory.
set -euo pipefail
[ $# -gt 0 ] || { echo "say what to run: sbatch deploy/slurm.sh RECIPE key=value …" >&2; exit 1; }
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
export PATH="$PWD/.venv/bin:$PATH" RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null # in the home, which the nodes share, readable by you alone
chmod 600 ~/.ray/auth_token

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID" # a folder of this job on each node; Unix sockets want a short path

# Every node runs the same line: the head starts Ray and runs the command, the others join, and all leave when it ends.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --temp-dir "$RAY_TMPDIR" --dashboard-host 127.0.0.1 -- \
    python -m orchestrate run "$@" cluster.address=auto
