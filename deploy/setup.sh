#!/usr/bin/env bash
# Install on this machine exactly what pyproject.toml asks for: the one place where versions are written.
#   setup.sh            install into the Python that is first on the PATH
#   setup.sh --list     only print the requirements, one a line
# Our own code is not installed: it comes with each job, so a cluster cannot run yesterday's.
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/pyproject.toml"
[ -f "$project" ] || project="$(dirname "$(dirname "$project")")/pyproject.toml"

requirements() {
    python3 - "$project" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
asked = project["requires-python"].removeprefix(">=")
if sys.version_info[:2] < tuple(map(int, asked.split("."))):
    sys.exit(f"Python {asked} or newer is needed, this one is {sys.version.split()[0]}: put another in front on the PATH.")
print("\n".join(project["dependencies"]))
PYTHON
}

list="$(requirements)"
if [ "${1:-}" = "--list" ]; then
    printf '%s\n' "$list"
else
    printf '%s\n' "$list" | python3 -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
fi
