#!/bin/sh
# What init runs first: mounts, the loopback interface, the folders a program may write to.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
for folder in /dev/shm /tmp /run /var; do
	mount -t tmpfs -o mode=755 tmpfs $folder
done
chmod 1777 /tmp /dev/shm
mkdir -p /run/lock /run/sshd /run/netns /var/lib /var/log /var/tmp /dev/mqueue
mount -t mqueue mqueue /dev/mqueue
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
	echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control
done
cp -a /etc/skel /var/root
# Also below one of the folders that have just been hidden.
project=$(cat /etc/project)
mkdir -p "$project"
mount -t erofs -o ro /dev/vdb "$project"
hostname guest
ip link set lo up
