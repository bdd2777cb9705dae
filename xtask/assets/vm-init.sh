#!/bin/busybox sh
# First process of a virtual machine for tests: makes a system of the archive and runs /script.
B=/bin/busybox
$B mkdir -p /new /proc
$B mount -t proc proc /proc
$B mount -t tmpfs -o size=80%,mode=755 tmpfs /new
while read -r m; do
    case $m in
    *.xz) $B xz -dc "/modules/$m" >/module.ko ;;
    *) $B ln -sf "/modules/$m" /module.ko ;;
    esac
    $B insmod /module.ko || echo "cannot load $m" >/dev/ttyS1
    $B rm -f /module.ko
done </modules/order
$B rm -rf /modules
cd /new || exit 1
$B mkdir -p bin proc sys dev tmp run etc root var/tmp usr/bin usr/sbin sbin
$B mv /bin/busybox bin/busybox
B=/new/bin/busybox
$B cp -a /payload/. .
$B rm -rf /payload
$B mount --move /proc proc
# From inside, so that the links lead to where busybox is going to be.
$B chroot /new /bin/busybox --install -s /bin
$B mount -t sysfs sysfs sys
$B mount -t devtmpfs dev dev
$B mkdir -p dev/pts dev/shm
$B mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
$B mount -t tmpfs tmpfs dev/shm
# ext4 on a loop device, where it can be had: older kernels map no ids on tmpfs.
if [ -x sbin/mke2fs ] && $B truncate -s 512M disk && $B chroot /new /sbin/mke2fs -q -F -j -O extent,verity /disk; then
    $B mount -t ext4 -o loop disk tmp && $B chmod 1777 tmp
else
    $B mount -t tmpfs -o mode=1777 tmpfs tmp
fi
$B mount -t tmpfs -o mode=755 tmpfs run
$B ln -sf /proc/self/fd dev/fd
echo 'root:x:0:0:root:/root:/bin/sh' >etc/passwd
echo 'root:x:0:' >etc/group
case $($B cat proc/cmdline) in
*vm.init=systemd*) ;;
*vm.cgroup=2*)
    $B mount -t cgroup2 -o nsdelegate cgroup2 sys/fs/cgroup
    ;;
*)
    $B mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    while read -r name rest; do
        case $name in '#'*) continue ;; esac
        $B mkdir -p "sys/fs/cgroup/$name"
        $B mount -t cgroup -o "$name" cgroup "sys/fs/cgroup/$name" || $B rmdir "sys/fs/cgroup/$name"
    done <proc/cgroups
    ;;
esac
$B ip link set lo up
$B cat >run-script <<'END'
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
exec </dev/null >/dev/ttyS1 2>&1
stty -F /dev/ttyS1 -onlcr 2>/dev/null
cd /root
sh /script
echo "@@end $?"
sync
echo o >/proc/sysrq-trigger
sleep 60
END
$B mkdir -p run/dbus
case $($B cat proc/cmdline) in
*vm.init=systemd*) exec $B switch_root /new /lib/systemd/systemd ;;
*) exec $B switch_root /new /bin/sh /run-script ;;
esac
