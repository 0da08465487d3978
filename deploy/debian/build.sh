#!/bin/bash
# Builds build/migrator_VERSION_ARCH.deb: everything below /opt/migrator, with all that it needs from PyPI.
# Installing it needs no network. Needs pip (of any Python 3.11) and dpkg-deb.
#   deploy/debian/build.sh [DIRECTORY]        where the package goes; build by default
# COMPRESS=none makes it in less time, and larger.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
out=${1:-build}
python=${PYTHON:-.venv/bin/python}

die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }
command -v dpkg-deb > /dev/null || die "there is no dpkg-deb here"
# What is compiled is for one Python: that of Debian 12.
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || die "$python is no Python 3.11: set PYTHON"

version=$("$python" - <<-'EOF'
	import tomllib
	print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])
EOF
)
architecture=$(dpkg --print-architecture)
# The same sources give the same package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || date +%s)}
export SOURCE_DATE_EPOCH

mkdir -p "$out"
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"
umask 022

mkdir -p "$tree"/{DEBIAN,opt/migrator,usr/bin,etc/migrator}
mkdir -p "$tree"/usr/lib/{systemd/system,sysusers.d} "$tree"/usr/share/{doc/migrator,man/man1}
# setuptools leaves build/ in the source tree, which is not for others to find.
mkdir "$tree/source"
cp -r migrator transport policies pyproject.toml README.md LICENSE "$tree/source"
rm -rf "$tree"/source/migrator/testing
"$python" -m pip install -q --disable-pip-version-check --no-compile --only-binary cryptography,cffi,msgspec,zstandard,aiohttp,yarl,multidict,frozenlist,propcache \
	--target "$tree/opt/migrator/lib" "$tree/source[etcd,prometheus,web]" 2> "$tree/pip.log" ||
	{ cat "$tree/pip.log" >&2; die "pip cannot bring what is needed"; }
rm -rf "$tree/source" "$tree/pip.log" "$tree/opt/migrator/lib/bin"
rm -f "$tree"/opt/migrator/lib/migrator-*.dist-info/{direct_url.json,RECORD} # they name the directory of this build
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$tree" -p / "$tree/opt/migrator/lib"

cat > "$tree/opt/migrator/migrator" <<-'EOF'
	#!/usr/bin/python3 -IS
	# Only what is in this package is looked at: no other package, no user's, no PYTHONPATH.
	import sys

	sys.path.insert(0, "/opt/migrator/lib")
	from migrator.cli import main

	sys.argv[0] = "migrator"
	sys.exit(main())
EOF
chmod 755 "$tree/opt/migrator/migrator"
ln -s /opt/migrator/migrator "$tree/usr/bin/migrator"
cp deploy/systemd/*.service "$tree/usr/lib/systemd/system/"
cp deploy/systemd/migrator.sysusers "$tree/usr/lib/sysusers.d/migrator.conf"
cp -r deploy/prometheus deploy/grafana docs/usage.md docs/runbooks "$tree/usr/share/doc/migrator/"
cp LICENSE "$tree/usr/share/doc/migrator/copyright"
printf '# Options of the controller: see migrator controller --help\n#MIGRATOR_CONTROLLER_OPTIONS=\n' \
	> "$tree/etc/migrator/controller.env"
chmod 700 "$tree/etc/migrator"
chmod 600 "$tree/etc/migrator/controller.env"
"$python" tools/man.py "$tree/usr/share/man/man1" > /dev/null
gzip -9n "$tree"/usr/share/man/man1/*.1

cat > "$tree/DEBIAN/control" <<-EOF
	Package: migrator
	Version: $version
	Architecture: $architecture
	Maintainer: migrator <root@localhost>
	Section: admin
	Priority: optional
	Installed-Size: $(du -sk "$tree" | cut -f1)
	Depends: python3 (>= 3.11), python3 (<< 3.12), libc6
	Recommends: openssh-client
	Description: live migration of running processes and containers
	 Moves a running process tree or container to another host while it keeps
	 working, with its open files, threads, timers and TCP connections.
	 .
	 The agent and the controller are not started by installing: give the agent
	 keys first (migrator keygen, /etc/migrator/authorized_keys).
EOF
printf '/etc/migrator/controller.env\n' > "$tree/DEBIAN/conffiles"
cat > "$tree/DEBIAN/postinst" <<-'EOF'
	#!/bin/sh
	set -e
	[ "$1" = configure ] || exit 0
	if command -v systemd-sysusers > /dev/null; then systemd-sysusers migrator.conf; fi
	if [ -d /run/systemd/system ]; then
		systemctl daemon-reload
		# Workloads are no part of the agent: they run on through its restart.
		systemctl try-restart migrator-agent.service migrator-controller.service
	fi
EOF
cat > "$tree/DEBIAN/prerm" <<-'EOF'
	#!/bin/sh
	set -e
	[ "$1" = remove ] || exit 0
	if [ -d /run/systemd/system ]; then
		systemctl disable --now migrator-controller.service migrator-agent.service || :
	fi
EOF
cat > "$tree/DEBIAN/postrm" <<-'EOF'
	#!/bin/sh
	set -e
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	# Keys, journals and the store stay, also after a purge: a journal may be all that keeps a workload from
	# running twice.
EOF
chmod 755 "$tree"/DEBIAN/{postinst,prerm,postrm}
find "$tree" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

package=$out/migrator_${version}_$architecture.deb
dpkg-deb --root-owner-group -Z"${COMPRESS:-xz}" --build "$tree" "$package" > /dev/null
echo "$package"
