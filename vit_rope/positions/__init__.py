"""Position schemes: functions of coordinates.

The folders are the families of schemes; `base` states what a scheme is, `coords` where tokens are,
`specs` how a scheme is named. The code here needs torch only, although importing it through
`vit_rope` also loads timm.
"""

from . import absolute, bias, controls, presets, relative, rotary  # importing a module registers its schemes
from .base import Layout, Position, Sum
from .encoding import Encoding
from .rotary.base import Rotary
from .specs import build, register, schemes

__all__ = ["Encoding", "Layout", "Position", "Rotary", "Sum", "build", "register", "schemes"]
