#!/usr/bin/env python3
"""First process of a lab host: makes the host's private world, then reaps whatever is left to it.

Usage: host_init.py NAME READY_FILE

Runs as pid 1 of a new pid namespace (lab.py starts it through `unshare`). SIGKILL to this one process is the host's power
cut: the kernel then kills every process of the namespace, and with the last of them its mounts and its network go.
"""
import os
import signal
import subprocess
import sys


def run(*argv):
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def submounts(top):
    """Mount points directly usable below `top`, outermost first."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            point = line.split(" ")[4].encode("ascii", "surrogateescape").decode("unicode_escape")
            if point.startswith(top + "/"):
                found.append(point)
    return sorted(set(found), key=len)


def private_world(name):
    # 1. Nothing mounted here is seen outside, and nothing mounted outside later is seen here.
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", "/proc")
    # 2. /run of its own: sockets, pid files and locks at their usual paths, and the machine's own dockerd out of reach.
    #    /run/systemd is hidden with it, so dockerd does not ask the machine's systemd for cgroups.
    run("mount", "-t", "tmpfs", "-o", "mode=0755,size=256m", "tmpfs", "/run")
    for directory in ("/run/lock", "/run/sys"):
        os.makedirs(directory, exist_ok=True)
    # 3. /sys of its own, because /sys/class/net shows the network namespace of whoever mounted it. What is mounted below
    #    (cgroups, debugfs, securityfs) comes along by bind.
    old = submounts("/sys")
    run("mount", "--rbind", "/sys", "/run/sys")
    run("mount", "-t", "sysfs", "-o", "nosuid,nodev,noexec", "sysfs", "/sys")
    done = []
    for point in old:
        if point == "/sys/fs/bpf" or any(point.startswith(above + "/") for above in done):
            continue
        if os.path.isdir(point):
            run("mount", "--rbind", "/run" + point, point)
            done.append(point)
    run("umount", "--lazy", "/run/sys")
    # 4. A bpffs instance of its own: what the agent pins dies with the host, as it would with a power cut.
    if os.path.isdir("/sys/fs/bpf"):
        run("mount", "-t", "bpf", "-o", "mode=0700", "bpf", "/sys/fs/bpf")
    run("hostname", name)
    run("ip", "link", "set", "lo", "up")


def main():
    name, ready = sys.argv[1:3]
    signal.pthread_sigmask(signal.SIG_BLOCK, [])
    private_world(name)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    with open(ready, "w", encoding="utf-8") as file:
        file.write("ready\n")
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        signal.sigtimedwait([signal.SIGCHLD], 1.0)


if __name__ == "__main__":
    main()
