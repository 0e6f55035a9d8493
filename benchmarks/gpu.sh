#!/usr/bin/env bash
# The tests of the GPU's kernels, then training beside its peers: 1B in rows of 4,096 and an 8B's width in rows of 8,192, in bfloat16.
#
#     benchmarks/gpu.sh                 one GPU; the tables and all figures go to benchmarks/gpu/
#     SIZE=tiny benchmarks/gpu.sh       a small model on this machine's CPU, to try the script; nothing of it is a figure
#
# Needs the packages of '.[test,cuda]' and nothing from the network. LAYERS (12) of the 8B are what 80 GB hold of its state in float32.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
OUT=${OUT:-benchmarks/gpu} SIZE=${SIZE:-full} LAYERS=${LAYERS:-12} ROUNDS=${ROUNDS:-3} PYTHON=${PYTHON:-python}

measure() { # name, overrides...
  local name=$1; shift
  echo; echo "== $name"
  "$PYTHON" -m benchmarks.training "$@" --out "$OUT/$name.json"
}

case $SIZE in
  full)
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv
    JAX_PLATFORMS=cuda "$PYTHON" -m pytest -q -n 0 tests/model/test_kernels.py
    export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
    common=(precision=mixed mesh=local remat=dots_attention --device gpu --rounds "$ROUNDS" --peers pytorch pytorch_compile bare_jax)
    measure 1b model=llama3_2_1b train.seq_len=4096 train.batch_size=4 train.unroll=16 "${common[@]}"
    measure 8b_width model=llama3_8b model.dims.layers="$LAYERS" train.seq_len=8192 train.batch_size=1 train.unroll="$LAYERS" "${common[@]}"
    ;;
  tiny)
    JAX_PLATFORMS=cpu "$PYTHON" -m pytest -q -n 0 tests/model/test_kernels.py -k cudnn
    small=(model.dims.vocab=512 model.dims.layers=2 model.dims.embed=64 model.dims.heads=4 model.dims.kv_heads=2 model.dims.head_dim=16)
    small+=(model.dims.mlp=176 model.context=256 train.batch_size=4 train.seq_len=256 train.unroll=2 remat=dots_attention)
    JAX_PLATFORMS=cpu measure tiny "${small[@]}" --device cpu --loaded --rounds 1 --steps 2 --peers pytorch bare_jax
    ;;
  *) echo "no size is called $SIZE: full or tiny" >&2; exit 2 ;;
esac
echo; echo "all of it is in $OUT/"
