#!/bin/bash
# Everything to be measured on one GPU, in an order that 30 minutes of a rented card can hold. Each part ends within nine minutes
# (seconds on an H200, by the clock of one lease: levers 234, memory 170 beside check, curves 515, sizes 277; peers 162 with what it
# compiles in the cache) and writes its own file into $OUT (bench/out); one that fails does not stop the next.
#
#   bench/gpu.sh check        1  attention's gradients; losses against the CPU's; resume; where the time of a step goes
#   bench/gpu.sh peers        2  the 124M recipe's step beside build-nanogpt, nanoGPT (in peers/) and transformers
#   bench/gpu.sh levers       3  ours with one thing changed at a time
#   bench/gpu.sh memory       4  peak memory at B = 16, 32, 64
#   bench/gpu.sh evaluations  5  seconds of the first and later HellaSwag and validations
#   bench/gpu.sh curves       6  124M trained from text with both recipes, 4 minutes each (105M tokens)
#   bench/gpu.sh sizes        7  350M, 774M and 1558M
#   bench/gpu.sh all             1 to 7
#   bench/gpu.sh record          124M at the paper's batch for some 25 minutes, gpt2 against fast with one schedule length and
#                                seed; whatever ended it, the same command goes on
#   bench/gpu.sh ddp             several ranks (RANKS=2): what torch.compile does to DDP, in both orders
#   bench/gpu.sh rehearse        1 to 7 and record in miniature, on the CPU
#   bench/gpu.sh emulate         the same on the emulated card of tests/emulated/, where graphs are traced and run uncompiled
#
# More flags go to the part's bench/*.py, behind ours. $PYTHON is the Python to use. Wants data/python-docs (makes it if it
# isn't there); `evaluations` wants $HELLA, a local hellaswag_val.jsonl(.gz); `evaluations` and `curves` read the shards in
# $DATA, which fineweb.py makes from $TEXT where they are missing.
set -eu -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
DATA=${DATA:-data/corpus}
HELLA=${HELLA:-}
what=${1:?check, peers, levers, memory, evaluations, curves, sizes, record, ddp, all, rehearse or emulate}
shift
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
SMALL=${SMALL:-}  # the device of a rehearsal
if [ -n "$SMALL" ]; then
    step="--device $SMALL --n_layer 1 --seq_len 64 --micro_batch 2 --accumulate 2 --rounds 1 --steps 1 --warmup 1"
    one="--device $SMALL --n_layer 1 --seq_len 64"
    device=$SMALL steps=2 B=2
    record="--total_batch_size 128 --max_steps 4 --val_tokens 256 --val_every 2 --save_every 2 --warmup_steps 1"
    run="--total_batch_size 128 --max_steps 4 --val_tokens 256 --warmup_steps 1"
    sizes="gpt2-medium:2 gpt2-large:2 gpt2-xl:2"
else
    step="--device cuda --micro_batch 64 --accumulate 8 --rounds 5 --steps 2 --at_once 0"
    one="--device cuda"
    device=cuda steps=20 B=64
    run="--total_batch_size 131072 --max_steps 800 --val_every 50 --val_tokens 1048576 --sample_every 400 --warmup_steps 60"
    record="--max_steps 640 --val_every 64 --save_every 64 --val_tokens 2097152 --warmup_steps 64"  # 336M tokens
    sizes="gpt2-medium:32 gpt2-large:32 gpt2-xl:16"
fi
step="$PYTHON bench/train_step.py $step"

if [ ! -e data/python-docs/manifest.json ]; then
    $PYTHON fineweb.py --dataset python-docs --out data/python-docs
fi
if [ -n "${TEXT:-}" ] && [ ! -e "$DATA/manifest.json" ]; then
    # shellcheck disable=SC2086
    $PYTHON fineweb.py --input $TEXT --out "$DATA" --val_size 2000000 2>&1 | tail -n 3
fi

case $what in
check)
    $PYTHON bench/cuda_check.py --device $device --steps $steps "$@" 2>&1 |
        tee "$OUT/check.md"
    $PYTHON bench/profile.py $one --compile --micro_batch $B "$@" 2>&1 | tee "$OUT/profile.md"
    ;;
peers)
    $step --peer peers/build-nanogpt peers/nanoGPT --variants build-nanogpt ours,compile build-nanogpt,compile \
        nanoGPT,compile transformers,compile "$@" 2>&1 | tee "$OUT/peers.md"
    ;;
levers)
    $step --accumulate 4 --variants ours,compile ours,compile,sdpa=cudnn ours,compile,sdpa=flash \
        ours,compile,plain_loss ours,compile,no_fast_math ours,compile,autotune_pointwise \
        ours,compile,sigmoid_gelu ours,compile,no_bf16_residual ours,compile,recompute ours,compile,recipe=fast "$@" 2>&1 | tee "$OUT/levers.md"
    ;;
memory)
    $PYTHON bench/memory.py $one ${SMALL:+--micro_batches 1 2} "$@" 2>&1 | tee "$OUT/memory.md"
    ;;
evaluations)
    $PYTHON bench/evaluations.py $one --data_dir "$DATA" --hella_data "$HELLA" \
        ${SMALL:+--hella_limit 20 --micro_batch 2} "$@" 2>&1 | tee "$OUT/evaluations.md"
    ;;
curves)
    for recipe in gpt2 fast; do  # 105M tokens each
        $PYTHON train_gpt2.py --recipe $recipe --data_dir "$DATA" --log_dir "$OUT/$recipe" $one $run \
            --hella_every 0 --save_every 0 "$@" 2>&1 | tee "$OUT/$recipe.txt"
    done
    $PYTHON plot_log.py "$OUT/gpt2" "$OUT/fast" --out "$OUT/curves.png"
    ;;
sizes)
    for size in $sizes; do
        $step --model "${size%:*}" --micro_batch "${size#*:}" --accumulate 4 --rounds 2 --steps 1 \
            --variants ours,compile "$@" 2>&1 | tee -a "$OUT/sizes.md"
    done
    ;;
record)
    for recipe in gpt2 fast; do
        $PYTHON train_gpt2.py --recipe $recipe --data_dir "$DATA" --log_dir "$OUT/record/$recipe" --resume $one $record \
            --hella_every 0 --sample_every 0 "$@" 2>&1 | tee -a "$OUT/record-$recipe.txt"
    done
    $PYTHON plot_log.py "$OUT/record/gpt2" "$OUT/record/fast" --out "$OUT/record.png"
    ;;
ddp)
    ranks=ours,ranks=${RANKS:-2}
    $step --variants "$ranks" "$ranks,compile" "$ranks,compile,ddp_whole" "$ranks,compile,ddp_inside" "$@" 2>&1 |
        tee "$OUT/ddp.md"
    ;;
all)
    for part in check peers levers memory evaluations curves sizes; do
        bash bench/gpu.sh $part || echo "bench/gpu.sh $part: exit status $?"
    done
    ;;
rehearse)
    for part in all record; do
        SMALL=cpu OUT=$OUT/rehearsal bash bench/gpu.sh $part
    done
    ;;
emulate)
    export PYTHONPATH=$PWD/tests/emulated/everywhere:$PWD
    for part in all record; do
        SMALL=cuda OUT=$OUT/emulation bash bench/gpu.sh $part
    done
    ;;
*) echo "bench/gpu.sh: $what is none of the parts; see its first lines" >&2 && exit 2 ;;
esac
