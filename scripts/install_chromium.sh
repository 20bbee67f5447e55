#!/usr/bin/env bash
# A browser for the tests of the report, where none is there: Debian's Chromium, as root or by sudo. Without one, or
# without a network, it says so and the tests of the page are skipped (failed with SAPWOOD_BROWSER=required).
set -u
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && exit 0
done
if ! command -v apt-get >/dev/null; then
    echo "No Chromium, and no apt-get to install it with: the tests of the report's page will be skipped." >&2
    exit 0
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "No Chromium, and no rights to install it (sudo apt-get install chromium): the tests of the report's page" \
            "will be skipped." >&2
        exit 0
    fi
    as_root=(sudo -n)
fi
log=$(mktemp)
install() { DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get "$@" -qq >>"$log" 2>&1; }
echo "Installing Chromium for the tests of the report's page ..." >&2
if ! { install update && install install -y --no-install-recommends chromium fonts-liberation; }; then
    tail -5 "$log" >&2
    echo "Chromium can't be installed: the tests of the report's page will be skipped." >&2
fi
rm -f "$log"
