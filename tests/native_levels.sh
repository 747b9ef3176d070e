#!/bin/sh
# Every instruction-set level of the native CPU kernels against the scalar one, without Python (native_levels.cpp): for builds of
# another processor and for sanitizers. Linux, gcc or clang.
#     tests/native_levels.sh
#     CXX=aarch64-linux-gnu-g++ RUN=qemu-aarch64-static tests/native_levels.sh
#     CXXFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" tests/native_levels.sh avx512vbmi
# Arguments: the levels to build beside the scalar one; all that the compiler knows if there are none.
set -eu
cd "$(dirname "$0")/.."
sources=$PWD/src/anybit/kernels/cpu/csrc
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
compile="${CXX:-g++} ${CXXFLAGS:--O1} -std=c++17 -fno-rtti -fno-strict-aliasing -ffp-contract=off -Wno-psabi -Wno-uninitialized"
avx2="-mavx2 -mfma -mf16c -mbmi2"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
flags_of() {
  case $1 in
    avx2) echo "$avx2" ;;
    avx512) echo "$avx512" ;;
    avx512vbmi) echo "$avx512 -mavx512bf16 -mavx512vbmi -mavx512vnni" ;;
  esac
}
case $(${CXX:-g++} -dumpmachine) in
  x86_64*) known="avx2 avx512 avx512vbmi" ;;
  aarch64* | arm64*) known=neon ;;
  *) known= ;;
esac
macros=
for level in scalar ${*:-$known}; do
  for source in "$sources"/*_"$level".cpp; do
    # shellcheck disable=SC2046,SC2086
    $compile $(flags_of "$level") -c "$source" -o "$folder/$(basename "$source" .cpp).o"
  done
  [ "$level" = scalar ] || macros="$macros -DANYBIT_WITH_$(echo "$level" | tr '[:lower:]' '[:upper:]')"
done
for name in encode_driver driver sparse threads; do
  # shellcheck disable=SC2086
  $compile $macros -c "$sources/$name.cpp" -o "$folder/$name.o"
done
# shellcheck disable=SC2086
$compile -static-libstdc++ -I"$sources" tests/native_levels.cpp "$folder"/*.o -o "$folder/check" -lpthread ${LDFLAGS:-}
${RUN:-} "$folder/check"
