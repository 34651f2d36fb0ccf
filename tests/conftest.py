"""What all tests share."""

import inspect
import os

# one thread for each process: tests run side by side, and threads that wait for each other's cores stall
os.environ["OMP_NUM_THREADS"] = "1"


MODIFIES = {"gate": "learned", "inject": "learned"}  # where axial will not do


def spec_of(name: str) -> str:
    """A registered name as a spec: what modifies another scheme gets one to modify."""
    from vit_rope.positions import specs

    parameters = list(inspect.signature(specs._SCHEMES[name]).parameters.values())[1:]
    parts = [MODIFIES.get(name, "axial") for parameter in parameters if parameter.default is parameter.empty]
    return f"{name}({', '.join(parts)})" if parts else name
