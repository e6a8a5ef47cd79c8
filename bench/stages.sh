# Sourced by gpu.sh and cpu.sh, after they have defined their stages: functions, each run with a time limit.
# It reads: stages, an array of NAME or NAME:SECONDS; root; python; dry, if not empty; out, the folder of results; logs;
# archive, a .tar.gz of both or empty.

pack() {
  [[ -z $archive ]] || tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")" -C "$(dirname "$logs")" \
    "$(basename "$logs")"
}

finish() {
  echo && printf '%s\n' "${lines[@]}" && echo "results: $out"
  pack
  exit "$1"
}

run_stages() {
  local functions entry name limit start log status word failed=0
  functions=$(declare -F | cut -d ' ' -f 3)
  export -f $functions
  export python out dry logs root
  lines=()
  trap 'kill "${!:-}" 2>/dev/null; finish 143' TERM INT
  for entry in "${stages[@]}"; do
    name=${entry%:*} limit=240 start=$SECONDS
    [[ $entry != *:* ]] || limit=${entry#*:}
    [[ ! $dry ]] || limit=900  # a dry run may have a busy machine
    log=$logs/$name.log
    # In the background, so that the trap handles a signal at once, not when the stage ends.
    timeout --kill-after=5 "$limit" bash -c "$name" >"$log" 2>&1 &
    wait $!
    status=$? word=ok
    if ((status)); then
      word="FAILED ($status)" failed=1
      ((status == 124 || status == 137)) && word="STOPPED after $limit s"
      tail -n 40 "$log"
    fi
    lines+=("$(printf '%-16s %4d s  %s: %s' "$name" $((SECONDS - start)) "$word" "$(tail -n 1 "$log" | cut -c -100)")")
    echo "${lines[-1]}" | tee -a "$out/stages.txt"
    pack
  done
  finish "$failed"
}
