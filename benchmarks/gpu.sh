#!/usr/bin/env bash
# Measures one GPU, all of it in bfloat16. The three parts are:
#
#     tests      the tests of the GPU's kernels
#     training   beside PyTorch: a 1B in rows of 4,096, and layers of an 8B's width in rows of 8,192
#     decoding   an 8B and a 1B: 1 row and 128 rows; a prompt of 512 in 32 rows; a prompt of 4,096 in 4 rows
#
# Usage:
#
#     benchmarks/gpu.sh                 one GPU; the tables and all figures go to benchmarks/gpu/
#     PARTS=decoding benchmarks/gpu.sh  some of: tests training decoding
#     SIZE=tiny benchmarks/gpu.sh       a small model on this machine's CPU, to try the script; do not use its figures
#
# The script needs the packages of '.[test,cuda]' and nothing from the network.
#
# ROWS_1B and ROWS_8B are lists of numbers of rows. Each number makes a table. A side that runs out of memory says so and is left out of it.
# With PEERS= ROWS_1B=10 ROWS_8B=5 REMAT_8B=dots_attention, llama_eqx runs alone and fills 80 GB. The 8B has LAYERS (8) of its layers.
# The norm of the update is not measured (train.meters=[]), because PyTorch's side does not measure it either.
#
# Decoding is compared with what the card can do. DECODING_PEERS="pytorch, compiled" also compares it with PyTorch.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
SIZE=${SIZE:-full} LAYERS=${LAYERS:-8} ROWS_1B=${ROWS_1B-4} ROWS_8B=${ROWS_8B-1} REMAT_8B=${REMAT_8B:-none} ROUNDS=${ROUNDS:-3} PYTHON=${PYTHON:-python}
PARTS=${PARTS:-tests training decoding} PEERS=${PEERS-pytorch pytorch_compile} DECODING_PEERS=${DECODING_PEERS:-}
if [ "$SIZE" = tiny ]; then OUT=${OUT:-$(mktemp -d)}; else OUT=${OUT:-benchmarks/gpu}; fi

measure() { # module, name, options...
  local module=$1 name=$2; shift 2
  echo; echo "== $name"
  "$PYTHON" -m "benchmarks.$module" "$@" --out "$OUT/$name.json"
}

full_tests() { "$PYTHON" -m pytest -q -n 0 tests/model/test_kernels.py -k "not several and not splash"; }

full_training() {
  local rows common=(precision=mixed mesh=h100x1 loss.chunk=8192 train.meters=[] --device gpu --steps 10 --rounds "$ROUNDS" --peers $PEERS)
  for rows in $ROWS_1B; do
    measure training "1b_$rows" model=llama3_2_1b train.seq_len=4096 train.batch_size="$rows" train.unroll=16 "${common[@]}"
  done
  for rows in $ROWS_8B; do
    measure training "8b_width_$rows" model=llama3_8b model.dims.layers="$LAYERS" train.seq_len=8192 train.batch_size="$rows" \
      train.unroll="$LAYERS" remat="$REMAT_8B" "${common[@]}"
  done
}

full_decoding() {
  local common=(--device gpu --precision bfloat16 --rounds "$ROUNDS" --steps 3 --peers ${DECODING_PEERS:+"$DECODING_PEERS"})
  measure decoding decoding --models 8b 1b --batches 1 128 --prompt 128 --new 256 "${common[@]}"
  measure decoding prompts_of_512 --models 8b 1b --batches 32 --prompt 512 --new 16 "${common[@]}"
  measure decoding prompts_of_4096 --models 8b 1b --batches 4 --prompt 4096 --new 16 "${common[@]}"
}

tiny_tests() { "$PYTHON" -m pytest -q -n 0 tests/model/test_kernels.py -k cudnn; }

tiny_training() {
  local small=(model.dims.vocab=512 model.dims.layers=2 model.dims.embed=64 model.dims.heads=4 model.dims.kv_heads=2 model.dims.head_dim=16)
  small+=(model.dims.mlp=176 model.context=256 train.batch_size=4 train.seq_len=256 train.unroll=2 remat=dots_attention)
  measure training tiny "${small[@]}" --device cpu --loaded --rounds 1 --steps 2 --peers pytorch bare_jax
}

tiny_decoding() {
  local common=(--models smoke --precision bfloat16 --loaded --rounds 1 --steps 2 --new 64)
  measure decoding tiny_decoding --batches 1 4 --prompt 16 "${common[@]}" --peers pytorch
  measure decoding tiny_prompts --batches 4 --prompt 64 --chunk 32 "${common[@]}" --peers
}

case $SIZE in
  full)
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv
    export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    ;;
  tiny) export JAX_PLATFORMS=cpu ;;
  *) echo "no size is called $SIZE: full or tiny" >&2; exit 2 ;;
esac
for part in $PARTS; do "${SIZE}_$part"; done
echo; echo "all of it is in $OUT/"
