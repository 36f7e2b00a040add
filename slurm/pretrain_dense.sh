#!/usr/bin/env bash
# Pretrain a dense model: train, checkpoint, export to Hugging Face format, verify, and show a sample.
#
#   bash slurm/pretrain_dense.sh [KEY=VALUE ...]      on this machine, also without a GPU; makes what is missing
#   bash slurm/pretrain_dense.sh --prepare            only the environment and the corpus: once, on a login node
#   sbatch --account=A --partition=P --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 \
#       slurm/pretrain_dense.sh [KEY=VALUE ...]
#
# KEY=VALUE changes keys of the run file, such as train.steps=100 parallel.tp=8. Started again, it goes on from the
# newest checkpoint. In a Slurm job nodes and ranks come from the submit line: one rank for each GPU, or without GPUs
# --ntasks-per-node of them, each with its share of the cores that --cpus-per-task (or --exclusive) gives the job; nothing
# is installed or prepared there.
#
#   MESHWRIGHT_RUN_FILE          another run file (default: runs/dense_small.toml); its store must have been prepared
#   MESHWRIGHT_RANKS             ranks on each node (default by hand: one for each GPU, or 2)
#   MESHWRIGHT_INSTALL_IN_JOB=1  install and prepare inside a job after all
#   MASTER_ADDR, MASTER_PORT     where the ranks meet (default: found by launcher/ranks/rendezvous.py)
#
#SBATCH --job-name=pretrain-dense
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
set -euo pipefail

script=pretrain_dense.sh
default_run_file=runs/dense_small.toml
one_rank=()

# Slurm runs a copy of this file in a folder of its own, so its name does not tell where the clone is.
find_root() {
    local candidate command=""
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        command=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* Command=\([^ ]*\).*/\1/p' || true)
    fi
    for candidate in "$(dirname "${BASH_SOURCE[0]}")/.." "${command:+$(dirname "$command")/..}" "${SLURM_SUBMIT_DIR:-}"; do
        if [ -n "$candidate" ] && [ -f "$candidate/slurm/pretrain.sh" ] && [ -f "$candidate/pyproject.toml" ]; then
            (cd "$candidate" && pwd -P)
            return
        fi
    done
    echo "The clone of meshwright was not found; submit from its folder: cd meshwright && sbatch slurm/$script" >&2
    return 2
}

root=$(find_root)
# shellcheck source=slurm/pretrain.sh
source "$root/slurm/pretrain.sh"
