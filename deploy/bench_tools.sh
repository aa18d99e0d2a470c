#!/bin/sh
# Installs the load generator of `mlplatform bench serving`; says how where it may not.
set -eu
if command -v wrk >/dev/null 2>&1; then
  echo "wrk is there: $(command -v wrk)"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends wrk >/dev/null
  echo "installed $(command -v wrk)"
elif command -v brew >/dev/null 2>&1; then
  brew install wrk
else
  echo "wrk is missing. On Debian: sudo apt-get install wrk" >&2
  exit 1
fi
