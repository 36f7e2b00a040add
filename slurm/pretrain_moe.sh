#!/usr/bin/env bash
# Pretrain a mixture of experts: train, checkpoint, export to Hugging Face format, verify, and show a sample.
#
#   bash slurm/pretrain_moe.sh [KEY=VALUE ...]      on this machine, also without a GPU; makes what is missing
#   bash slurm/pretrain_moe.sh --prepare            only the environment and the corpus: once, on a login node
#   sbatch --account=A --partition=P --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 \
#       slurm/pretrain_moe.sh [KEY=VALUE ...]
#
# KEY=VALUE changes keys of the run file, such as train.steps=100 parallel.ep=8. Started again, it goes on from the
# newest checkpoint. In a Slurm job nodes and ranks come from the submit line: one rank for each GPU, or without GPUs
# --ntasks-per-node of them, each with its share of the cores that --cpus-per-task (or --exclusive) gives the job; nothing
# is installed or prepared there.
#
#   MESHWRIGHT_RUN_FILE          another run file (default: runs/moe_tiny.toml); its store must have been prepared
#   MESHWRIGHT_RANKS             ranks on each node (default by hand: one for each GPU, or 2)
#   MESHWRIGHT_INSTALL_IN_JOB=1  install and prepare inside a job after all
#   MASTER_ADDR, MASTER_PORT     where the ranks meet (default: found by launcher/ranks/rendezvous.py)
#
#SBATCH --job-name=pretrain-moe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
set -euo pipefail

stop() {
    printf '%s\n' "$@" >&2
    exit 2
}

# Slurm runs a copy of this file in a folder of its own, so its name does not tell where the clone is.
find_root() {
    local candidate command=""
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        command=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* Command=\([^ ]*\).*/\1/p' || true)
    fi
    for candidate in "$(dirname "${BASH_SOURCE[0]}")/.." "${command:+$(dirname "$command")/..}" "${SLURM_SUBMIT_DIR:-}"; do
        if [ -n "$candidate" ] && [ -f "$candidate/slurm/environment.sh" ] && [ -f "$candidate/pyproject.toml" ]; then
            (cd "$candidate" && pwd -P)
            return
        fi
    done
    stop "The clone of meshwright was not found; submit from its folder: cd meshwright && sbatch slurm/pretrain_moe.sh"
}

count_gpus() {
    if command -v nvidia-smi >/dev/null; then
        "$meshwright_python" -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

started=$(date +%s)
root=$(find_root)
in_job=${SLURM_JOB_ID:-}
may_install=1
if [ -n "$in_job" ] && [ "${MESHWRIGHT_INSTALL_IN_JOB:-0}" != 1 ]; then may_install=0; fi
login_node_command="On a login node, in $root: bash slurm/pretrain_moe.sh --prepare"

only_prepare=0
overrides=()
for argument in "$@"; do
    case $argument in
        --prepare) only_prepare=1 ;;
        -h | --help)
            sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$root/slurm/pretrain_moe.sh"
            exit 0
            ;;
        [a-z]*=*) overrides+=("$argument") ;;
        *) stop "$argument: neither KEY=VALUE nor --prepare; bash slurm/pretrain_moe.sh --help explains both" ;;
    esac
done
if [ "$only_prepare" = 1 ]; then may_install=1; fi

default_run_file=$root/runs/moe_tiny.toml
run_file=$(realpath -m "${MESHWRIGHT_RUN_FILE:-$default_run_file}")
cd "$root"

# 1. The environment.
export MESHWRIGHT_MAY_INSTALL=$may_install
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh" || {
    [ "$may_install" = 1 ] || stop "$login_node_command"
    exit 2
}
environment_seconds=$(($(date +%s) - started))

# 2. How many ranks, and is the run file right for them? Where are its store and its folder?
nodes=${SLURM_JOB_NUM_NODES:-1}
if [ -n "$in_job" ]; then
    per_node=${MESHWRIGHT_RANKS:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
else
    gpus=$(count_gpus)
    per_node=${MESHWRIGHT_RANKS:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
fi
case $nodes,$per_node in *[!0-9,]* | *,0 | *,) stop "MESHWRIGHT_RANKS = $per_node: must be a count of ranks, such as 2" ;; esac
per_node=$((10#$per_node)) # 08 is a count, not an octal number
ranks=$((nodes * per_node))
if [ "$ranks" = 1 ] && [ "$run_file" = "$default_run_file" ]; then
    echo "One rank: parallel.ep=1."
    overrides=(parallel.ep=1 ${overrides[@]+"${overrides[@]}"})
fi
# The store is looked at later: it may yet have to be made.
paths=$("$meshwright_python" - "$run_file" "$ranks" ${overrides[@]+"${overrides[@]}"} <<'PYTHON'
import sys
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file

try:
    run_file = read_run_file(sys.argv[1], sys.argv[3:], world_size=int(sys.argv[2]))
except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(run_file.data.store, run_file.run.output_folder, run_file.train.steps, sep="\n")
PYTHON
)
store=$(sed -n 1p <<<"$paths")
folder=$(sed -n 2p <<<"$paths")
steps=$(sed -n 3p <<<"$paths")

# 3. The corpus: the Python standard library's own source, which is on every machine.
if [ ! -f "$store/meta.json" ]; then
    [ "$run_file" = "$default_run_file" ] ||
        stop "data.store = \"$store\": there is no token store; meshwright prepare --out $store YOUR_TEXT makes one"
    [ "$may_install" = 1 ] || stop "data.store = \"$store\": the corpus is not prepared." "$login_node_command"
    meshwright prepare --out "$store" --vocab-size 4096
fi
if [ "$only_prepare" = 1 ]; then
    echo "Ready: $meshwright_python and the corpus in $root/$store."
    exit 0
fi

# 4. Train: every rank is the same command, and finds its place by itself.
prepared=$(date +%s)
train=(train "$run_file" ${overrides[@]+"${overrides[@]}"})
if [ -n "$in_job" ]; then
    cores=$((${SLURM_CPUS_ON_NODE:-1} / per_node))
    echo "Job $in_job: $ranks ranks on $nodes nodes (${SLURM_JOB_NODELIST:-}), $root"
    if [ "$cores" -gt 0 ]; then share=(--cpus-per-task="$cores"); else share=(--overcommit); fi
    # --overlap: also from inside another step, such as an interactive shell. A rank that ends in error ends them all.
    srun --nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$per_node" "${share[@]}" --overlap --kill-on-bad-exit=1 \
        "$meshwright_python" -m meshwright.launcher "${train[@]}"
else
    meshwright "${train[@]}" --ranks "$per_node"
fi

# 5. Export and sample, on this node alone; not when a signal ended the training early.
trained=$(date +%s)
done_steps=$("$meshwright_python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["steps"])' "$folder/summary.json")
if [ "$done_steps" -lt "$steps" ]; then
    echo "Training was stopped at step $done_steps of $steps, and its checkpoint written; the same command goes on from there."
    exit 0
fi
meshwright export "$folder" --overwrite
echo
echo "A sample of what the model writes:"
echo "----------------------------------"
meshwright generate "$folder" --prompt "def read(self, " --max-new-tokens 120
echo "----------------------------------"
finished=$(date +%s)

"$meshwright_python" - "$folder" <<'PYTHON'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
reached, unigram = summary["validation_loss"], summary["unigram_entropy"]
if reached is not None and unigram is not None:
    print(f"validation loss  {reached:.3f} nats per token, on samples of the held-out text;")
    print(f"                 {unigram:.3f} is what knowing only how frequent each token is gives, on all of it")
for name, path in (
    ("run", folder),
    ("loss curve", summary.get("picture") or "not drawn"),
    ("metrics", folder / "metrics.jsonl"),
    ("checkpoint", max((folder / "checkpoints").glob("step_*"))),
    ("export", folder / "export"),
    ("its report", folder / "export" / "export_report.md"),
):
    print(f"{name:<17}{path}")
PYTHON
echo "seconds          $((finished - started)): environment $environment_seconds, corpus" \
    "$((prepared - started - environment_seconds)), training $((trained - prepared)), export and sample $((finished - trained))"
