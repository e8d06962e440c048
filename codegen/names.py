"""Names in generated code: classes, variables, modules."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

RESERVED = (
    frozenset(keyword.kwlist)
    | frozenset(dir(builtins))
    | {"self", "at", "state", "stream", "lib", "spmd", "kernels", "torch", "nn", "F"}
)
GLOBAL = re.compile(r"CAUSAL|FULL|MASK_\d+|CLOCK_\d+|[FIPRS]|Model|True|False|None")
"""What a class or a variable would hide: names of the module, and Python's own that begin with a capital."""

# What a module of PyTorch, the library's model and its state have of their own; weights under such a name are lost.
_TAKEN = """
INIT T_destination add_module after_step apply around artifact ask at begin beside bfloat16 buffers bytes
call_super_init
cast children coming compile counts counts_of cpu cuda decode double dump_patches eval extra_repr float follows
forward generate gives get_buffer get_extra_state get_parameter get_submodule half initialise inputs ipu keep_fp32
late lend lent load_state_dict longest losses losses_of modules mtia named_buffers named_children
named_logical_parameters named_modules named_parameters parameters prefill program register_backward_hook
register_buffer
register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ run scored self set_extra_state
set_submodule shape share_memory slots state_dict steps storage_dtype stream to to_empty train train_beside training
type vocab xpu zero_grad axes before chance cuts device mesh partial pipe regathered result rows site stored tied
"""
TAKEN = frozenset(_TAKEN.split())


def is_taken(name: str) -> bool:
    """Whether a module cannot have weights under this name."""
    return name in TAKEN or name.startswith("_") or keyword.iskeyword(name)


def class_name(graph: str) -> str:
    """`layer_mamba2` becomes `LayerMamba2`."""
    return "".join(part[:1].upper() + part[1:] for part in graph.split("_") if part)


def class_names(graphs: Iterable[str]) -> dict[str, str]:
    """The class of each graph, all different: `mlp_2` and `mlp2` are two."""
    found: dict[str, str] = {}
    for graph in graphs:
        name = class_name(graph) or "Block"
        while GLOBAL.fullmatch(name) or name in found.values():
            name += "_"
        found[graph] = name
    return found


def variable(name: str) -> str:
    """A value's name as a Python variable: dots become underscores, reserved words get one behind."""
    plain = name.replace(".", "_")
    return f"{plain}_" if plain in RESERVED or GLOBAL.fullmatch(plain) else plain


def attribute(name: str) -> str:
    """The name of a submodule."""
    return f"{name}_" if keyword.iskeyword(name) or name in ("forward", "training", "slots", "run") else name
