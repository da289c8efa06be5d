#!/usr/bin/env bash
# Sets up .venv where needed, then runs the notebooks (or, with --test, the tests). Options: ./run_all.sh --help
# This file only installs; everything else is vitlab/cli.py, which needs no installed package to check options.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$here/.venv
# threads that wait sleep: spinning ones stop each other where another program is busy, too
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# every process imports torch: half of that time is compiling its sources, where no bytecode may be kept
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" VITLAB_PROG=run_all.sh

die() { echo "run_all.sh: $*" >&2; exit 2; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${VITLAB_PYTHON:-}" ]; then
        new_enough "$VITLAB_PYTHON" || die "VITLAB_PYTHON=$VITLAB_PYTHON is no Python >= 3.11"
        echo "$VITLAB_PYTHON"
        return
    fi
    local name
    for name in python3 python python3.13 python3.12 python3.11 python3.14; do
        if new_enough "$name"; then command -v "$name"; return; fi
    done
    die "no Python >= 3.11 found; name one with VITLAB_PYTHON"
}

# A .venv whose interpreter is gone is made again. Without ensurepip (Debian packs it apart) uv can make one too.
make_venv() {
    if "$venv/bin/python" -c '' >/dev/null 2>&1; then return; fi
    if [ -e "$venv/pyvenv.cfg" ]; then rm -rf "$venv"; fi
    echo "making .venv with $("$1" --version)"
    if "$1" -m venv "$venv" >/dev/null 2>&1; then return; fi
    rm -rf "$venv"
    if uv --version >/dev/null 2>&1; then uv venv --quiet --python "$1" "$venv"; return; fi
    die "$1 cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv) or uv"
}

find_uv() {
    if uv --version >/dev/null 2>&1; then echo uv; return; fi
    if [ ! -x "$venv/bin/uv" ]; then "$venv/bin/python" -m pip install --quiet uv >&2; fi
    echo "$venv/bin/uv"
}

# The stamp is written last, so an installation that was cut short is done again.
install() {
    local stamp=$venv/.vitlab-installed wanted uv
    wanted="$here $(cd "$here" && cksum requirements.lock pyproject.toml)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
    uv=$(find_uv)
    echo "installing requirements.lock into .venv"
    # one command for all: torch and torchvision have to come from the same index
    "$uv" pip install --quiet --python "$venv/bin/python" -r "$here/requirements.lock"
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps -e "$here"
    echo "$wanted" >"$stamp"
}

# Every stage runs, also after one has failed. What notebooks write goes to a folder of its own.
stage() {
    local name=$1 begun=$SECONDS verdict=ok
    shift
    printf '\n=== %s\n' "$name"
    "$@" || { verdict=FAILED; failed=1; }
    echo "=== $name: $verdict, $((SECONDS - begun)) s"
}

# pytest, a file of tests or a notebook on each core, four at most
side_by_side() {
    local python=$1
    shift
    "$python" -m pytest --numprocesses="$workers" --dist=loadfile "$@"
}

# Most tests share the cores, the long ones first (tests/conftest.py), so that no core waits for one of them in the end.
# Those that judge times come after them, with the machine to themselves.
run_pytest() {
    local code=0 alone
    side_by_side "$1" --no-loadscope-reorder -m "not alone" || code=$?
    alone=$(grep -rl --include="test_*.py" "pytest\.mark\.alone" tests)  # others are not even imported
    [ -z "$alone" ] || "$1" -m pytest -m alone $alone || code=1
    return $code
}

# The last notebook reads what the others left, so it comes after them.
run_notebooks() {
    local copies=$here/.state/nbval scratch code=0 all
    scratch=$(mktemp -d) && rm -rf "$copies" || return
    # nbval runs notebooks as they are, so the parameters are put in beforehand
    "$1" -c 'import sys; from vitlab.run.notebooks import prepare; prepare(*sys.argv[1:])' "$here" "$copies" ||
        { rm -rf "$scratch"; return 1; }
    all=("$copies"/*.ipynb)
    local options=(--nbval-lax --nbval-current-env --nbval-cell-timeout=300)
    # figures are written as PNG alone, for time: tests/study/test_plots.py has the PDF
    export VITLAB_ROOT=$scratch VITLAB_PDF=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share}
    if [ ${#all[@]} -gt 1 ]; then side_by_side "$1" "${options[@]}" "${all[@]::${#all[@]}-1}" || code=$?; fi
    "$1" -m pytest "${options[@]}" "${all[${#all[@]}-1]}" || code=$?
    rm -rf "$scratch"
    return $code
}

run_tests() {
    cd "$here"
    failed=0
    read -r workers share < <("$1" -c 'import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
print(min(cores, 4), max(1, cores // 4))')
    stage ruff "$1" -m ruff check .
    stage pytest run_pytest "$1"
    stage notebooks run_notebooks "$1"
    exit $failed
}

base=$(find_python)
"$base" -P -m vitlab.cli run --check-options "$@" || exit $?
no_install=false test=false
for option in "$@"; do
    case $option in
        -h | --help) exit 0 ;;
        --no-install) no_install=true ;;
        --test) test=true ;;
    esac
done
python=$base
if ! $no_install; then
    make_venv "$base"
    install
    python=$venv/bin/python
fi
if $test; then run_tests "$python"; fi
exec "$python" -P -m vitlab.cli run "$@"
