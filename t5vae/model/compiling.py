"""torch.compile for a T5's layers, whether ZeRO-3 shards their weights or not."""

from typing import Any

import torch


def compile_layers(stack: Any) -> None:
    """torch.compile every layer of an encoder or a decoder, in place.

    By layer and not as a whole, so that equal layers share their compiled code, for any length. A
    layer is one graph: nothing in it is run by Python.

    Args:
        stack: of a transformers T5, mT5 or UMT5. Not yet in a DeepSpeed engine.
    """
    from deepspeed.utils import set_z3_leaf_module

    # All layers are one function to torch, which by default compiles that 8 times at most.
    torch.compiler.config.recompile_limit = 64
    for block in stack.block:
        # Attention would ask for the gradient of a constant, which no graph holds. The block's own
        # attribute is what checkpoints it.
        for module in block.layer.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        # ZeRO-3 gathers the weights of a leaf as a whole, by hooks of the leaf alone. They stay out
        # of the graph, which is of `forward`, not of the call.
        set_z3_leaf_module(block, True)
        block.forward = torch.compile(block.forward, dynamic=True)
