"""What every figure carries: the commit, the machine and the time; and how JSON files are put in place."""
import datetime
import json
import os
import subprocess


def commit(repo):
    """The checked-out commit, with `-dirty` when tracked files differ from it; `unknown` without git."""
    git = ["git", "-c", "safe.directory=*", "-C", repo]
    try:
        head = subprocess.run(git + ["rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(git + ["status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True)
        return head + ("-dirty" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine():
    """One line: processor, cores, memory, kernel, distribution."""
    model, memory, name = os.uname().machine, "?", "unknown system"
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = round(int(file.readline().split()[1]) / (1 << 20))
    with open("/etc/os-release", encoding="utf-8") as file:
        for line in file:
            if line.startswith("PRETTY_NAME="):
                name = line.split("=", 1)[1].strip().strip('"')
    return f"{model}, {os.cpu_count()} cores, {memory} GiB, Linux {os.uname().release}, {name}"


def write(repo, path, figures):
    """Writes flat figures as JSON, whole or not at all."""
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    file = os.path.join(repo, path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file + ".new", "w", encoding="utf-8") as out:
        json.dump({**figures, "commit": commit(repo), "machine": machine(), "when": when}, out, indent=1)
        out.write("\n")
    os.replace(file + ".new", file)
    return file


def give_back(repo):
    """Under sudo in somebody's own checkout, target/ stays theirs."""
    uid, target = os.environ.get("SUDO_UID", "0"), os.path.join(repo, "target")
    if os.geteuid() == 0 and uid.isdigit() and uid != "0" and os.path.isdir(target) and os.stat(repo).st_uid == int(uid):
        subprocess.run(["chown", "-R", "--no-dereference", f"{uid}:{os.environ.get('SUDO_GID', uid)}", target], check=False)
