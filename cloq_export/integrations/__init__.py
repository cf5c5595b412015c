"""Models of this package in other libraries; nothing is registered there unless it is asked for."""

from __future__ import annotations


def register(*, foreign: bool = False) -> None:
    """Let transformers load our exports packed, and PEFT adapt them and bind what it saves; again changes nothing.

    From then on `AutoModelForCausalLM.from_pretrained(EXPORT)` gives what `cloq_export.load(EXPORT)` gives.

    Args:
        foreign: load GPTQ and compressed-tensors checkpoints of other tools packed too; otherwise their own quantizers
            load them.
    """
    from cloq_export.integrations import peft, transformers

    transformers.register(foreign=foreign)
    peft.register()
