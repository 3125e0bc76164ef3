#!/usr/bin/env bash
# For a computer with an NVIDIA GPU that may soon be gone: parts, each with a time limit, that write down what
# they find line by line. Needs no network. PyTorch, CuPy, cuda-bindings, NVRTC, pip, scikit-build-core, pybind11,
# CMake and a C++ compiler are there already; fusedrnn is installed from this checkout.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-out/gpu}
package=$PWD/out/gpu-install
# What NVRTC makes; carried along in the checkout, nothing of it is compiled again.
export FUSEDRNN_CACHE=${FUSEDRNN_CACHE:-$PWD/out/gpu-cache} PYTHONUNBUFFERED=1

parts="first 120 whether anything works at all: versions, then every way to run once
checks 180 gradients of every cell, dtype and way to run; equality with the CPU backend
timing 270 fusedrnn bench --device cuda
epochs 45 an epoch of the air pollution program beside PyTorch's
goals 20 what timing and epochs found, in tables, and how far it reaches the goals; needs no GPU
cuts 75 the plans of a pass, timed beside each other
promises 120 same bits run to run, graphs, memory, streams and threads, large sizes
sanitizers 150 compute-sanitizer's memcheck and racecheck over small calls"
install_seconds=240

usage() {
  cat <<END
bench/gpu.sh PART[=SECONDS] ...        install this checkout, then run parts, each with its time limit
bench/gpu.sh compile ARCH [PART ...]   needs no GPU: compile what parts need (first and checks) for it, e.g. sm_90

$(while read -r name seconds what; do printf '  %-11s %4d s  %s\n' "$name" "$seconds" "$what"; done <<<"$parts")
  (install    $install_seconds s  beside the part first, before all others; once for the same sources; install=SECONDS)

Results: \$OUT/results.json and log.txt, else in out/gpu. Compiled kernels: \$FUSEDRNN_CACHE, else out/gpu-cache.
Exit status: 0, 1 where something failed, 2 for a wrong command, 3 where there is no GPU.
END
}

wrong() { echo "bench/gpu.sh: $1 (without arguments it lists the parts)" >&2; exit 2; }

limit_of() { awk -v name="$1" '$1 == name { print $2 }' <<<"$parts"; }

say() { echo "$@" | tee -a "$out/log.txt"; }

sources() {
  find CMakeLists.txt pyproject.toml cmake csrc src python/fusedrnn -type f ! -name '*.so' ! -path '*/__pycache__/*' \
    -exec sha256sum {} + | LC_ALL=C sort
}

at_hand() { # Whether Python imports fusedrnn, compiled and of these sources.
  local found folder
  found=$("$python" -c 'import fusedrnn._core as c; print(c.__file__)' 2>/dev/null) && found=$(dirname "$found") || return
  if [[ $found == "$package"/* ]]; then [[ $(sources) == "$(cat "$package/sources")" ]]; return; fi
  diff -rq -x '_core*' -x __pycache__ -x csrc python/fusedrnn "$found" >/dev/null || return
  [[ ! -d $found/csrc ]] && return
  for folder in cuda cells simd; do
    diff -rq -x fatbin "csrc/$folder" "$found/csrc/$folder" >/dev/null || return
  done
}

install() {
  local begin=$SECONDS
  rm -rf "$package"
  mkdir -p "$package"
  # By no nvcc: NVRTC is what is tried. A folder of its own, since Python's may not be written to.
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) timeout -k 5 "$install_seconds" "$python" -m pip install \
    --disable-pip-version-check --no-build-isolation --no-deps --no-compile --target "$package" \
    -C build-dir=out/gpu-build -C cmake.define.FUSEDRNN_CUDA_FATBIN=OFF . >"$out/install.txt" 2>&1 ||
    echo "pip: exit status $?" >>"$out/install.txt" # 124: stopped at its limit; what was compiled stays
  sources >"$package/sources"
  if at_hand; then
    rm "$out/install.txt"
    say "OK    install: $((SECONDS - begin)) s, into $package"
  else
    say "FAIL  install: $((SECONDS - begin)) s, $(tail -1 "$out/install.txt"), see $out/install.txt"
    rm -rf "$package"
    return 1
  fi
}

if (($# == 0)); then usage; exit; fi
if [[ $1 == compile ]]; then
  (($# >= 2)) || wrong "compile: expected an architecture such as sm_90"
  [[ $2 =~ ^sm_[0-9]+[a-z]?$ ]] || wrong "compile: expected an architecture such as sm_90, got '$2'"
fi
names=("$@")
[[ $1 == compile ]] && names=("${@:3}")
for each in "${names[@]}"; do
  if [[ $1 != compile && $each =~ ^install=([1-9][0-9]*)$ ]]; then install_seconds=${BASH_REMATCH[1]}; continue; fi
  [[ -n $(limit_of "${each%%=*}") ]] ||
    wrong "expected parts out of $(cut -d' ' -f1 <<<"$parts" | paste -sd' '), got '${each%%=*}'"
  [[ $each != *=* || ($1 != compile && ${each#*=} =~ ^[1-9][0-9]*$) ]] ||
    wrong "${each%%=*}: expected whole seconds, got '${each#*=}'"
done

trees=$PWD/python${PYTHONPATH:+:$PYTHONPATH} # there everything runs but the compiled module
export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}
if [[ $1 == compile ]]; then PYTHONPATH=$trees exec "$python" bench/gpu_compile.py "${@:2}"; fi
mkdir -p "$out"
status=0 installing=
if ! at_hand; then
  install &
  installing=$!
fi

wait_for_install() {
  [[ -z $installing ]] && return
  wait "$installing" || status=1 PYTHONPATH=$trees
  installing=
}

for each in "${names[@]}"; do
  name=${each%%=*} seconds=$(limit_of "${each%%=*}")
  [[ $name == install ]] && continue
  if [[ $each == *=* ]]; then seconds=${each#*=}; fi
  if [[ $name == first && -n $installing ]]; then path=$trees; else wait_for_install; path=$PYTHONPATH; fi
  begin=$SECONDS
  say "--- $name, at most $seconds s"
  PYTHONPATH=$path timeout -k 5 "$seconds" "$python" bench/gpu.py "$name" --seconds "$seconds" --out "$out" 2>&1 |
    tee -a "$out/log.txt"
  code=${PIPESTATUS[0]}
  case $code in
    0) end="done" ;;
    3) end="no GPU" ;;
    124 | 137) end="stopped at its limit" ;;
    *) end="failed" ;;
  esac
  say "--- $name: $end, $((SECONDS - begin)) s"
  if ((code == 3 && status == 0)); then status=3; elif ((code != 0 && code != 3)); then status=1; fi
done
wait_for_install
exit "$status"
