#!/usr/bin/env bash
# Measures on a CPU what README.md says about one, in stages with a time limit each, 20 minutes in all; a stage that fails
# does not stop the next one. Leave the machine idle otherwise; each result names its load at the start.
#
#   bench/cpu.sh [--dry] [--out DIR] [stage ...]
#
# By default all stages run in this order. A stage gets other seconds as STAGE:SECONDS.
#   build     the compiled extension, without CUDA kernels
#   machine   instructions and libraries; the speed of torch's products, and the oneDNN kernels that they take
#   check     python -m deberta_fast check: correctness of all backends, their times against SDPA
#   operator  the operator against SDPA: 128, 512, 2048; bfloat16 and float32, forward and backward, one thread and all
#   operator-long     the same at 8192, all threads          memory    an attention module's peak memory at 4096
#   encoder           whole models at 128 and 512, forward   encoder-long     at 2048, lengths vary
#   encoder-training  a training step at 512                 host      the host's time for a small call
#
# Results go to bench/results/cpu-<processor>, or to DIR, row by row; stages.txt there has the outcome of each stage. Rows
# that a stage did not reach in its time are missing: run it again with more. --dry measures nothing: the same stages at
# toy sizes; results in build/dry-cpu. PYTHON names the interpreter, which needs torch and transformers, and for all
# columns onnxruntime and onnxscript; no network. build needs setuptools and a C++ compiler.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_VISIBLE_DEVICES=
all='build:90 machine:40 check:80 operator:170 operator-long:100 memory:70 encoder:270 encoder-long:180
  encoder-training:170 host:30'

dry='' out='' archive='' stages=()
while (($#)); do
  case $1 in
    --dry) dry=yes ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    -h | --help)
      sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit ;;
    *)
      known=''
      for entry in $all; do
        [[ $1 == "${entry%:*}" ]] && known=$entry
        [[ $1 =~ ^"${entry%:*}":[0-9]+$ ]] && known=$1
      done
      [[ $known ]] || { echo "no stage $1; there are:" $all >&2 && exit 2; }
      stages+=("$known") ;;
  esac
  shift
done
((${#stages[@]})) || stages=($all)

if [[ $dry ]]; then
  unset CXX
  PATH=$root/bench/dry/bin:$PATH out=${out:-build/dry-cpu}
else
  [[ -n $out ]] || out=$("$python" -c 'from bench import timing; print(timing.folder_of_processor())') || exit 2
fi
threads=$("$python" -c 'import torch; print(torch.get_num_threads())') || exit 2
logs=$root/build/cpu-logs${dry:+-dry}
mkdir -p "$out" "$logs" && rm -f "$logs"/*.log || exit 2
out=$(cd "$out" && pwd) && out=${out#"$root"/}  # results name it

bench() {  # run a benchmark; in a dry run at toy sizes, which come last and so override the stage's options
  local module=$1 toy=''
  shift
  if [[ $dry ]]; then
    case $module in
      machine) toy='--rows 16 --seconds 0' ;;
      check) toy='--quick --dtypes bfloat16' ;;
      host) toy='--seconds 0' ;;
      cpu) toy='--lengths 16 --seconds 0 --threads 1 --memory-length 16 --passes forward+backward' ;;
      operator_cpu) toy='--lengths 16 --seconds 0 --threads 1' ;;
      encoder) toy='--models tiny --lengths 16 --tokens 32 --seconds 0 --threads 1' ;;
    esac
  fi
  "$python" -m "bench.$module" "$@" $toy --out "$out"
}

build() {
  export DEBERTA_FAST_CPU=1 DEBERTA_FAST_CUDA=0
  if [[ $dry ]]; then
    CXX=$root/bench/dry/bin/c++ "$python" setup.py -q build_ext --build-lib build/dry-library
  else
    "$python" setup.py -q build_ext --inplace
  fi && echo built
}

machine() { bench machine --threads $(all_threads); }
check() { bench check --device cpu --dtypes bfloat16 float32 float16; }

operator() {
  bench operator_cpu --lengths 512 2048 128 --dtypes bfloat16 float32 --threads $(all_threads) --seconds 2 \
    --memory-lengths
}

operator-long() {
  bench operator_cpu --lengths 8192 --dtypes bfloat16 float32 --threads "$threads" --seconds 2 --memory-lengths \
    --name operator-long
}

memory() {
  bench cpu --levels attention --lengths 512 --threads "$threads" --seconds 1 --memory-length 4096
}

encoder() {
  encoders --lengths 512 128 --passes forward
}

# Hugging Face's eager code takes half a minute for a call in float32.
encoder-long() {
  encoders --lengths 2048 --shapes variable --passes forward --name encoder-long \
    --variants eager patched patched-unpad native bert bert-onednn modernbert onnxruntime
}

encoder-training() {
  encoders --lengths 512 --shapes variable full --passes forward+backward --name encoder-training \
    --variants eager patched patched-unpad native bert bert-onednn modernbert
}

encoders() {
  bench encoder --device cpu --dtypes bfloat16 float32 --threads "$threads" --seconds 2 "$@"
}

host() { bench host --seconds 4; }

all_threads() {
  ((threads == 1)) || echo 1
  echo "$threads"
}

source "$root/bench/stages.sh"
export threads
run_stages
