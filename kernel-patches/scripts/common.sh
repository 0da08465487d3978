# What the scripts beside this file share; sourced by them.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
patches=${KERNEL_PATCHES:-$here/../patches}
config=$here/../config
tarball=/usr/src/linux-source-6.12.tar.xz
cache=${XDG_CACHE_HOME:-$HOME/.cache}/migrator/kernel
export CCACHE_DIR=$cache/ccache CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=4G
# gcc tells what it has read: nothing is preprocessed once more to know an object by. A fifth of a build.
export CCACHE_DEPEND=1
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=migrator KBUILD_BUILD_HOST=lab

say() { printf 'kernel: %s\n' "$*" >&2; }
die() { printf 'kernel: %s\n' "$*" >&2; exit 1; }

# Runs a command with its output in a file, which is shown where the command fails.
logged() {
	local log=$1
	shift
	"$@" > "$log" 2>&1 || { tail -n 40 "$log" >&2; die "failed: $* (all of it in $log)"; }
}

# The patches in order, without comments. Several files may be numbered; only `series` says which are applied.
series() {
	[ -e "$patches/series" ] || return 0
	sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$patches/series"
}

# The objects of what some patches touch of the kernel, as far as it is in a tree; without the option, not its own.
objects() {
	local tree=$1 option=$2 source
	shift 2
	(cd "$patches" && cat "$@") | sed -n 's/^+++ b\/\(.*\)\.c$/\1/p' | sort -u | while read -r source; do
		case $source in
		tools/*) continue ;;
		*checkpoint*) [ "$option" = y ] || continue ;;
		esac
		[ ! -e "$tree/$source.c" ] || printf '%s.o\n' "$source"
	done
}

source_version() {
	[ -e $tarball ] || die "no $tarball; run tools/setup-kernel.sh"
	dpkg-query -W -f '${Version}' linux-source-6.12
}

# What a patched source tree depends on: the version of the source, and every patch in its order.
source_key() {
	{
		source_version
		for name in $(series); do
			[ -e "$patches/$name" ] || die "$patches/series names $name, which is not there"
			printf '%s\n' "$name"
			cat "$patches/$name"
		done
	} | sha256sum | cut -c1-12
}

# Makes $1 by running the rest, which writes to $1.new.PID: never half there, and made once by whoever is first.
once() {
	local target=$1
	shift
	[ -e "$target" ] && return
	mkdir -p "$(dirname "$target")"
	exec 9> "$target.lock"
	flock 9
	[ -e "$target" ] || { rm -rf "$target".new; "$@" "$target.new"; mv "$target.new" "$target"; }
	exec 9>&-
}

# Of what is kept under these names only the youngest $1 stay.
forget_old() {
	local keep=$1
	shift
	ls -dt "$@" 2> /dev/null | grep -v '\.lock$' | tail -n +$((keep + 1)) | while read -r old; do
		rm -rf "$old" "$old.lock"
	done
}
