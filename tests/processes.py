"""Commands in processes of their own, forked from one that has imported everything: a second each instead of ten.

`python -m tests.processes kill SEED KILLS ARGUMENTS` kills a run again and again until it may end, and
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
    """`python -m …` in the background, on one thread."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **env)
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Its exit status and what it said; it is ended when the time is over."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def fork(args: list[str], env: dict[str, str], log: str) -> int:
    """A child that runs a training command, its output in a file."""
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
    """Kill a run at random moments, going on from its last checkpoint wherever it has one, and let the last try end."""
    draw = random.Random(seed)
    out = Path(args[args.index("--out") + 1])
    log, counts = f"{out}.log", {"kills": 0, "resumed": 0, "ended": 0}
    began = time.monotonic()
    os.waitpid(fork([*args, "--out", f"{out}.whole"], {}, log), 0)
    longest = time.monotonic() - began
    while True:
        last = (out / "checkpoints" / "last.ckpt").exists()
        counts["resumed"] += last
        options = ["--ckpt_path", "last"] if last else ["--overwrite", "true"]
        child = fork([*args, *options], {}, log)
        if counts["kills"] < kills:
            time.sleep(draw.uniform(0.2, 1.0) * longest)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit(Path(log).read_text()[-3000:])
            if counts["kills"] >= kills:
                return counts
            counts["ended"] += 1  # before it was killed: once more from the start
            for path in out.glob("checkpoints/*"):
                path.unlink()
        else:
            counts["kills"] += 1


def ranks(count: int, args: list[str]) -> int:
    """Run a command in `count` processes that know of each other as under torchrun; the worst exit status."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "t"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    log = f"{args[args.index('--out') + 1]}.log"
    children = [fork(args, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log) for rank in range(count)]
    status = max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    if status:
        print(Path(log).read_text(), file=sys.stderr)
    return status


if __name__ == "__main__":
    import diffusers  # noqa: F401 - once for all children

    from vit_rope.cli import fit  # noqa: F401

    verb, number, *rest = sys.argv[1:]
    if verb == "kill":
        print(json.dumps(kill(int(number), int(rest[0]), rest[1:])))
    else:
        sys.exit(ranks(int(number), rest))
