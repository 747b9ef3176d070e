#!/bin/sh
# The tests of the native CPU kernels and encoders under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, gcc).
#     PYTHON=.venv/bin/python tests/sanitize_cpu_kernels.sh [pytest arguments]
# The package is copied and built elsewhere; the library of this folder stays as it is.
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE src tests "$copy" 2>/dev/null || cp -r setup.py pyproject.toml src tests "$copy"
cd "$copy"
# the optimizer takes many minutes over instrumented tiles
sed -i 's/"-O3"/"-O1"/' setup.py
find src -name 'libanybit_cpu.*' -delete
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" "$python" setup.py -q build_ext --inplace
test -f src/anybit/kernels/cpu/libanybit_cpu.so
# Python and torch are not instrumented: the runtime comes first, and what they never free is not our leak.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$copy/src" OMP_NUM_THREADS=2
"$python" -m pytest -q -p no:cacheprovider tests/test_cpu_kernels.py tests/test_cpu_codebooks.py tests/test_encoders.py "$@"
