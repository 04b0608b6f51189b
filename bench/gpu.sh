#!/bin/sh
# All that is to be known of speed on one GPU: checks first, then tables, each in a file of $OUT (bench/out).
#
#   bench/gpu.sh check                  the tests of speed, and a first table in which all losses must agree
#   bench/gpu.sh peers [flags]          ours beside the checkouts in peers/ and transformers: the 124M recipe's step
#   bench/gpu.sh levers [flags]         ours with one lever changed at a time
#   bench/gpu.sh sizes [flags]          350M, 774M and 1558M
#   bench/gpu.sh ddp [flags]            several ranks: what torch.compile does to DDP, in both orders
#   bench/gpu.sh where [flags]          the profile, the wait for data, and the time of evaluations
#   bench/gpu.sh rehearse               all of it in miniature, on the CPU
#
# Flags go to bench/train_step.py, after ours; RANKS=2 says how many ranks `ddp` has. Wants data/python-docs (makes it if
# it isn't there) and, for `peers`, peers/build-nanogpt and peers/nanoGPT. $PYTHON is the Python to use; each part ends
# within ten minutes on an H200.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
what=${1:?check, peers, levers, sizes, ddp, where or rehearse}
shift
mkdir -p "$OUT"
step="$PYTHON bench/train_step.py --device cuda --micro_batch 64 --accumulate 8 --rounds 3 --steps 2"

if [ ! -e data/python-docs/manifest.json ] && [ ! -e data/python-docs/edufineweb_train_000001.npy ]; then
    $PYTHON fineweb.py --dataset python-docs --out data/python-docs
fi

case $what in
check)
    $PYTHON -m pytest -q tests/test_speed.py || echo "tests of speed: failed, or no pytest here"
    $step --accumulate 1 --rounds 1 --variants ours,compile ours ours,recompute ours,compile,sdpa=cudnn \
        ours,compile,sdpa=flash "$@" | tee "$OUT/check.md"
    ;;
peers)
    $step --peer peers/build-nanogpt peers/nanoGPT --variants build-nanogpt ours,compile build-nanogpt,compile \
        nanoGPT,compile transformers,compile ours "$@" | tee "$OUT/peers.md"
    ;;
levers)
    $step --variants ours,compile ours,compile,sdpa=cudnn ours,compile,sdpa=flash ours,compile,no_bf16_residual \
        ours,compile,no_padding ours,compile,no_fusion ours,compile,no_frozen_garbage ours,compile,recompute \
        "$@" | tee "$OUT/levers.md"
    $step --micro_batch 32 --accumulate 16 --variants ours,compile ours,compile,sdpa=cudnn "$@" | tee -a "$OUT/levers.md"
    ;;
sizes)
    for size in "gpt2-medium 32" "gpt2-large 16" "gpt2-xl 16"; do
        $step --model "${size% *}" --micro_batch "${size#* }" --accumulate 4 --rounds 2 \
            --variants ours,compile ours,compile,recompute "$@" | tee -a "$OUT/sizes.md"
    done
    ;;
ddp)
    $PYTHON -c "import sys, torch; sys.exit(0 < torch.cuda.device_count() < ${RANKS:-2})" ||
        { echo "bench/gpu.sh: ddp wants ${RANKS:-2} cards; set RANKS" >&2 && exit 2; }
    ranks=ours,ranks=${RANKS:-2}
    for accumulate in 1 4; do
        $step --variants "$ranks" "$ranks,compile" "$ranks,compile,ddp_whole" "$ranks,compile,ddp_inside" \
            "$@" --accumulate $accumulate | tee -a "$OUT/ddp.md"
    done
    ;;
where)
    $PYTHON bench/profile.py --compile --micro_batch 64 --trace "$OUT/trace.json" "$@" | tee "$OUT/where.md"
    $PYTHON bench/data_wait.py --compile "$@" | tee -a "$OUT/where.md"
    ;;
rehearse)
    small="--device cpu --n_layer 1 --seq_len 64 --micro_batch 2 --accumulate 2 --rounds 1 --steps 1 --warmup 1"
    for part in check peers levers sizes ddp; do
        # shellcheck disable=SC2086
        PYTHON=$PYTHON OUT=$OUT/rehearsal sh bench/gpu.sh $part $small
    done
    PYTHON=$PYTHON OUT=$OUT/rehearsal sh bench/gpu.sh where --device cpu --n_layer 1 --seq_len 64 --micro_batch 2
    ;;
*) echo "bench/gpu.sh: $what is none of check, peers, levers, sizes, ddp, where, rehearse" >&2 && exit 2 ;;
esac
