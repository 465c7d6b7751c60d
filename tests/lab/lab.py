#!/usr/bin/env python3
"""The lab: two Docker hosts, `alpha` and `beta`, on one machine, and a wire between them.

Each host is one process tree in pid, mount, network, UTS and IPC namespaces of its own, with its own dockerd and containerd.
A third, tiny network namespace `wire` holds a bridge with a port for each host; clients of the services live there, outside
either host, so that they survive a host's power cut.

    lab.py up [--no-docker]     both hosts, again and again the same (leftovers of an earlier run go first)
    lab.py exec HOST CMD...     a command in a host (`wire` is allowed: network only)
    lab.py cut HOST             power cut: link down, SIGKILL to everything at once, loop devices gone
    lab.py link HOST up|down    the host's cable
    lab.py shell                both hosts up, a shell, everything gone at its end
    lab.py status               what is up
    lab.py down [--all]         removes everything; --all the caches of images and of guests' kernels too

DOUBLURE_LAB names the work directory, default /var/tmp/doublure-lab. Nothing is ever found or killed by its name: processes
are written down with their start time, loop devices are known by their backing file's inode.
"""
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(os.path.dirname(HERE))
HOSTS = {"alpha": ("10.77.0.1", "172.30.1.1/24", "172.30.64.0/19"), "beta": ("10.77.0.2", "172.30.2.1/24", "172.30.96.0/19")}
WIRE_ADDRESS = "10.77.0.254"
AGENT_PORT = 7741
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "TERM": os.environ.get("TERM", "dumb"),
}


class LabError(Exception):
    """What went wrong with the lab, as one sentence."""


def start_time(pid):
    """The kernel's start time of a process in clock ticks since boot, or None; with the pid it names one process for ever."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def boot_id():
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def tell(text):
    print(text, file=sys.stderr, flush=True)


def wait_for(what, seconds, probe, pause=0.05):
    """Polls until `probe` gives something true. LabError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end:
            raise LabError(f"{what} did not happen within {seconds} s")
        time.sleep(pause)


@contextlib.contextmanager
def uninterrupted():
    """Holds Ctrl-C and its kin back until the block is done: between a process's birth and its being written down, for one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    pending = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda n, _frame: pending.append(n)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt(signal.Signals(pending[0]).name)


class UnixHTTP(http.client.HTTPConnection):
    """HTTP over a Unix socket, for dockerd."""

    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Lab:
    """The lab in one work directory. Only one process at a time may change it (a lock keeps it so)."""

    def __init__(self, directory=None):
        self.dir = os.path.realpath(directory or os.environ.get("DOUBLURE_LAB") or "/var/tmp/doublure-lab")
        self.key = hashlib.sha256(self.dir.encode()).hexdigest()[:6]
        self.run = os.path.join(self.dir, "run")
        self.state_file = os.path.join(self.run, "state.json")
        self.lock_fd = None
        self.mutex = threading.Lock()

    # ---- the work directory -------------------------------------------------------------------------------------------

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def claim(self):
        """Makes the directory and takes its lock. A directory that is not a lab's is never touched."""
        if os.geteuid() != 0:
            raise LabError("the lab makes namespaces, mounts and loop devices and needs root: run it with sudo")
        marker = self.path(".doublure-lab")
        if os.path.isdir(self.dir) and os.listdir(self.dir) and not os.path.exists(marker):
            raise LabError(f"{self.dir} holds files that are not the lab's: name an empty or new directory in DOUBLURE_LAB")
        os.makedirs(self.dir, mode=0o755, exist_ok=True)
        with open(marker, "a", encoding="utf-8"):
            pass
        self.lock_fd = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LabError(f"another command holds the lab in {self.dir}: wait for it or name another directory in DOUBLURE_LAB") from None

    def check_place(self):
        """The file system of the work directory must carry overlay mounts and direct I/O."""
        kind = subprocess.run(["stat", "-f", "-c", "%T", self.dir], capture_output=True, text=True, check=True).stdout.strip()
        if kind in ("overlayfs", "tmpfs", "nfs", "ramfs"):
            raise LabError(f"{self.dir} lies on {kind}, where Docker's overlay2 or direct I/O does not work: name a directory on ext4, XFS or Btrfs in DOUBLURE_LAB")
        probe = self.path(".direct")
        try:
            os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise LabError(f"{self.dir} does not allow direct I/O ({error.strerror}): name a directory on ext4, XFS or Btrfs in DOUBLURE_LAB") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)
        free = os.statvfs(self.dir)
        if free.f_bavail * free.f_frsize < 12 << 30:
            raise LabError(f"{self.dir} has less than 12 GiB free: free some or name another directory in DOUBLURE_LAB")

    # ---- processes ----------------------------------------------------------------------------------------------------

    def state(self):
        try:
            with open(self.state_file, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {"boot": boot_id(), "processes": {}}

    def record(self, name, pid):
        """Writes a process down so that a later run can end exactly this one."""
        with self.mutex:
            state = self.state()
            if state["boot"] != boot_id():
                state = {"boot": boot_id(), "processes": {}}
            if pid is None:
                state["processes"].pop(name, None)
            else:
                state["processes"][name] = {"pid": pid, "start": start_time(pid)}
            os.makedirs(self.run, exist_ok=True)
            with open(self.state_file + ".new", "w", encoding="utf-8") as file:
                json.dump(state, file)
            os.replace(self.state_file + ".new", self.state_file)

    def start(self, name, argv, **options):
        """Starts a process of the machine itself and writes it down before anything can interrupt."""
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": ENVIRONMENT, **options}
        with uninterrupted():
            process = subprocess.Popen(argv, **options)
            self.record(name, process.pid)
        return process

    def pid(self, name):
        """The recorded process if it is still that process, else None."""
        state = self.state()
        entry = state["processes"].get(name)
        if not entry or state["boot"] != boot_id() or entry["start"] is None or start_time(entry["pid"]) != entry["start"]:
            return None
        return entry["pid"]

    def need(self, name):
        pid = self.pid(name)
        if pid is None:
            raise LabError(f"{name} is not up: run ./dev lab up first")
        return pid

    def kill(self, name, patience=30):
        """SIGKILL to a recorded process, and waits until it is gone. For a host's first process that means: all of them."""
        pid = self.pid(name)
        if pid is None:
            self.record(name, None)
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

        def gone():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            reap_adopted()
            return start_time(pid) is None

        wait_for(f"the end of {name} (process {pid})", patience, gone, 0.005)
        self.record(name, None)
        return True

    # ---- commands in a host -------------------------------------------------------------------------------------------

    def enter(self, host):
        """The prefix that runs a command in a host; `wire` and nobody else is a network alone."""
        pid = str(self.need(host))
        if host == "wire":
            return ["nsenter", "--target", pid, "--net"]
        return ["nsenter", "--target", pid, "--mount", "--net", "--pid", "--uts", "--ipc"]

    def exec(self, host, argv, check=True, timeout=120, stdin=None, env=None):
        """Runs a command in a host and gives its result; LabError with its last line when `check` and it fails."""
        try:
            done = subprocess.run(self.enter(host) + list(argv), input=stdin, capture_output=True, text=True, timeout=timeout,
                                  env={**ENVIRONMENT, **(env or {})}, stdin=subprocess.DEVNULL if stdin is None else None)
        except subprocess.TimeoutExpired:
            raise LabError(f"{host}: {' '.join(argv)} did not end within {timeout} s") from None
        if check and done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise LabError(f"{host}: {' '.join(argv)} ended with {done.returncode}: {words}")
        return done

    def spawn(self, host, argv, log):
        """Starts a daemon in a host, left to the host's first process; gives its pid as the host sees it."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        script = 'log=$1; shift; setsid "$@" >>"$log" 2>&1 </dev/null & echo $!'
        done = self.exec(host, ["sh", "-c", script, "sh", log] + list(argv))
        return int(done.stdout)

    def alive(self, host, pid):
        return self.exec(host, ["sh", "-c", f"kill -0 {pid} 2>/dev/null"], check=False).returncode == 0

    # ---- up -----------------------------------------------------------------------------------------------------------

    def up(self, docker=True):
        """Both hosts and the wire, from nothing."""
        self.check_place()
        os.makedirs(self.run, exist_ok=True)
        self._up_wire()
        failures = []

        def one(host):
            try:
                self._up_host(host)
                if docker:
                    self._up_docker(host)
            except (LabError, OSError, subprocess.SubprocessError) as error:
                failures.append(f"{host}: {error}")

        threads = [threading.Thread(target=one, args=(host,)) for host in HOSTS]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            # What the threads are about to start must be there to be removed.
            with uninterrupted():
                for thread in threads:
                    thread.join()
            raise
        if failures:
            raise LabError("; ".join(failures))

    def _up_wire(self):
        process = self.start("wire", ["unshare", "--net", "sleep", "infinity"], stdout=subprocess.DEVNULL)
        own = os.readlink("/proc/self/ns/net")
        wait_for("the wire's network namespace", 10, lambda: os.readlink(f"/proc/{process.pid}/ns/net") != own, 0.01)
        for argv in (["ip", "link", "set", "lo", "up"], ["ip", "link", "add", "br0", "type", "bridge"],
                     ["ip", "address", "add", f"{WIRE_ADDRESS}/24", "dev", "br0"], ["ip", "link", "set", "br0", "up"]):
            self.exec("wire", argv)

    def _up_host(self, host):
        base = self.path(host)
        for part in ("log", "state", "docker", "containerd"):
            os.makedirs(os.path.join(base, part), exist_ok=True)
        ready = os.path.join(self.run, f"{host}.ready")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(ready)
        with open(os.path.join(base, "log", "init.log"), "ab") as log:
            outer = self.start(
                f"{host}.outer",
                ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child=SIGKILL", "--",
                 "/usr/bin/python3", "-B", os.path.join(HERE, "host_init.py"), host, ready], stdout=log, stderr=log, cwd="/")

        def first():
            if outer.poll() is not None:
                with open(os.path.join(base, "log", "init.log"), encoding="utf-8", errors="replace") as file:
                    raise LabError(f"its first process ended: {(file.read().strip().splitlines() or ['no word'])[-1]}")
            with open(f"/proc/{outer.pid}/task/{outer.pid}/children", encoding="ascii") as file:
                return file.read().split()

        init = int(wait_for("its first process", 10, first, 0.01)[0])
        self.record(host, init)
        wait_for("its private mounts", 20, lambda: first() and os.path.exists(ready), 0.02)
        address = HOSTS[host][0]
        self.exec("wire", ["ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", str(init)])
        self.exec("wire", ["ip", "link", "set", host, "master", "br0", "up"])
        self.exec(host, ["ip", "address", "add", f"{address}/24", "dev", "eth0"])
        self.exec(host, ["ip", "link", "set", "eth0", "up"])

    def _up_docker(self, host):
        base = self.path(host)
        log = os.path.join(base, "log")
        # NAT rules where the kernel has them; without, published ports go through Docker's user-land proxy.
        rules = self.exec(host, ["iptables", "-t", "nat", "-n", "-L"], check=False).returncode == 0
        with open(os.path.join(base, "containerd.toml"), "w", encoding="utf-8") as file:
            file.write(f'version = 2\nroot = "{base}/containerd"\nstate = "/run/containerd"\n'
                       'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
                       '[grpc]\naddress = "/run/containerd/containerd.sock"\n')
        with open(os.path.join(base, "daemon.json"), "w", encoding="utf-8") as file:
            json.dump({
                "containerd": "/run/containerd/containerd.sock", "data-root": f"{base}/docker", "exec-root": "/run/docker",
                "pidfile": "/run/docker.pid", "hosts": ["unix:///run/docker.sock"], "bip": HOSTS[host][1],
                "default-address-pools": [{"base": HOSTS[host][2], "size": 24}], "iptables": rules, "ip6tables": False,
                "cgroup-parent": f"/{self.cgroup(host)}", "exec-opts": ["native.cgroupdriver=cgroupfs"],
                "log-opts": {"max-size": "8m"},
            }, file, indent=1)
        pids = {"containerd": self.spawn(host, ["containerd", "--config", f"{base}/containerd.toml"], f"{log}/containerd.log")}
        self._await_socket(host, "containerd", pids["containerd"], "/run/containerd/containerd.sock", None)
        pids["dockerd"] = self.spawn(host, ["dockerd", "--config-file", f"{base}/daemon.json"], f"{log}/dockerd.log")
        self._await_socket(host, "dockerd", pids["dockerd"], "/run/docker.sock", "/_ping")

    def _await_socket(self, host, name, pid, path, ping):
        outside = f"/proc/{self.need(host)}/root{path}"
        calls = 0

        def probe():
            nonlocal calls
            calls += 1
            if calls % 20 == 0 and not self.alive(host, pid):
                raise LabError(f"{name} ended: {self.last_words(host, name)}")
            try:
                if ping is None:
                    return os.path.exists(outside)
                connection = UnixHTTP(outside, 2)
                connection.request("GET", ping)
                good = connection.getresponse().status == 200
                connection.close()
                return good
            except OSError:
                return False

        try:
            wait_for(f"{name} on {host}", 60, probe)
        except LabError as error:
            raise LabError(f"{error}; its log says: {self.last_words(host, name)}") from None

    def last_words(self, host, name, lines=3):
        try:
            with open(self.path(host, "log", f"{name}.log"), encoding="utf-8", errors="replace") as file:
                return " | ".join(file.read().strip().splitlines()[-lines:])
        except OSError:
            return "no log"

    # ---- cut, cable, down ---------------------------------------------------------------------------------------------

    def cable(self, host, up):
        self.exec("wire", ["ip", "link", "set", host, "up" if up else "down"])

    def cut(self, host):
        """A power cut as far as one machine allows. Gives the wall-clock time of the last moment at which the host could speak.

        1. cable out first, so that no closing packet tells the peer or a client what no dead host could tell;
        2. SIGKILL to the host's first process: the kernel kills agent, dockerd, containerd, shims and databases at once, and
           its mounts go with the last of them;
        3. the loop devices, which the kernel would keep, are detached.
        What was written but not flushed survives here, in the machine's page cache: this is a disk without a volatile cache.
        """
        self.need(host)
        self.cable(host, False)
        moment = time.time()
        self.kill(host)
        self.kill(f"{host}.outer")
        self.detach_loops(host)
        self.remove_cgroups(host)
        return moment

    def loops(self, host=None):
        """Loop devices whose backing file lies in the lab: by inode, since a path changes with who reads it."""
        table = subprocess.run(["losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-INO,BACK-MAJ:MIN"],
                               capture_output=True, text=True, env=ENVIRONMENT, check=False).stdout
        rows = [line.split() for line in table.splitlines() if len(line.split()) == 3]
        if not rows:
            return []
        inodes = set()
        for name in ([host] if host else HOSTS):
            for top, directories, files in os.walk(self.path(name)):
                if top == self.path(name):
                    # Docker's own trees hold thousands of files and never a volume's.
                    directories[:] = [d for d in directories if d not in ("docker", "containerd", "log")]
                for file in files:
                    with contextlib.suppress(OSError):
                        found = os.lstat(os.path.join(top, file))
                        inodes.add((str(found.st_ino), f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"))
        prefix = self.path(host, "") if host else self.path("")
        mine = []
        for name, inode, device in rows:
            with contextlib.suppress(OSError):
                with open(f"/sys/block/{os.path.basename(name)}/loop/backing_file", encoding="utf-8", errors="replace") as file:
                    if (inode, device) in inodes or file.read().startswith(prefix):
                        mine.append(name)
        return mine

    def detach_loops(self, host=None):
        began = time.monotonic()

        def none_left():
            names = self.loops(host)
            for name in names:
                subprocess.run(["losetup", "--detach", name], capture_output=True, env=ENVIRONMENT, check=False)
                if time.monotonic() - began > 3:
                    self.thaw(name)
            return not names

        wait_for("the release of the lab's loop devices", 20, none_left)

    def thaw(self, device):
        """A host that died in the middle of a cut leaves a file system frozen that nothing mounts any more; the freeze itself keeps it
        alive. Mounting the device gives the same one back, and then it can be thawed."""
        place = self.path("thaw")
        os.makedirs(place, exist_ok=True)
        for argv in (["mount", device, place], ["fsfreeze", "--unfreeze", place], ["umount", place]):
            subprocess.run(argv, capture_output=True, env=ENVIRONMENT, check=False)
        with contextlib.suppress(OSError):
            os.rmdir(place)

    def cgroup(self, host):
        return f"doublure-{self.key}-{host}"

    def remove_cgroups(self, host):
        """Empty groups only: rmdir refuses the others, and then something still runs there."""
        tops = []
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
            for line in table:
                before, after = line.split(" - ", 1)
                if after.split()[0] in ("cgroup", "cgroup2"):
                    tops.append(os.path.join(before.split()[4], self.cgroup(host)))

        def none_left():
            for top in tops:
                for directory, _, _ in os.walk(top, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
            return not any(os.path.isdir(top) for top in tops)

        wait_for(f"the end of {host}'s control groups", 20, none_left)

    def down(self, everything=False):
        """Removes everything the lab made, also after a run that died. Can be repeated."""
        trouble = []

        def attempt(step, *arguments):
            try:
                step(*arguments)
            except (LabError, OSError, subprocess.SubprocessError) as error:
                trouble.append(str(error))

        state = self.state()
        for name in sorted(state["processes"], key=lambda n: (n in HOSTS, n.endswith(".outer"), n == "wire")):
            attempt(self.kill, name)
        attempt(self._unmount_all)
        attempt(self.detach_loops)
        for host in HOSTS:
            attempt(self.remove_cgroups, host)
        if trouble:
            raise LabError("the lab could not be removed: " + "; ".join(trouble))
        for name in list(HOSTS) + ["run"] + (["cache", "guests"] if everything else []):
            shutil.rmtree(self.path(name), ignore_errors=False) if os.path.isdir(self.path(name)) else None
        if everything:
            for name in (".doublure-lab", ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(name))
            with contextlib.suppress(OSError):
                os.rmdir(self.dir)

    def _unmount_all(self):
        """The hosts' mounts are private and die with them; this is for what a person mounted below the lab by hand."""
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            points = [line.split(" ")[4].encode("ascii", "surrogateescape").decode("unicode_escape") for line in table]
        for point in sorted((p for p in points if p.startswith(self.path(""))), key=len, reverse=True):
            subprocess.run(["umount", point], check=True, capture_output=True, env=ENVIRONMENT)

    # ---- the agent ----------------------------------------------------------------------------------------------------

    def config(self, host, extra=""):
        """Writes the host's configuration file and gives its path."""
        file = self.path(host, "doublure.toml")
        with open(file, "w", encoding="utf-8") as out:
            out.write(f'host = "{host}"\nstate_dir = "{self.path(host, "state", "doublure")}"\nrun_dir = "/run/doublure"\n'
                      f'pin_dir = "/sys/fs/bpf/doublure"\nlisten = "{HOSTS[host][0]}:{AGENT_PORT}"\n'
                      f'docker_socket = "/run/docker.sock"\n{extra}')
        return file

    def doublure(self, host, argv, **options):
        """Runs the built binary in a host."""
        return self.exec(host, [self.binary(), "--config", self.path(host, "doublure.toml")] + list(argv), **options)

    def binary(self):
        built = os.environ.get("DOUBLURE_BIN") or os.path.join(REPO, "target", "release", "doublure")
        if not os.access(built, os.X_OK):
            raise LabError(f"{built} is not there: run cargo build --release first (./dev demo does)")
        return built

    def agent(self, host, extra="", within=()):
        """Starts the agent of a host and waits until it answers; gives its pid as the host sees it. `within`: a command that becomes
        the one which is appended to it."""
        self.config(host, extra)
        pid = self.spawn(host, [*within, self.binary(), "--config", self.path(host, "doublure.toml"), "agent"], self.path(host, "log", "agent.log"))

        def answers():
            if not self.alive(host, pid):
                raise LabError(f"the agent of {host} ended: {self.last_words(host, 'agent')}")
            # 4: it answers, and something is degraded (no peer yet, for one). That is an answer.
            return self.doublure(host, ["status", "--json"], check=False, timeout=30).returncode in (0, 4)

        try:
            wait_for(f"an answer of {host}'s agent", 60, answers, 0.1)
        except LabError as error:
            raise LabError(f"{error}; its log says: {self.last_words(host, 'agent')}") from None
        return pid


@contextlib.contextmanager
def whole_lab(docker=True):
    """A lab that is gone at the end, whatever happened, signals included."""
    lab = Lab()
    lab.claim()

    def stop(number, _frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    lab.down()
    try:
        lab.up(docker)
        yield lab
    finally:
        # From here to the end a second Ctrl-C must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        lab.down()


def reap_adopted():
    """Reaps the dead that this process inherited out of a host. A pid namespace ends only when its last process is reaped, and
    one whose parent was outside (`nsenter` that was killed) is reaped by nobody else. Own children are left to whoever started
    them: those live in the machine's pid namespace, one level up."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            for child in file.read().split():
                with contextlib.suppress(OSError), open(f"/proc/{child}/status", encoding="utf-8", errors="replace") as status:
                    levels = [line for line in status if line.startswith("NSpid:")]
                    if start_time(child) is None and levels and len(levels[0].split()) > 2:
                        os.waitpid(int(child), os.WNOHANG)


def adopt_orphans():
    """Makes this process the parent of what its children leave behind, so that nothing stays unreaped (Linux: PR_SET_CHILD_SUBREAPER)."""
    import ctypes
    ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)


def shell():
    with whole_lab() as lab:
        rc = os.path.join(lab.run, "bashrc")
        with open(rc, "w", encoding="utf-8") as file:
            for host in list(HOSTS) + ["wire"]:
                prefix = " ".join(lab.enter(host))
                file.write(f'{host}() {{ {prefix} "${{@:-bash}}"; }}\n')
            file.write("PS1='lab \\w # '\n")
        tell("Both hosts are up. `alpha CMD`, `beta CMD` and `wire CMD` run a command there; `exit` removes everything.")
        if not sys.stdin.isatty():
            return subprocess.run(["bash"], env={**os.environ, "BASH_ENV": rc}, check=False).returncode
        return subprocess.run(["bash", "--rcfile", rc, "-i"], check=False).returncode


def main():
    argv = sys.argv[1:] or ["shell"]
    verb, rest = argv[0], argv[1:]
    if verb in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if verb == "shell" and not rest:
        adopt_orphans()
        return shell()
    lab = Lab()
    if verb == "exec" and len(rest) >= 2:
        prefix = lab.enter(rest[0])
        os.execvpe(prefix[0], prefix + rest[1:], {**os.environ, **ENVIRONMENT})
    if verb == "status" and not rest:
        for name in [*HOSTS, "wire"]:
            pid = lab.pid(name)
            print(f"{name}: {'up, first process ' + str(pid) if pid else 'down'}")
        return 0
    if verb == "up" and rest in ([], ["--no-docker"]):
        lab.claim()
        lab.down()
        try:
            lab.up(docker=not rest)
        except BaseException:
            lab.down()
            raise
        tell("alpha and beta are up: ./dev lab exec alpha docker ps; ./dev lab down removes them")
        return 0
    if verb == "down" and rest in ([], ["--all"]):
        lab.claim()
        lab.down(everything=bool(rest))
        return 0
    if verb == "cut" and len(rest) == 1 and rest[0] in HOSTS:
        lab.claim()
        lab.cut(rest[0])
        return 0
    if verb == "link" and len(rest) == 2 and rest[0] in HOSTS and rest[1] in ("up", "down"):
        lab.cable(rest[0], rest[1] == "up")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        tell(f"lab: {error}")
        sys.exit(1)
    except KeyboardInterrupt as error:
        tell(f"lab: stopped by {str(error) or 'Ctrl-C'}; everything it made is removed")
        sys.exit(130)
