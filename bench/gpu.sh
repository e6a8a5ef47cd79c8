#!/usr/bin/env bash
# Runs everything that needs a GPU, in stages with a time limit each; a stage that fails does not stop the next one.
#
#   bench/gpu.sh [--dry] [--out DIR] [--archive FILE] [first | second | stage ...]
#
# first is for a GPU that is lent for minutes: it runs the stages that answer most, in at most 8 minutes. second,
# in at most 4, times the variants to choose among. Without a name: build and all stages below it; with --dry, first
# and second.
#
# first runs build, these stages in order, then sanitize and ncu:
#   check     the backends against the reference     g1        attention: cuda, triton and plain, L = 512, 2048, 8192
#   g1-others FlexAttention; an attention module: ours and other libraries' where they are installed
#   peak      peak memory at 8192                    encoders  v3-base at 32 x 512 and 2 x 8192, forward, bfloat16
# second runs these:
#   workspaces  limits of the bands' workspace, CUDA and Triton             far  far keys by torch's flash attention
#   tiles       tiles, warps and stages of Triton's kernels
# The others, at most four minutes each:
#   build     the compiled extension for this GPU, with its CUDA kernels (DEBERTA_FAST_CUDA=0: without)
#   tests     pytest -m gpu                          cuda      those of the CUDA backend; runs only if it is named
#   op        attention against its neighbours       layer     an attention module against other implementations
#   dropout   attention with dropout 0.1             padding   attention with half of the tokens padding
#   memory    peak memory                            host      the host's time for a call
#   encoder   whole DeBERTa-v3-base models against others, forward; also encoder-training (with peak memory),
#             encoder-large (v3-large) and encoder-compiled (in torch.compile)
#   pretraining  steps of replaced-token detection, packed, against Hugging Face's modules on padded batches
#   long      training steps on one text of 4096 to 65536 tokens: time and memory, with checkpointing and without
#   kernels   each kernel of the fused backends, and other settings of Triton's
#   sanitize  compute-sanitizer on two small problems: memcheck and racecheck, and initcheck outside of first
#   ncu       Nsight Compute's counters of the CUDA kernels     plots     charts of all of these
#
# sanitize and ncu need programs of the CUDA toolkit (PATH, CUDA_HOME, /usr/local/cuda); without them they print a line.
# Results go to bench/results/<GPU>, or to DIR, row by row; stages.txt there has the outcome of each stage. FILE
# (.tar.gz) gets them and the logs after every stage. --dry needs no GPU and measures nothing: the same stages at toy
# sizes on CPU tensors, in Triton's interpreter and an emulator, with bench/dry/bin for the tools; results in build/dry.
# PYTHON names the interpreter, which needs torch and triton, and for the tests pytest and transformers; no network.
# build needs setuptools, nvcc and a C++ compiler (setup.py names the variables; TORCH_CUDA_ARCH_LIST is by default the
# GPU's own). In a copy without .git, COMMIT names the commit in the results.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Seconds of each stage: 480 and 230 in all.
first='build:90 check:75 g1:70 g1-others:70 peak:20 encoders:60 sanitize:50 ncu:45'
second='workspaces:75 tiles:85 far:70'
others='build tests op layer kernels sanitize ncu dropout padding memory host encoder encoder-training encoder-large
  encoder-compiled pretraining long plots'
named="cuda $(for word in $first $second; do [[ " $others " == *" ${word%:*} "* ]] || printf '%s ' "${word%:*}"; done)"

dry='' out='' archive='' stages=() brief=''
while (($#)); do
  case $1 in
    --dry) dry=yes ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    --archive) archive=${2:?--archive needs a file} && shift ;;
    -h | --help)
      sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit ;;
    first) stages+=($first) brief=yes ;;
    second) stages+=($second) brief=yes ;;
    *) [[ " ${others//$'\n'/ } $named " == *" $1 "* ]] || {
         echo "no stage $1; there are:" first second $others $named >&2 && exit 2; }
       stages+=("$1") ;;
  esac
  shift
done
if ! ((${#stages[@]})); then
  if [[ $dry ]]; then stages=($first $second) brief=yes; else stages=($others); fi
fi

if [[ $dry ]]; then
  unset CUDA_HOME CXX
  PATH=$root/bench/dry/bin:$PATH on='--device cpu' out=${out:-build/dry}
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "$python finds no torch with a GPU" >&2 && exit 2; }
  on='--device cuda'
  [[ -n $out ]] || out=$("$python" -c 'from bench import timing; print(timing.results_folder())') || exit 2
fi
logs=$root/build/gpu-logs${dry:+-dry}
mkdir -p "$out" "$logs" && rm -f "$logs"/*.{log,txt} || exit 2
out=$(cd "$out" && pwd)

# A stage is a function that runs in its own shell, so that timeout can end it.
run() {  # python -m
  "$python" -m ${dry:+bench.dry} "$@"
}

bench() {  # run a benchmark; in a dry run at toy sizes, which come last and so override the stage's options
  local module=$1 toy=''
  shift
  if [[ $dry ]]; then
    case $module in
      encoder) toy='--models tiny --tokens 32 --seconds 0' ;;
      layer_gpu) toy='--tokens 16' ;;
      pretraining) toy='--quick --steps 1' ;;
      long_gpu) toy='--size tiny --dtype float32' ;;
      far_flash) toy='--tokens 16 --heads 1 --blocks 8 16' ;;
      triton_kernels) toy='--tokens 16 --heads 1 --most 1 --kernels forward' ;;
      *) toy='--tokens 16 --heads 1' ;;
    esac
    toy+=' --lengths 16'
  fi
  run "bench.$module" "$@" $toy $on --out "$out"
}

build() {
  export DEBERTA_FAST_CUDA=${DEBERTA_FAST_CUDA:-1}
  [[ -n ${TORCH_CUDA_ARCH_LIST:-} ]] || TORCH_CUDA_ARCH_LIST=$("$python" -c 'if True:
    import torch
    print("{}.{}".format(*(torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0))))')
  export TORCH_CUDA_ARCH_LIST
  if [[ $dry ]]; then
    CXX=$root/bench/dry/bin/c++ "$python" setup.py build_ext --build-lib build/dry-library || return
  else
    "$python" setup.py build_ext --inplace || return
  fi
  [[ $DEBERTA_FAST_CUDA == 0 ]] || run_code 'if True:
    import os, sys
    from deberta_fast.op.backends import cuda
    print("CUDA kernels for", os.environ["TORCH_CUDA_ARCH_LIST"])
    sys.exit(cuda.MISSING)'
}

run_code() {
  if [[ $dry ]]; then run -c "$1"; else "$python" -c "$1"; fi
}

# The quick check comes before the full one, for which Triton compiles for a minute.
check() {
  local status=0 toy=${dry:+--quick --dtypes bfloat16}
  run bench.check $on --quick --dtypes bfloat16 float16 float32 $toy --out "$out" || status=$?
  run bench.check $on --dtypes bfloat16 --name check-full $toy --out "$out" || status=$?
  return $status
}

g1() {
  bench attention_gpu --lengths 512 2048 8192 --passes forward backward --variants cuda triton plain --name g1
}

# Both compile for some time, FlexAttention for every length and pass.
g1-others() {
  local status=0
  bench layer_gpu --lengths 512 8192 2048 --passes forward backward --seconds 30 \
    --variants patched-cuda patched-triton disentangled-flash flashdeberta || status=$?
  bench attention_gpu --lengths 512 8192 2048 --passes forward backward --seconds 60 --variants flex plain-flash \
    --name g1-flex || status=$?
  return $status
}

peak() {
  bench attention_gpu --memory --lengths 8192 --variants cuda triton plain-flash hf-eager --name peak
}

encoders() {
  bench encoder --variants eager patched native modernbert --lengths 512 8192 --shapes full variable --dtypes bfloat16 \
    --passes forward --seconds 0.2 --limit 45 --name encoders
}

workspaces() {
  local status=0
  bench cuda_kernels workspace --lengths 512 2048 8192 || status=$?
  bench triton_kernels bands --most 5 --lengths 512 2048 8192 || status=$?
  return $status
}

tiles() {
  bench triton_kernels tiles --most 4 --lengths 512 8192
}

far() {
  bench far_flash --lengths 8192 2048
}

tests() {
  # Triton compiles for most of the time, one kernel at a time in a process.
  local workers=()
  (($#)) || set -- tests/op/test_gpu.py tests/op/test_gpu_streams.py tests/op/test_gpu_selection.py tests/models/test_gpu_models.py
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  "$python" -m pytest -m gpu "$@" -v -p no:cacheprovider --durations=10 "${workers[@]}"
}

cuda() { tests tests/op/test_gpu.py tests/op/test_gpu_streams.py -k 'cuda and not triton'; }
op() { bench attention_gpu; }
layer() { bench layer_gpu; }
dropout() { bench attention_gpu --dropout 0.1 --lengths 512 2048 8192 128; }
padding() { bench attention_gpu --padding 0.5 --lengths 512 2048 8192 128; }
memory() { bench attention_gpu --memory; }
host() { bench attention_gpu --host; }
encoder() { bench encoder --passes forward; }
encoder-training() { bench encoder --passes forward+backward --name encoder-training; }
encoder-large() {
  bench encoder --models v3-large --lengths 512 8192 2048 --dtypes bfloat16 --name encoder-large
}
encoder-compiled() {  # A group of rows compiles for a minute
  bench encoder --variants eager eager+compile native native-packed native+compile modernbert modernbert+compile \
    --lengths 512 --dtypes bfloat16 --limit 150 --name encoder-compiled
}
pretraining() { bench pretraining; }
long() { bench long_gpu; }
ncu() { bench cuda_kernels ncu --lengths 512 8192; }
plots() { "$python" -m bench.plots "$out"; }

kernels() {
  local status=0
  bench cuda_kernels || status=$?
  bench triton_kernels || status=$?
  return $status
}

# Checks forward and backward of a ragged length, and of near and far tiles with masks, packed sequences and dropout, by
# all tools at once. Without torch's memory cache every tensor is its own allocation. initcheck watches all kernels to
# see what they write; its errors in kernels of others do not count.
sanitize() {
  local tool name log words pids=() names=() options summary='' failed=0 problems i
  tool=$(PATH=$PATH:${CUDA_HOME:+$CUDA_HOME/bin:}/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo 'nothing checked: there is no compute-sanitizer (PATH, CUDA_HOME, /usr/local/cuda)' && return
  }
  problems=('--lengths 129 --tokens 258 --heads 2' '--dropout 0.1 --padding 0.3 --lengths 1100 --tokens 1100 --heads 1')
  [[ -z $dry ]] || problems=("${problems[@]/%/ --lengths 17 --tokens 17 --heads 1}")
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for name in memcheck racecheck $([[ $brief ]] || echo initcheck); do
    options=(--tool "$name" --print-limit 1000)
    [[ $name == initcheck ]] || options+=(--kernel-name kns=deberta_fast --error-exitcode 99)
    for i in 0 1; do
      "$tool" "${options[@]}" "$(command -v "$python")" -m ${dry:+bench.dry} bench.cuda_kernels once \
        ${problems[i]} $on >"$logs/$name-$i.txt" 2>&1 &
      pids+=($!) names+=("$name-$i")
    done
  done
  for i in "${!pids[@]}"; do
    name=${names[i]} log=$logs/${names[i]}.txt words=ok
    wait "${pids[i]}" || words="FAILED ($?)"
    grep -q 'SUMMARY: ' "$log" || words='FAILED (no summary)'
    if [[ $name == initcheck* ]] && grep -q '^=========  *at .*deberta_fast' "$log"; then
      words='FAILED (errors found)'
    fi
    if [[ $words != ok ]]; then
      failed=1
      head -n 30 "$log" && tail -n 30 "$log"
    fi
    cp "$log" "$out/cuda-$name.txt"
    summary+="${summary:+; }$name: $words"
  done
  echo "$summary"
  return $failed
}

source "$root/bench/stages.sh"
export brief on
run_stages
