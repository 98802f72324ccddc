#!/usr/bin/env bash
# Everything that a short visit to a GPU should answer, most informative first. Needs no package index.
#
#     benchmarks/gpu_session.sh OUT             # on a machine with a GPU, in the source folder
#     benchmarks/gpu_session.sh OUT --dry-run   # runs nothing; checks that every command could start
#
# Each step has a time limit and a log of its own in OUT, and OUT/summary.txt gets a line as it ends. Steps that have
# passed are skipped when the script is run again with the same OUT. `--until SECONDS` starts no step that could end
# later than so many seconds from now (default: 560). Recorded answers of the device land in
# tests/cuda/conformance/golden and benchmarks/results: commit them.
#
# PYTHON is the interpreter that has torch with CUDA (default: python3). Packages that it lacks can be unpacked from
# wheels into build/gpu-session (`make gpu-wheels`).
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: gpu_session.sh OUT [--dry-run] [--until SECONDS]}
shift
dry=false
until=560
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=true ;;
        --until)
            until=${2:?--until takes a number of seconds}
            shift
            ;;
        *)
            echo "gpu_session.sh: $1 is not known; expected --dry-run or --until SECONDS" >&2
            exit 2
            ;;
    esac
    shift
done
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/build/gpu-session${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
started=$SECONDS
failures=0

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; }

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: under a limit, into OUT/NAME.log; what has passed is not run again.
step() {
    local name=$1 limit=$2
    shift 2
    if $dry; then
        say "$name: skipped (dry run): $*"
        check "$@" > "$out/$name.log" 2>&1 || { say "$name: cannot start, see $out/$name.log"; failures=$((failures + 1)); }
    elif ! $gpu; then
        say "$name: skipped: torch finds no CUDA device"
    elif [ -e "$out/$name.passed" ]; then
        say "$name: passed before"
    elif [ $((SECONDS - started + limit)) -gt "$until" ]; then
        say "$name: skipped: its $limit s do not fit before $until s"
    else
        local begin=$SECONDS code=0
        timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
        if [ $code -eq 0 ]; then
            touch "$out/$name.passed"
            say "$name: passed in $((SECONDS - begin)) s"
        else
            say "$name: FAILED with exit code $code after $((SECONDS - begin)) s; $(tail -n 1 "$out/$name.log")"
            failures=$((failures + 1))
        fi
    fi
}

# Whether a command could start: its tests are collected, its script explains itself.
check() {
    while [[ $1 == env || $1 == *=* ]]; do shift; done
    local command="$*"
    case $command in
        *" -m pytest "*) eval "${command%% -k *} --collect-only -q" ;;
        *setup.py*) test -f setup.py ;;
        *) "$@" --help ;;
    esac
}

if $dry; then gpu=false; elif has_gpu; then gpu=true; else gpu=false; fi
say "$(date -u +%FT%TZ) $("$python" --version 2>&1), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || echo 'no nvidia-smi')"

tests=("$python" -m pytest -rs -p no:cacheprovider)
parallel=("$python" -m pytest -rs -p no:cacheprovider -n 6)
bench=("$python" -m pytest -rs -p no:cacheprovider -o "python_files=bench_*.py" --benchmark-disable)

# 1. Hopper's primitives, alone: a wrong one hangs, so waits are bounded. Then the kernels, with bounded waits too.
step conformance 90 "${tests[@]}" tests/cuda/conformance -x
step build-bounded 180 env PYQEMB_CUDA=on CUDAARCHS="80;90a" CUDAFLAGS=-DQEMB_BOUNDED_SPINS "$python" setup.py build_ext --inplace --force
step doctor 100 "$python" -m pyqemb doctor --json
step ops-attention 120 "${parallel[@]}" tests/cuda/test_ops.py -k attention
step ops-loss 120 "${parallel[@]}" tests/cuda/test_ops.py -k "info_nce or top_k"
step ops-others 120 "${parallel[@]}" tests/cuda/test_ops.py -k "not attention and not info_nce and not top_k"
step sanitizer 180 "${tests[@]}" tests/cuda/test_sanitizer.py

# 2. The code that users get: with bounds ptxas spills and lets products run one by one, which hides races. Then speed,
# against cuDNN, FlashAttention, torch's varlen, FlexAttention, compiled torch, memeff.
step build 180 env PYQEMB_CUDA=on CUDAARCHS="80;90a" "$python" setup.py build_ext --inplace --force
step ops-unbounded 150 "${parallel[@]}" tests/cuda/test_ops.py -k "attention or info_nce or top_k"
step bench-attention 150 env PYQEMB_KERNELS=90 "${bench[@]}" benchmarks/cuda/bench_attention.py -k "(full and (128 or 512 or 2048)) or one_query"
step bench-loss 120 env PYQEMB_KERNELS=90 "${bench[@]}" benchmarks/cuda/bench_loss.py -k "bfloat16 or many"
step training 120 "${tests[@]}" tests/cuda/test_training.py
step bench-model 150 "${bench[@]}" benchmarks/cuda/bench_model.py
step bench-small-ops 90 "${bench[@]}" benchmarks/cuda/bench_small_ops.py
step bench-causal 150 env PYQEMB_KERNELS=90 "${bench[@]}" benchmarks/cuda/bench_attention.py -k "causal"

say "done after $((SECONDS - started)) s, $failures failed"
[ $failures -eq 0 ]
