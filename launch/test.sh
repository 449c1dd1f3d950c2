#!/usr/bin/env bash
# Runs the whole test suite on all cores. Arguments go to pytest: bash launch/test.sh -k swap
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test,examples
exec python -m pytest -n auto "$@"
