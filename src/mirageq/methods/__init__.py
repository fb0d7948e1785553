"""Every synthesis method: one file each, one line here.

A method is a frozen dataclass of settings with `synthesize(teacher, count, *, seed, journal) -> ImageSource`. The
command line, its help and the conformance tests are all derived from `METHODS`.
"""

from __future__ import annotations

from mirageq.errors import UserError, did_you_mean, first_line
from mirageq.methods.clusterq import ClusterQ
from mirageq.methods.contract import Method, check_method
from mirageq.methods.dgh import DGH
from mirageq.methods.gdfq import GDFQ
from mirageq.methods.genie import Genie
from mirageq.methods.hast import HAST
from mirageq.methods.intraq import IntraQ
from mirageq.methods.noise import Noise
from mirageq.methods.selectq import SelectQ
from mirageq.methods.synq import SynQ
from mirageq.methods.texq import TexQ
from mirageq.methods.union import Union
from mirageq.methods.zeroq import ZeroQ
from mirageq.modules import module_of

METHODS: dict[str, type] = {
    "noise": Noise,
    "zeroq": ZeroQ,
    "intraq": IntraQ,
    "hast": HAST,
    "dgh": DGH,
    "genie": Genie,
    "gdfq": GDFQ,
    "clusterq": ClusterQ,
    "texq": TexQ,
    "selectq": SelectQ,
    "synq": SynQ,
    "union": Union,
}

__all__ = [
    "METHODS",
    "Method",
    "find",
    "DGH",
    "GDFQ",
    "HAST",
    "ClusterQ",
    "Genie",
    "IntraQ",
    "Noise",
    "SelectQ",
    "SynQ",
    "TexQ",
    "Union",
    "ZeroQ",
]


def find(name: str) -> type:
    """The method class called `name`, or `package.module:Name` from anywhere.

    Raises:
        UserError: no such method, or not a method.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        raise UserError(f"There is no method '{name}'; {did_you_mean(name, METHODS)}. Your own: package.module:Name.")
    module, _, attribute = name.rpartition(":")
    try:
        found = getattr(module_of(module), attribute)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The method '{name}' cannot be imported: {type(error).__name__}: {first_line(error)}."
        ) from error
    check_method(found, f"'{name}'")
    return found
