# shellcheck shell=bash
# What slurm/pretrain_*.sh do, by hand and in a Slurm job; they source it with their arguments, and have set
#
#   root               the clone
#   script             their own name, for messages
#   default_run_file   what is trained unless MESHWRIGHT_RUN_FILE says otherwise, from the clone
#   one_rank           an array: what must be overridden in it where there is one rank
#
# shellcheck disable=SC2154  # set by those who source it

stop() {
    printf '%s\n' "$@" >&2
    exit 2
}

count_gpus() {
    if command -v nvidia-smi >/dev/null; then
        "$meshwright_python" -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

started=$(date +%s)
in_job=${SLURM_JOB_ID:-}
may_install=1
if [ -n "$in_job" ] && [ "${MESHWRIGHT_INSTALL_IN_JOB:-0}" != 1 ]; then may_install=0; fi
login_node_command="On a login node, in $root: bash slurm/$script --prepare"

only_prepare=0
overrides=()
for argument in "$@"; do
    case $argument in
        --prepare) only_prepare=1 ;;
        -h | --help)
            sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$root/slurm/$script"
            exit 0
            ;;
        [a-z]*=*) overrides+=("$argument") ;;
        *) stop "$argument: neither KEY=VALUE nor --prepare; bash slurm/$script --help explains both" ;;
    esac
done
if [ "$only_prepare" = 1 ]; then may_install=1; fi

default_run_file=$root/$default_run_file
run_file=$(realpath -m "${MESHWRIGHT_RUN_FILE:-$default_run_file}")
cd "$root" || exit 2

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
    [ "${#one_rank[@]}" = 0 ] || echo "One rank: ${one_rank[*]}."
    overrides=(${one_rank[@]+"${one_rank[@]}"} ${overrides[@]+"${overrides[@]}"})
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
