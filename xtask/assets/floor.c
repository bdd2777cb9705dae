// What the kernel alone costs: one container, made and removed with the fewest calls that give it its own
// namespaces, root, /proc, /dev, /sys, cgroups and Docker's capabilities. It reads no configuration and checks
// nothing; no engine can be faster than this and still do the work.
//
// usage: floor ROOTFS [FILTER]     FILTER: a compiled seccomp program, struct sock_filter[]
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define TRY(call) do { if ((call) < 0) { fprintf(stderr, "floor: %s: %m\n", #call); _exit(120); } } while (0)

// Docker's default set, as a mask.
static const uint64_t kept = 0xa80425fb;

// The hierarchies that hosts with cgroup v1 have; those that are missing are left out.
static const char *const v1[] = {
    "blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids", "systemd", "unified",
};
enum { GROUPS = sizeof v1 / sizeof *v1 };
static char groups[GROUPS + 1][256];

static int put(const char *dir, const char *name, const char *text)
{
    char path[400];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = write(fd, text, strlen(text));
    close(fd);
    return n < 0 ? -1 : 0;
}

static void copy_down(const char *name)
{
    char value[128], parent[300];
    snprintf(parent, sizeof parent, "/sys/fs/cgroup/cpuset/%s", name);
    int fd = open(parent, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, value, sizeof value - 1);
    if (fd >= 0)
        close(fd);
    value[n > 0 ? n : 0] = 0;
    for (int i = 0; i < GROUPS; i++)
        if (!strcmp(v1[i], "cpuset") && groups[i][0])
            put(groups[i], name, value);
}

static void make_groups(void)
{
    int unified = access("/sys/fs/cgroup/cgroup.controllers", F_OK) == 0;
    for (int i = 0; i < GROUPS && !unified; i++) {
        snprintf(groups[i], sizeof groups[i], "/sys/fs/cgroup/%s/floor-%d", v1[i], getpid());
        if (mkdir(groups[i], 0755) < 0)
            groups[i][0] = 0;
    }
    if (unified) {
        snprintf(groups[GROUPS], sizeof groups[GROUPS], "/sys/fs/cgroup/floor-%d", getpid());
        TRY(mkdir(groups[GROUPS], 0755));
    } else {
        copy_down("cpuset.cpus");
        copy_down("cpuset.mems");
    }
}

// By itself, never by its number: that would wait for a grace period of the kernel.
static void join_groups(void)
{
    for (int i = 0; i < GROUPS; i++)
        if (groups[i][0] && strcmp(v1[i < GROUPS ? i : 0], "unified"))
            if (put(groups[i], "tasks", "0") < 0 && errno != ENOENT)
                TRY(-1);
    TRY(unshare(CLONE_NEWCGROUP));
}

static void loopback_up(void)
{
    struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    TRY(fd);
    TRY(ioctl(fd, SIOCSIFFLAGS, &lo));
    close(fd);
}

static int cover(const char *path, const char *by)
{
    int done = mount(by, path, 0, MS_BIND, 0) == 0;
    if (!done && errno != ENOENT)
        TRY(-1);
    return done;
}

// Docker's masked and read-only paths.
static void protect(void)
{
    static const char *const masked[] = {
        "proc/asound", "proc/acpi", "proc/scsi", "sys/firmware", "proc/kcore", "proc/keys", "proc/latency_stats",
        "proc/timer_list", "proc/timer_stats", "proc/sched_debug",
    };
    static const char *const fixed[] = { "proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger" };
    struct mount_attr read_only = { .attr_set = MOUNT_ATTR_RDONLY };
    TRY(mkdir("dev/empty", 0555));
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++)
        cover(masked[i], i < 4 ? "dev/empty" : "dev/null");
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
        if (cover(fixed[i], fixed[i]))
            TRY(syscall(SYS_mount_setattr, AT_FDCWD, fixed[i], 0, &read_only, sizeof read_only));
    }
}

static void remove_groups(void)
{
    for (int i = 0; i <= GROUPS; i++)
        while (groups[i][0] && rmdir(groups[i]) < 0 && errno == EBUSY)
            sched_yield();
}

// Before the root is entered: the groups' paths are the host's.
static void show_groups(void)
{
    struct mount_attr read_only = { .attr_set = MOUNT_ATTR_RDONLY };
    const char *type = groups[GROUPS][0] ? "cgroup2" : "tmpfs";
    TRY(mount(type, "sys/fs/cgroup", type, MS_NOSUID | MS_NODEV | MS_NOEXEC, 0));
    for (int i = 0; i < GROUPS; i++) {
        char path[64];
        if (!groups[i][0])
            continue;
        snprintf(path, sizeof path, "sys/fs/cgroup/%s", v1[i]);
        TRY(mkdir(path, 0755));
        TRY(mount(groups[i], path, 0, MS_BIND, 0));
    }
    TRY(syscall(SYS_mount_setattr, AT_FDCWD, "sys/fs/cgroup", AT_RECURSIVE, &read_only, sizeof read_only));
}

static void make_root(const char *root)
{
    static const struct { const char *name; int minor; } devices[] = {
        { "null", 3 }, { "zero", 5 }, { "full", 7 }, { "random", 8 }, { "urandom", 9 },
    };
    TRY(mount(0, "/", 0, MS_REC | MS_SLAVE, 0));
    TRY(mount(root, root, 0, MS_BIND | MS_REC, 0));
    TRY(chdir(root));
    TRY(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0));
    TRY(mount("tmpfs", "dev", "tmpfs", MS_NOSUID, "mode=755,size=65536k"));
    TRY(mkdir("dev/pts", 0755));
    TRY(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"));
    TRY(mkdir("dev/mqueue", 0755));
    TRY(mount("mqueue", "dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0));
    TRY(mkdir("dev/shm", 01777));
    TRY(mount("shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=65536k"));
    TRY(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, 0));
    show_groups();
    umask(0);
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
        char path[32];
        snprintf(path, sizeof path, "dev/%s", devices[i].name);
        TRY(mknod(path, S_IFCHR | 0666, makedev(1, devices[i].minor)));
    }
    protect();
    TRY(syscall(SYS_pivot_root, ".", "."));
    TRY(umount2(".", MNT_DETACH));
    TRY(chdir("/"));
}

static void confine(struct sock_fprog *filter)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct sets[2] = {
        { (uint32_t)kept, (uint32_t)kept, 0 }, { (uint32_t)(kept >> 32), (uint32_t)(kept >> 32), 0 },
    };
    for (int cap = 0; cap < 41; cap++)
        if (!(kept >> cap & 1))
            prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    TRY(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    TRY(syscall(SYS_capset, &header, sets));
    if (filter->len)
        TRY(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, filter));
}

// From a copy of the binary's mount that cannot be written to: the container must not reach the host's file.
static void protect_binary(char **argv)
{
    char mark[8];
    if (readlink("/proc/self/exe", mark, sizeof mark) == 1)
        return;
    struct mount_attr read_only = { .attr_set = MOUNT_ATTR_RDONLY };
    int fd = syscall(SYS_open_tree, AT_FDCWD, "/proc/self/exe", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    TRY(fd);
    TRY(syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH, &read_only, sizeof read_only));
    TRY(syscall(SYS_execveat, fd, "", argv, environ, AT_EMPTY_PATH));
}

int main(int argc, char **argv)
{
    protect_binary(argv);
    static struct sock_filter program[4096];
    struct sock_fprog filter = { 0, program };
    if (argc < 2)
        return 2;
    if (argc > 2) {
        int fd = open(argv[2], O_RDONLY | O_CLOEXEC);
        TRY(fd);
        ssize_t n = read(fd, program, sizeof program);
        TRY(n);
        filter.len = n / sizeof *program;
        close(fd);
    }
    make_groups();
    int pidfd = -1;
    struct clone_args how = {
        .flags = CLONE_PIDFD | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET,
        .pidfd = (uintptr_t)&pidfd,
        .exit_signal = SIGCHLD,
    };
    if (groups[GROUPS][0]) {
        int fd = open(groups[GROUPS], O_PATH | O_DIRECTORY | O_CLOEXEC);
        TRY(fd);
        how.flags |= CLONE_INTO_CGROUP;
        how.cgroup = fd;
    }
    pid_t pid = syscall(SYS_clone3, &how, sizeof how);
    TRY(pid);
    if (pid == 0) {
        join_groups();
        loopback_up();
        make_root(argv[1]);
        confine(&filter);
        execve("/true", (char *[]){ "true", 0 }, (char *[]){ "PATH=/", 0 });
        _exit(127);
    }
    siginfo_t end;
    TRY(waitid(P_PIDFD, pidfd, &end, WEXITED));
    remove_groups();
    return end.si_status;
}
