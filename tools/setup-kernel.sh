#!/bin/bash
# Installs what a kernel build and the guests need, where it is missing (Debian packages; needs root only then).
set -euo pipefail

die() { printf 'setup-kernel: %s\n' "$*" >&2; exit 1; }

# What the sources, the builds and the images of guests take, and what the guests of two tests at a time do.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/migrator
mkdir -p "$cache"
room=$(df --output=avail -BG "$cache" | tail -n 1 | tr -dc 0-9)
[ -e "$cache/guest" ] || [ "$room" -ge 8 ] || die "$cache has $room GiB of room, 8 are needed; XDG_CACHE_HOME names another place"
memory=$(awk '$1 == "MemAvailable:" { print int($2 / 1048576) }' /proc/meminfo)
[ "$memory" -ge 4 ] || die "$memory GiB of memory are available, guests need 4"

# A file that must exist, and the Debian package that brings it.
needs=(
	/usr/src/linux-source-6.12.tar.xz:linux-source-6.12
	/usr/bin/gcc:gcc
	/usr/include/stdio.h:libc6-dev
	/usr/bin/make:make
	/usr/bin/flex:flex
	/usr/bin/bison:bison
	/usr/bin/bc:bc
	/usr/bin/perl:perl
	/usr/bin/patch:patch
	/usr/bin/xz:xz-utils
	/usr/bin/lz4:lz4
	/usr/bin/cpio:cpio
	/sbin/depmod:kmod
	/usr/bin/ccache:ccache
	/usr/include/libelf.h:libelf-dev
	/usr/include/openssl/ssl.h:libssl-dev
	/usr/bin/qemu-system-x86_64:qemu-system-x86
	/usr/bin/mkfs.erofs:erofs-utils
	/bin/busybox:busybox-static
	/usr/bin/redis-server:redis-server
	/usr/bin/ssh:openssh-client
)
missing=()
for need in "${needs[@]}"; do
	[ -e "${need%%:*}" ] || missing+=("${need#*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

[ "$(id -u)" = 0 ] || die "missing: ${missing[*]}; install them, or run this as root"
command -v apt-get > /dev/null || die "missing: ${missing[*]}; there is no apt-get here to install them"
printf 'setup-kernel: installing %s\n' "${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# RUNLEVEL=1 keeps invoke-rc.d(8) from starting the services that come along.
if ! { RUNLEVEL=1 apt-get update -q && RUNLEVEL=1 apt-get install -q -y --no-install-recommends "${missing[@]}"; } \
	> "$log" 2>&1; then
	tail -n 20 "$log" >&2
	die "apt-get failed"
fi
