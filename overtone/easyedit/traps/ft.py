"""Traps of FT-M."""

from __future__ import annotations

from collections.abc import Iterator

from overtone.easyedit.hparams import KEY
from overtone.easyedit.traps.tokenizer import adds_bos, load_tokenizer
from overtone.easyedit.traps.trap import Config, Trap


def _objective(config: Config) -> Iterator[Trap]:
    objective = config.get("objective_optimization")
    if objective != "target_new":
        yield Trap(
            f"objective_optimization {objective!r} is FT-L, whose loss sees the last prompt token alone",
            "objective_optimization: target_new, which is FT-M",
            fatal=KEY in config,
        )
        if (tokenizer := load_tokenizer(config)) is not None and adds_bos(tokenizer):
            yield Trap(
                f"the tokenizer puts {tokenizer.bos_token} before every text: FT-L trains it as the first target token",
                "objective_optimization: target_new, which leaves it out",
            )


CHECKS = (_objective,)
