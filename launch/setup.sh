# Sourced by the other scripts, with the extras to install: makes .venv ready and activates it.
#
# Versions are pinned by launch/constraints.txt. Where the Python that runs this ($PYTHON, or
# python3) already has a torch that is new enough, as on a cluster, that torch is used as it is.
# Done once; again only when the versions, the metadata or the Python change.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
python=${PYTHON:-python3}
requirement=$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "setup: '$python' is not a Python 3.10 or newer: set PYTHON to one" >&2
    exit 1
fi
venv_options=() constraints=launch/constraints.txt
if torch=$("$python" - "$requirement" 2>/dev/null <<'CHECK'
import sys, torch
have, want = ([int(n) for n in v.split(".")[:2]] for v in (torch.__version__, sys.argv[1]))
print(torch.__version__)
sys.exit(have < want)
CHECK
); then
    venv_options=(--system-site-packages)
fi

stamp=.venv/.ready-${extras//,/-}
state=$("$python" --version; cat pyproject.toml launch/constraints.txt; echo "${venv_options[*]}")
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    if [ ${#venv_options[@]} -gt 0 ]; then
        echo "setup: using torch $torch of $("$python" -c 'import sys; print(sys.prefix)')"
        constraints=$(mktemp)
        echo "torch==$torch" > "$constraints"
    fi
    echo "setup: installing distavg[$extras] into .venv"
    "$python" -m venv "${venv_options[@]}" .venv
    if ! PIP_CONSTRAINT=$constraints .venv/bin/python -m pip install \
        --quiet --disable-pip-version-check -e ".[$extras]"; then
        echo "setup: the installation failed (see above); run this again once it is mended" >&2
        exit 1
    fi
    printf '%s\n' "$state" > "$stamp"
else
    echo "setup: .venv is ready"
fi
source .venv/bin/activate
