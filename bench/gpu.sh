#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most four minutes; the next one runs also where one fails.
#
#   bench/gpu.sh [--out DIR] [--archive FILE] [stage ...]     without a stage: all of them, in the order below
#
#   build     the compiled extension: its CUDA kernels, for this GPU, have to be in it (DEBERTA_FAST_CUDA=0: without)
#   tests     pytest -m gpu                              cuda      of these the CUDA backend's; only where it is named
#   op        attention against its neighbours          layer     an attention module against other implementations
#   dropout   attention with dropout 0.1                padding   attention with half of the tokens padding
#   memory    peak memory                               host      the host's time for a call
#   encoder   whole DeBERTa-v3-base models against others, forward; also encoder-training (with peak memory),
#             encoder-large (v3-large) and encoder-compiled (in torch.compile)
#   kernels   each kernel of the fused backends, and other settings of Triton's
#   sanitize  compute-sanitizer's memcheck, racecheck and initcheck on a few tests of the CUDA kernels
#   ncu       Nsight Compute's counters of the CUDA kernels     plots     charts of all of these
#
# sanitize and ncu need what comes with a CUDA toolkit (PATH, CUDA_HOME, /usr/local/cuda); without it a line says so.
# Results go to bench/results/ and the GPU's name, or to DIR; FILE (.tar.gz) gets them and the logs after every stage.
# PYTHON names the interpreter, which needs torch and triton, for the tests also pytest and transformers, no network;
# build needs setuptools, nvcc and a C++ compiler (setup.py names the variables; TORCH_CUDA_ARCH_LIST is by default the
# GPU's own).
# In a copy without .git, COMMIT tells the results which commit it is.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
limit=240
all=(build tests op layer kernels sanitize ncu dropout padding memory host encoder encoder-training encoder-large
  encoder-compiled plots)
named=(cuda)
# The tests that sanitize runs: forward and backward, near and far tiles, masks, dropout.
checked='cuda and bf16 and (ragged-L129-D64 or holes-L200 or dropout-L140)'

out='' archive='' stages=()
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder} && shift ;;
    --archive) archive=${2:?--archive needs a file} && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit ;;
    *) [[ " ${all[*]} ${named[*]} " == *" $1 "* ]] || {
         echo "no stage $1; there are: ${all[*]} ${named[*]}" >&2 && exit 2; }
       stages+=("$1") ;;
  esac
  shift
done
((${#stages[@]})) || stages=("${all[@]}")

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "$python finds no torch with a GPU" >&2 && exit 2; }
[[ -n $out ]] || out=$("$python" -c 'from bench import timing; print(timing.results_folder())') || exit 2
mkdir -p "$out" build/gpu-logs && rm -f build/gpu-logs/*.{log,txt} || exit 2
out=$(cd "$out" && pwd)

# Stages of several commands: functions that a shell of their own runs, so that timeout can end it.
build() {
  export DEBERTA_FAST_CUDA=${DEBERTA_FAST_CUDA:-1}
  [[ -n ${TORCH_CUDA_ARCH_LIST:-} ]] || TORCH_CUDA_ARCH_LIST=$(
    "$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  export TORCH_CUDA_ARCH_LIST
  "$python" setup.py build_ext --inplace || return
  "$python" -c 'if True:
    import os, sys
    from deberta_fast.op.backends import cuda, extension
    missing = extension.NOT_LOADED or (None if extension.implements("cuda_forward", "CUDA") else "it has no CUDA kernels")
    if missing and os.environ["DEBERTA_FAST_CUDA"] == "1":
        sys.exit(f"not the extension that was wanted: {missing}")
    print("CUDA kernels for", "no GPU" if missing else os.environ["TORCH_CUDA_ARCH_LIST"])'
}

kernels() {
  local status=0
  "$python" -m bench.cuda_kernels --out "$out" || status=$?
  "$python" -m bench.triton_kernels --out "$out" || status=$?
  return $status
}

# All three tools at once. Without torch's cache of memory every tensor is an allocation of its own. initcheck looks at
# all kernels, to see what they write; what it says of others than ours does not count.
sanitize() {
  local tool name status log words pids=() options summary='' failed=0
  tool=$(PATH=$PATH:${CUDA_HOME:+$CUDA_HOME/bin:}/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo 'nothing checked: there is no compute-sanitizer (PATH, CUDA_HOME, /usr/local/cuda)' && return
  }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  trap 'kill "${pids[@]}"; exit 143' TERM
  for name in memcheck racecheck initcheck; do
    options=(--tool "$name" --print-limit 1000)
    [[ $name == initcheck ]] || options+=(--kernel-name kns=deberta_fast --error-exitcode 99)
    timeout --kill-after=5 $((limit - 20)) "$tool" "${options[@]}" "$python" -m pytest -q -p no:cacheprovider \
      tests/op/test_gpu.py -k "$checked" >"build/gpu-logs/$name.txt" 2>&1 &
    pids+=($!)
  done
  for name in memcheck racecheck initcheck; do
    status=0 log=build/gpu-logs/$name.txt
    wait "${pids[0]}" || status=$?
    pids=("${pids[@]:1}")
    words=$(grep -Eo '[0-9]+ (passed|failed|skipped)' "$log" | paste -sd' ')
    if [[ $name == initcheck ]] && grep -q '^=========  *at .*deberta_fast' "$log"; then status=99; fi
    if ((status == 0)) && [[ $words != *passed* ]]; then status=1; fi
    if ((status)); then
      failed=1 words+=" (status $status)"
      head -n 30 "$log" && tail -n 30 "$log"
    fi
    ((status != 99)) || words+=', ERRORS FOUND'
    cp "$log" "$out/cuda-$name.txt"
    summary+="${summary:+; }$name: ${words:-nothing}"
  done
  echo "$summary"
  return $failed
}
export -f build kernels sanitize
export python out limit checked

# In a subshell, whose place the command takes: to end $! is to end the command.
stage() {
  local timed=(exec timeout --kill-after=10 "$limit")
  local kind=("${timed[@]}" "$python")
  case $1 in
    build | kernels | sanitize) "${timed[@]}" bash -c "$1" ;;
    tests | cuda)
      # Triton compiles for most of the time, one kernel at a time in a process.
      local workers=() which=(tests/op/test_gpu.py tests/models/test_gpu_models.py)
      "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
      [[ $1 != cuda ]] || which=(tests/op/test_gpu.py -k 'cuda and not triton')
      "${kind[@]}" -m pytest -m gpu "${which[@]}" -v -p no:cacheprovider --durations=10 "${workers[@]}" ;;
    op) "${kind[@]}" -m bench.attention_gpu --out "$out" ;;
    layer) "${kind[@]}" -m bench.layer_gpu --out "$out" ;;
    dropout) "${kind[@]}" -m bench.attention_gpu --dropout 0.1 --lengths 512 2048 8192 128 --out "$out" ;;
    padding) "${kind[@]}" -m bench.attention_gpu --padding 0.5 --lengths 512 2048 8192 128 --out "$out" ;;
    memory) "${kind[@]}" -m bench.attention_gpu --memory --out "$out" ;;
    host) "${kind[@]}" -m bench.attention_gpu --host --out "$out" ;;
    encoder) "${kind[@]}" -m bench.encoder --passes forward --out "$out" ;;
    encoder-training) "${kind[@]}" -m bench.encoder --passes forward+backward --name "$1" --out "$out" ;;
    encoder-large)
      "${kind[@]}" -m bench.encoder --models v3-large --lengths 512 8192 2048 --dtypes bfloat16 --name "$1" --out "$out" ;;
    encoder-compiled)
      # A group of rows compiles for a minute
      "${kind[@]}" -m bench.encoder --variants eager eager+compile native native-packed native+compile modernbert \
        modernbert+compile --lengths 512 --dtypes bfloat16 --limit 150 --name "$1" --out "$out" ;;
    ncu) "${kind[@]}" -m bench.cuda_kernels ncu --out "$out" ;;
    plots) "${kind[@]}" -m bench.plots "$out" ;;
  esac
}

pack() {
  [[ -z $archive ]] || tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")" -C "$root/build" gpu-logs
}

finish() {
  echo && printf '%s\n' "${lines[@]}" && echo "results: $out"
  pack
  exit "$1"
}

lines=() failed=0
trap 'kill "${!:-}" 2>/dev/null; finish 143' TERM INT
for name in "${stages[@]}"; do
  log=build/gpu-logs/$name.log start=$SECONDS
  # In the background: a signal is answered at once, not when the stage ends.
  stage "$name" >"$log" 2>&1 &
  wait $!
  status=$? word=ok
  if ((status)); then
    word="FAILED ($status)" failed=1
    ((status == 124 || status == 137)) && word="STOPPED after $limit s"
    tail -n 40 "$log"
  fi
  lines+=("$(printf '%-16s %4d s  %s: %s' "$name" $((SECONDS - start)) "$word" "$(tail -n 1 "$log" | cut -c -100)")")
  echo "${lines[-1]}"
  pack
done
finish "$failed"
