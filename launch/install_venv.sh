#!/usr/bin/env bash
# Installs Debian's venv package for the interpreter $1, when this user may; says what to type otherwise.
set -eu
version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
package="python${version}-venv"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq "$package"
else
    echo "Python ${version} lacks its venv module. Install it, then run make again:  sudo apt-get install ${package}" >&2
    exit 1
fi
