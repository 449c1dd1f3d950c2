# shellcheck shell=bash
# Sourced by the other scripts, with the extras to install: makes .venv ready and activates it.
#
# The versions are those of constraints.txt. Where $PYTHON (python3, if unset) has a compatible torch
# already, as on a cluster, .venv is laid over that Python: that torch is used as it is, and only
# what is missing is installed. Done once; again only when one of these changes.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Prints the installation and version that an interpreter stems from; nothing where there is none.
base_of() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null || true; }

# Prints version and place of an interpreter's torch, if it is one that pyproject.toml accepts.
torch_of() {
    "$1" - "$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)" 2>/dev/null <<'EOF' || true
import sys
from importlib.metadata import distribution
torch = distribution("torch")
have, want = ([int(part) for part in v.split(".")[:2]] for v in (torch.version, sys.argv[1]))
if have >= want:
    print(torch.version, torch.locate_file(""))
EOF
}

# Prints the lines of the constraints file $2 that a .venv laid over the interpreter $1 needs: the
# torch that is there, and a pin for each package that is not.
constraints_over() {
    "$1" - "$2" <<'EOF'
import re, sys
from importlib.metadata import distributions
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
there = {normal(d.metadata["Name"]): d.version for d in distributions() if d.metadata["Name"]}
for line in open(sys.argv[1]):
    if not line.startswith("#") and normal(line.split("==")[0]) not in there:
        print(line, end="")
print("torch==" + there["torch"])
EOF
}

setup() { # extras
    local host=${PYTHON:-python3} python=.venv/bin/python constraints=launch/constraints.txt
    local stamp=.venv/.ready-${1//,/-} host_torch wanted
    command -v "$host" >/dev/null || fail "there is no $host; set PYTHON to a Python >= 3.10"
    "$host" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$host is $("$host" --version 2>&1); set PYTHON to a Python >= 3.10"
    host=$(command -v "$host")
    if [[ -f .venv/.host && $("$host" -c 'import sys; print(sys.prefix)') -ef .venv ]]; then
        host=$(<.venv/.host) # .venv is activated: what it was made from counts
    fi
    host_torch=$(torch_of "$host")
    wanted="$PWD $(base_of "$host") ${host_torch:-own torch}
$(cat "$constraints" pyproject.toml launch/setup.sh | cksum)"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" && $(base_of "$python") == "$(base_of "$host")" ]]
    then
        say ".venv is ready"
        return
    fi

    if [[ $(base_of "$python") != "$(base_of "$host")" ||
        -n $host_torch && $(torch_of "$python") != "$host_torch" ]]; then
        say "making .venv from $host ($("$host" --version))"
        local is_venv site_packages=
        is_venv=$("$host" -c 'import sys; print(sys.prefix != sys.base_prefix)')
        # Over a virtual environment --system-site-packages would mean its base's packages.
        [[ -n $host_torch && $is_venv = False ]] && site_packages=--system-site-packages
        "$host" -m venv --clear $site_packages .venv ||
            fail "$host -m venv failed; on Debian and Ubuntu it needs the package python3-venv"
        printf '%s' "$host" >.venv/.host
        if [[ -n $host_torch && $is_venv = True ]]; then
            "$host" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
                >"$("$python" -c 'import site; print(site.getsitepackages()[0])')/host.pth"
        fi
    fi
    if [[ -n $host_torch ]]; then
        say "using $host's torch ${host_torch%% *}, installing what is missing beside it"
        constraints_over "$host" "$constraints" >.venv/constraints.txt
        constraints=.venv/constraints.txt
    else
        say "installing distavg[$1] into .venv, in the versions of $constraints"
    fi
    # No build isolation: setuptools too is at the version that the constraints file gives.
    "$python" -m pip install --quiet --constraint "$constraints" "setuptools>=77" &&
        "$python" -m pip install --quiet --constraint "$constraints" --no-build-isolation \
            --editable ".[$1]" ||
        fail "pip failed, as it says above; it needs a network, or an index within reach"
    # One module file of it is compared with; what it requires, torchvision, would want another torch.
    if [[ $1 = *test* ]]; then
        "$python" -m pip install --quiet --constraint "$constraints" --no-deps timm ||
            say "timm could not be installed: its row of the migration table has its formula alone"
    fi
    printf '%s' "$wanted" >"$stamp"
}

setup "$1"
source .venv/bin/activate
