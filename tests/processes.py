"""Commands in separate processes, forked from one that has imported everything.

A command then takes 1 second instead of 10.
`python -m tests.processes kill SEED KILLS ARGUMENTS` kills a run KILLS times and lets it finish,
`python -m tests.processes ranks N ARGUMENTS` is a small torchrun.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*args: object, **env: str) -> subprocess.Popen:
    """Start `python -m …` in the background, with one thread."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **env)
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a process, which is killed after `timeout` seconds."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def fork(args: list[str], env: dict[str, str], log: str) -> int:
    """Fork a child that runs a training command, its output in a file; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from vit_rope.cli.fit import train

        train(args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill(seed: int, kills: int, args: list[str]) -> dict:
    """Kill a run at random moments and resume it each time, then let it finish.

    It starts over if it has no checkpoint yet. Returns the number of kills, of resumed starts, and
    of runs that finished before they were killed.
    """
    generator = random.Random(seed)
    out = Path(args[args.index("--out") + 1])
    log, counts = f"{out}.log", {"kills": 0, "resumed": 0, "ended": 0}
    started = time.monotonic()
    os.waitpid(fork([*args, "--out", f"{out}.uninterrupted"], {}, log), 0)
    duration = time.monotonic() - started
    while True:
        resumes = (out / "checkpoints" / "last.ckpt").exists()
        counts["resumed"] += resumes
        options = ["--ckpt_path", "last"] if resumes else ["--overwrite", "true"]
        child = fork([*args, *options], {}, log)
        if counts["kills"] < kills:
            time.sleep(generator.uniform(0.2, 1.0) * duration)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit(Path(log).read_text()[-3000:])
            if counts["kills"] >= kills:
                return counts
            counts["ended"] += 1  # before it was killed: start over
            for path in out.glob("checkpoints/*"):
                path.unlink()
        else:
            counts["kills"] += 1


def ranks(count: int, args: list[str]) -> int:
    """Run a command in `count` processes with the environment of torchrun; returns the highest exit
    status.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "t"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    log = f"{args[args.index('--out') + 1]}.log"
    children = [fork(args, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log) for rank in range(count)]
    status = max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    if status:
        print(Path(log).read_text(), file=sys.stderr)
    return status


if __name__ == "__main__":
    import diffusers  # noqa: F401 - imported once for all children

    from vit_rope.cli import fit  # noqa: F401

    verb, number, *arguments = sys.argv[1:]
    if verb == "kill":
        print(json.dumps(kill(int(number), int(arguments[0]), arguments[1:])))
    else:
        sys.exit(ranks(int(number), arguments))
