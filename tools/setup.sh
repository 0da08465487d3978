#!/bin/bash
# Installs what the tests, the demonstration and the measurements need, where it is missing:
# Debian packages (none of their services is started) and a Python environment in .venv.
# Idempotent; prints one line per thing it does. Needs root only where a package is missing.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
log=$PWD/build/setup.log
mkdir -p build
: > "$log"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
quietly() { "$@" >> "$log" 2>&1 || { tail -n 20 "$log" >&2; die "failed: $* (all of it in $log)"; }; }

# A program that must exist, and the Debian package that brings it.
needs=(
	gcc:gcc
	ip:iproute2
	redis-server:redis-server
	nginx:nginx-light
	ssh:openssh-client
	sshd:openssh-server
	nft:nftables
	pgrep:procps
	rsvg-convert:librsvg2-bin
	groff:groff-base
	curl:curl
	psql:postgresql
	etcd:etcd-server
	prometheus:prometheus
	promtool:prometheus
	prometheus-node-exporter:prometheus-node-exporter
	ansible-playbook:ansible-core
	chromium:chromium
)

missing=()
export PATH="$PATH:/usr/sbin:/sbin"
for need in "${needs[@]}"; do
	command -v "${need%%:*}" > /dev/null || missing+=("${need#*:}")
done
# gcc without the C library's headers compiles nothing.
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)

python=$(command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import venv, ensurepip' 2> /dev/null; then
	missing+=(python3 python3-venv)
fi

if [ ${#missing[@]} -gt 0 ]; then
	[ "$(id -u)" = 0 ] || die "missing: ${missing[*]}; install them, or run this as root"
	command -v apt-get > /dev/null || die "missing: ${missing[*]}; there is no apt-get here to install them"
	say "installing ${missing[*]}"
	# Installing a server must not start it: invoke-rc.d(8) asks this program first.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		trap 'rm -f $policy' EXIT
		printf '#!/bin/sh\nexit 101\n' > $policy
		chmod 755 $policy
	fi
	export DEBIAN_FRONTEND=noninteractive
	quietly apt-get update -q
	quietly apt-get install -q -y --no-install-recommends "${missing[@]}"
	python=$(command -v python3)
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	die "$("$python" --version) is too old: Python 3.11 or later is needed"

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
	say "creating .venv with $("$python" --version)"
	quietly "$python" -m venv --clear .venv
fi
say "installing the Python packages"
quietly .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]'
say "ready"
