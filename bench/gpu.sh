#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most four minutes; the next one runs also where one fails.
#
#   bench/gpu.sh [--out DIR] [--archive FILE] [stage ...]     without a stage: all of them, in the order below
#
#   build     the compiled extension, of which the CPU backend is a part
#   tests     pytest -m gpu
#   op        attention against its neighbours          layer     an attention module against other implementations
#   dropout   attention with dropout 0.1                padding   attention with half of the tokens padding
#   memory    peak memory                               host      the host's time for a call
#   kernels   each Triton kernel, and other settings    plots     charts of all of these
#
# Results go to bench/results/ and the GPU's name, or to DIR; FILE (.tar.gz) gets them and the logs after every stage.
# PYTHON names the interpreter, which needs torch and triton, for the tests also pytest and transformers, no network.
# In a copy without .git, COMMIT tells the results which commit it is.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
limit=240
all=(build tests op layer kernels dropout padding memory host plots)

out='' archive='' stages=()
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder} && shift ;;
    --archive) archive=${2:?--archive needs a file} && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit ;;
    *) [[ " ${all[*]} " == *" $1 "* ]] || { echo "no stage $1; there are: ${all[*]}" >&2 && exit 2; }
       stages+=("$1") ;;
  esac
  shift
done
((${#stages[@]})) || stages=("${all[@]}")

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "$python finds no torch with a GPU" >&2 && exit 2; }
[[ -n $out ]] || out=$("$python" -c 'from bench import timing; print(timing.results_folder())') || exit 2
mkdir -p "$out" build/gpu-logs && rm -f build/gpu-logs/*.log || exit 2
out=$(cd "$out" && pwd)

# In a subshell, whose place the command takes: to end $! is to end the command.
stage() {
  local kind=(exec timeout --kill-after=10 "$limit" "$python")
  case $1 in
    build)
      "${kind[@]}" setup.py build_ext --inplace ;;
    tests)
      # Kernels are compiled for most of the time, one at a time in a process.
      local workers=()
      "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
      "${kind[@]}" -m pytest -m gpu tests -v -p no:cacheprovider --durations=10 "${workers[@]}" ;;
    op) "${kind[@]}" -m bench.attention_gpu --out "$out" ;;
    layer) "${kind[@]}" -m bench.layer_gpu --out "$out" ;;
    dropout) "${kind[@]}" -m bench.attention_gpu --dropout 0.1 --lengths 512 2048 8192 128 --out "$out" ;;
    padding) "${kind[@]}" -m bench.attention_gpu --padding 0.5 --lengths 512 2048 8192 128 --out "$out" ;;
    memory) "${kind[@]}" -m bench.attention_gpu --memory --out "$out" ;;
    host) "${kind[@]}" -m bench.attention_gpu --host --out "$out" ;;
    kernels) "${kind[@]}" -m bench.triton_kernels --out "$out" ;;
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
  lines+=("$(printf '%-8s %4d s  %s: %s' "$name" $((SECONDS - start)) "$word" "$(tail -n 1 "$log" | cut -c -100)")")
  echo "${lines[-1]}"
  pack
done
finish "$failed"
