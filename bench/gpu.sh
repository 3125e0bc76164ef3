#!/usr/bin/env bash
# For a computer with an NVIDIA GPU that may soon be gone: parts, each with a time limit, that write down what they
# find line by line. Needs PyTorch, CuPy, cuda-bindings, NVRTC and what builds fusedrnn, but no network.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} out=${OUT:-out/gpu} package=$PWD/out/gpu-install
# What NVRTC makes; carried along in the checkout, nothing of it is compiled again.
export FUSEDRNN_CACHE=${FUSEDRNN_CACHE:-$PWD/out/gpu-cache} PYTHONUNBUFFERED=1

parts="first 120 whether anything works at all: versions, then every way to run once
checks 180 gradients of every cell, dtype and way to run; equality with the CPU backend
timing 270 fusedrnn bench --device cuda
epochs 45 an epoch of the air pollution program beside PyTorch's
goals 20 what timing and epochs found, in tables, and how far it reaches the goals; needs no GPU
promises 120 same bits run to run, graphs, memory, streams and threads, large sizes
sanitizers 150 compute-sanitizer's memcheck and racecheck over small calls"

usage() {
  cat <<END
bench/gpu.sh PART[=SECONDS] ...        install this checkout, then run parts, each with its time limit
bench/gpu.sh compile ARCH [PART ...]   needs no GPU: compile what parts need (first and checks) for it, e.g. sm_90

$(while read -r name seconds what; do printf '  %-11s %4d s  %s\n' "$name" "$seconds" "$what"; done <<<"$parts")
  (install     240 s  beside the part first, before all others; once for the same sources)

Results: \$OUT/results.json and log.txt, else in out/gpu. Compiled kernels: \$FUSEDRNN_CACHE, else out/gpu-cache.
Exit status: 0, 1 where something failed, 2 for a wrong command, 3 where there is no GPU.
END
}

wrong() { echo "bench/gpu.sh: $1 (without arguments it lists the parts)" >&2; exit 2; }
limit_of() { awk -v name="$1" '$1 == name { print $2 }' <<<"$parts"; }
say() { echo "$@" | tee -a "$out/log.txt"; }

sources() {
  find CMakeLists.txt pyproject.toml csrc src python/fusedrnn -type f ! -name '*.so' ! -path '*/__pycache__/*' \
    -exec sha256sum {} + | LC_ALL=C sort
}

install() {
  local begin=$SECONDS
  rm -rf "$package" && mkdir -p "$package"
  # A folder of its own, since Python's may not be written to.
  if CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) timeout -k 5 240 "$python" -m pip install --disable-pip-version-check \
    --no-build-isolation --no-deps --no-compile --target "$package" -C build-dir=out/gpu-build . >"$out/install.txt" 2>&1
  then
    sources >"$package/sources"
    say "OK    install: $((SECONDS - begin)) s, into $package"
  else # 124: stopped at its limit; what was compiled stays
    say "FAIL  install: $((SECONDS - begin)) s, pip: exit status $?, see $out/install.txt"
    return 1
  fi
}

if (($# == 0)); then usage; exit; fi
names=("$@")
if [[ $1 == compile ]]; then
  [[ ${2-} =~ ^sm_[0-9]+[a-z]?$ ]] || wrong "compile: expected an architecture such as sm_90, got '${2-}'"
  names=("${@:3}")
fi
for each in "${names[@]}"; do
  [[ -n $(limit_of "${each%%=*}") ]] ||
    wrong "expected parts out of $(cut -d' ' -f1 <<<"$parts" | paste -sd' '), got '${each%%=*}'"
  [[ $each != *=* || ($1 != compile && ${each#*=} =~ ^[1-9][0-9]*$) ]] ||
    wrong "${each%%=*}: expected whole seconds, got '${each#*=}'"
done

trees=$PWD/python${PYTHONPATH:+:$PYTHONPATH} # there everything runs but the compiled module
mkdir -p "$out"
if [[ $1 == compile ]]; then PYTHONPATH=$trees exec "$python" bench/gpu.py "$out" "$@"; fi
export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}
status=0 installing=
if [[ ! -e $package/sources || $(sources) != "$(<"$package/sources")" ]]; then
  install &
  installing=$!
fi

wait_for_install() {
  [[ -z $installing ]] || wait "$installing" || status=1 PYTHONPATH=$trees
  installing=
}

for each in "${names[@]}"; do
  name=${each%%=*} seconds=${each#*=} path=$trees begin=$SECONDS
  [[ $each == *=* ]] || seconds=$(limit_of "$name")
  if [[ $name != first || -z $installing ]]; then wait_for_install; path=$PYTHONPATH; fi
  say "--- $name, at most $seconds s"
  PYTHONPATH=$path timeout -k 5 "$seconds" "$python" bench/gpu.py "$out" "$name" "$seconds" 2>&1 | tee -a "$out/log.txt"
  case ${PIPESTATUS[0]} in
    0) end="done" ;;
    3) end="no GPU" status=$((status ? status : 3)) ;;
    124 | 137) end="stopped at its limit" status=1 ;;
    *) end="failed" status=1 ;;
  esac
  say "--- $name: $end, $((SECONDS - begin)) s"
done
wait_for_install
exit "$status"
