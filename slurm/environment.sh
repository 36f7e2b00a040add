# shellcheck shell=bash
# Finds or makes the Python environment. Source it; it leaves behind
#
#   meshwright_python      the interpreter to use
#   meshwright ...         a function: the command line of this very clone, installed or not
#
#     python on PATH has torch >= 2.11    used as it is: a cluster's module, a container, a venv or conda environment
#     else .venv beside this clone        made from constraints.txt if it is missing, unfinished or outdated
#
# pip finds its packages where its own settings say (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS ...).
#
#   MESHWRIGHT_MAY_INSTALL=0              never install: return 2 where something is missing, and say what
#
# Two scripts may start at once: the second waits. A set-up that was interrupted is thrown away and begun anew.

meshwright_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
meshwright_venv=$meshwright_root/.venv

meshwright_say() { printf '%s\n' "$*" >&2; }

# meshwright_has_torch PYTHON: does it have a torch that is new enough? Reads its metadata, since importing takes seconds.
meshwright_has_torch() {
    "$1" - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version
sys.exit(sys.version_info < (3, 11) or tuple(map(int, version("torch").split(".")[:2])) < (2, 11))
PYTHON
}

# meshwright_missing PYTHON: print what the package needs that this environment lacks, as pip would be told it.
meshwright_missing() {
    "$1" - "$meshwright_root/pyproject.toml" <<'PYTHON'
import re, sys, tomllib
from importlib.metadata import PackageNotFoundError, version

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
for wanted in project["dependencies"] + project["optional-dependencies"]["export"]:
    name, least = re.fullmatch(r"([\w.-]+)>=([\d.]+)", wanted).groups()
    try:
        found = [int(part) for part in re.findall(r"\d+", version(name))]
    except PackageNotFoundError:
        found = []
    if found < [int(part) for part in least.split(".")]:
        print(f"'{wanted}'")
PYTHON
}

# What .venv must have been made from; a clone that was moved needs it anew, since scripts in it name their folder.
meshwright_wanted_stamp() {
    printf '%s ' "$meshwright_root"
    cat "$meshwright_root/constraints.txt" "$meshwright_root/pyproject.toml" | cksum
}

meshwright_venv_is_complete() {
    [ -x "$meshwright_venv/bin/python" ] && [ -f "$meshwright_venv/complete" ] &&
        [ "$(cat "$meshwright_venv/complete")" = "$(meshwright_wanted_stamp)" ]
}

# Print the first Python that can make a virtual environment, or say which package is missing.
meshwright_base_python() {
    local candidate version newest=""
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        newest=$version
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    if [ -n "$newest" ]; then
        meshwright_say "Python $newest cannot make virtual environments: its modules venv and ensurepip are missing." \
            "On Debian and Ubuntu: apt-get install python$newest-venv"
    else
        meshwright_say "No Python of version 3.11 or newer was found." \
            "On Debian and Ubuntu: apt-get install python3 python3-venv (Debian 12, Ubuntu 24.04 or newer)"
    fi
    return 2
}

# Make or complete .venv; called with the lock held.
meshwright_make_venv() {
    local base quiet=()
    meshwright_venv_is_complete && return 0
    base=$(meshwright_base_python) || return 2
    [ -t 2 ] || quiet=(--quiet)
    if [ -e "$meshwright_venv/unfinished" ] || [ ! -x "$meshwright_venv/bin/python" ]; then
        rm -rf "$meshwright_venv"
    fi
    meshwright_say "Setting up $meshwright_venv from constraints.txt (once; torch is large, this can take minutes)"
    mkdir -p "$meshwright_venv"
    # Until the end this marks the folder as one that must not be trusted, nor repaired.
    touch "$meshwright_venv/unfinished"
    rm -f "$meshwright_venv/complete"
    if ! meshwright_install "$base" "${quiet[@]}"; then
        meshwright_say "The set-up failed; pip's message above says why. README.md, 'Install', tells where torch's CPU" \
            "build comes from when pip's settings do not offer torch $(sed -n 's/^torch==//p' "$meshwright_root/constraints.txt")."
        return 2
    fi
    meshwright_wanted_stamp >"$meshwright_venv/complete"
    rm -f "$meshwright_venv/unfinished"
}

# meshwright_install BASE [pip options]
meshwright_install() {
    local base=$1 python=$meshwright_venv/bin/python needed_to_build
    shift
    [ -x "$python" ] || "$base" -m venv "$meshwright_venv" || return 1
    needed_to_build=$("$python" - "$meshwright_root/pyproject.toml" <<'PYTHON'
import sys, tomllib

print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["build-system"]["requires"]))
PYTHON
    ) || return 1
    # Built without isolation, so that constraints.txt decides about the build tools too.
    if [ -n "$needed_to_build" ]; then
        # shellcheck disable=SC2086  # one word for each requirement
        "$python" -m pip install "$@" --constraint "$meshwright_root/constraints.txt" $needed_to_build || return 1
    fi
    "$python" -m pip install "$@" --constraint "$meshwright_root/constraints.txt" --no-build-isolation \
        --editable "${meshwright_root}[export,test]"
}

meshwright_find_environment() {
    local candidate missing
    for candidate in python python3; do
        meshwright_has_torch "$candidate" || continue
        meshwright_python=$(command -v "$candidate")
        missing=$(meshwright_missing "$candidate" | tr '\n' ' ') || return 2
        if [ "$("$candidate" -c 'import sys; print(sys.prefix)')" = "$meshwright_venv" ]; then
            if [ -n "$missing" ] || [ -e "$meshwright_venv/unfinished" ]; then break; fi
        elif [ -n "$missing" ]; then
            meshwright_say "The active environment ($meshwright_python) has torch, and is used as it is; it lacks: $missing" \
                "Add them: $meshwright_python -m pip install $missing(or deactivate it, and .venv is used)"
            return 2
        fi
        return 0
    done
    meshwright_python=$meshwright_venv/bin/python
    meshwright_venv_is_complete && return 0
    if [ "${MESHWRIGHT_MAY_INSTALL:-1}" = 0 ]; then
        meshwright_say "There is no environment: no python with torch >= 2.11 is active, and $meshwright_venv is missing" \
            "or was not made from this constraints.txt."
        return 2
    fi
    command -v flock >/dev/null || {
        meshwright_say "The command flock is missing. On Debian and Ubuntu: apt-get install util-linux"
        return 2
    }
    # The lock is on a file that is there in any case. NFS wants it open for writing; nothing is written.
    (
        flock --nonblock 9 || { meshwright_say "Waiting for another script that sets up $meshwright_venv"; flock 9; }
        meshwright_make_venv
    ) 9>>"$meshwright_root/constraints.txt"
}

meshwright() { "$meshwright_python" -m meshwright.launcher "$@"; }

meshwright_find_environment || return
export PYTHONPATH=$meshwright_root/src${PYTHONPATH:+:$PYTHONPATH}
# The folder a command is typed in is not searched for modules: ours are only found under their full names.
export PYTHONSAFEPATH=1
