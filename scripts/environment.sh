# Sourced by train.sh and test.sh: goes to the project's root and sees to a Python environment that
# holds the requirements in the file $1. An active virtual environment is used; otherwise .venv is
# made with $PYTHON, or with the first Python >= 3.11 that is found.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
  venv="${VENV:-.venv}"
  if ! [ -x "$venv/bin/python" ]; then
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
      if new_enough "$candidate"; then python="$candidate"; break; fi
    done
    if [ -z "${python:-}" ]; then
      echo "error: no Python >= 3.11 found (tried ${PYTHON:-python3, python3.13, python3.12, python3.11})." >&2
      exit 2
    fi
    echo "Making $venv with $("$python" --version)." >&2
    "$python" -m venv "$venv"
  fi
  VIRTUAL_ENV="$PWD/${venv#"$PWD"/}"
  case "$venv" in /*) VIRTUAL_ENV="$venv" ;; esac
  export VIRTUAL_ENV
  export PATH="$VIRTUAL_ENV/bin:$PATH"
fi

# Installed once for each content of the requirements.
stamp="$VIRTUAL_ENV/.sam_jax-$(basename "$1")"
if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
  echo "Installing $1 into $VIRTUAL_ENV." >&2
  python -m pip install --quiet --disable-pip-version-check -r "$1" >&2
  cat requirements.txt "$1" > "$stamp"
fi
