#!/usr/bin/env bash
# Makes .venv from requirements.txt (Python 3.11), once: a second call finds the stamp and returns at once.
# Asks only what this machine is set up for: pip's own configuration names the package index and the folder of wheels.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${LONGVIEW_VENV:-$root/.venv}"
python="${LONGVIEW_PYTHON:-python3.11}"
disk_gb=6
memory_gb=8
missing=0

lacks() { # what, remedy
    printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
    missing=1
}

case "$(uname -s)" in
    Darwin) installer="brew install" ;;
    *) installer="sudo apt-get install -y" ;;
esac
package() { # name for apt, name for brew
    if [[ $installer == brew* ]]; then echo "$installer $2"; else echo "$installer $1"; fi
}

if ! command -v java >/dev/null 2>&1; then
    lacks "java was not found; Spark needs Java 17 or later" "$(package openjdk-17-jre-headless openjdk@17)"
else
    java_version="$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)"
    if [[ -z $java_version || $java_version -lt 17 ]]; then
        lacks "java is version ${java_version:-unknown}; Spark needs 17 or later" "$(package openjdk-17-jre-headless openjdk@17)"
    fi
fi
command -v git >/dev/null 2>&1 || lacks "git was not found; every table and model records the commit that made it" "$(package git git)"

digest() { if command -v sha256sum >/dev/null 2>&1; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }
stamp="$venv/.longview-requirements"
wanted="$(digest <"$root/requirements.txt" | cut -d' ' -f1)"
if [[ -x $venv/bin/python && -f $stamp && "$(cat "$stamp")" == "$wanted" ]]; then
    exit "$missing"
fi

if [[ ! -x $venv/bin/python ]]; then
    if ! command -v "$python" >/dev/null 2>&1; then
        lacks "$python was not found" "$(package "python3.11 python3.11-venv" python@3.11), or set LONGVIEW_PYTHON to a Python 3.11"
    elif ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        lacks "$python is $("$python" --version 2>&1); Python 3.11 is needed" "set LONGVIEW_PYTHON to a Python 3.11"
    elif ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        lacks "$python cannot make virtual environments" "$(package python3.11-venv python@3.11)"
    fi
fi
free_gb="$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1000000) }')"
((free_gb >= disk_gb)) || lacks "$free_gb GB free under $root, $disk_gb GB are needed" "free some space, or set LONGVIEW_VENV to a folder on a larger disk"
if [[ -r /proc/meminfo ]]; then
    total_gb="$(awk '/^MemTotal:/ { print int($2 / 1000000) }' /proc/meminfo)"
    ((total_gb >= memory_gb)) || lacks "$total_gb GB of memory, $memory_gb GB are needed" "use a machine with more memory"
fi
((missing == 0)) || exit 1

echo "installing into $venv (about 3 GB; some minutes the first time) ..."
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"

# The folder of wheels that pip is configured with: uv does not read pip's configuration.
links="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
for key in global.find-links install.find-links; do
    [[ -n $links ]] || links="$("$venv/bin/python" -m pip config get "$key" 2>/dev/null || true)"
done
links="$(tr -s ' \n' ',,' <<<"$links" | sed 's/^,*//; s/,*$//')"
[[ -z $links ]] || export UV_FIND_LINKS="$links"

uv=""
if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then
    uv=uv
elif [[ -x $venv/bin/uv ]] || "$venv/bin/python" -m pip install --quiet uv >/dev/null 2>&1; then
    uv="$venv/bin/uv"
fi
if [[ -z $uv ]] || ! "$uv" pip install --python "$venv/bin/python" --compile-bytecode -r "$root/requirements.txt"; then
    echo "uv is not to be had or failed here; using pip"
    "$venv/bin/python" -m pip install --compile -r "$root/requirements.txt"
fi
echo "$wanted" >"$stamp"
echo "installed: $("$venv/bin/python" --version)"
