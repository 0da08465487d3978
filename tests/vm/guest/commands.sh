#!/bin/sh
# Answers requests on the virtio port named "commands" (tests/vm/machine.py speaks the other side).
#
#	run SECONDS LENGTH	the script that follows, with its time limit; 137 when that has passed
#	put LENGTH PATH		the bytes that follow go to a file
#
# The answer is one line, "STATUS BYTES BYTES", and then standard output and standard error.
. /etc/profile
for port in /sys/class/virtio-ports/*; do
	[ "$(cat "$port/name")" = commands ] && exec 3<> "/dev/${port##*/}"
done
take() { [ "$1" = 0 ] || dd bs="$1" count=1 iflag=fullblock <&3 2> /dev/null; }

mkdir -p /run/commands
cd /tmp || exit
echo READY >&3
while read -r verb first second <&3; do
	: > /run/commands/out
	: > /run/commands/err
	case $verb in
	run)
		take "$second" > /run/commands/script
		timeout -s KILL "$first" bash /run/commands/script 3>&- < /dev/null > /run/commands/out 2> /run/commands/err
		;;
	put)
		take "$first" > "$second" 2> /run/commands/err
		;;
	esac
	status=$?
	echo "$status $(stat -c %s /run/commands/out) $(stat -c %s /run/commands/err)" >&3
	cat /run/commands/out /run/commands/err >&3
done
